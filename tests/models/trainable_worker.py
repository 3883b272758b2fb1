"""Run by the ranks of test_trainable.py: the SFT stage once for each recipe named, one after another."""

from accelerate.state import AcceleratorState, GradientState

from align.config.load import load_recipe
from align.engine.distributed import disconnect
from align.sft import train as sft


def train_each(*paths: str) -> None:
    sft.disconnect = lambda: None  # one process group for all of them
    for path in paths:
        sft.run(load_recipe("sft", path))
        AcceleratorState._reset_state()
        GradientState._reset_state()
    disconnect()
