"""Run under the launcher by test_methods.py: the SFT stage once for each recipe named, one after another."""

import sys

from accelerate.state import AcceleratorState, GradientState

from align.config.load import load_recipe
from align.engine.distributed import disconnect
from align.sft import train as sft

sft.disconnect = lambda: None  # one process group for all of them
for path in [word for word in sys.argv[1:] if word.endswith(".yaml")]:
    sft.run(load_recipe("sft", path))
    AcceleratorState._reset_state()
    GradientState._reset_state()
disconnect()
