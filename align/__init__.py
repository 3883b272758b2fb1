"""RLHF in three stages: supervised fine-tuning, a reward model, PPO.

From Python: `from align import sft, reward, ppo, evaluate, encoders`, then `sft.run(recipe)` and so on.
"""

from __future__ import annotations

import os
import sys

# The current folder of an `align run`, which starts its stages in an empty one. The `deepspeed` launcher passes on to other
# nodes what begins with PYTHON.
FOLDER = "PYTHON_ALIGN_FOLDER"
# Started by `python -m`, also under the launcher, Python searches the current folder before its own modules: a `queue.py`
# there would be imported instead of Python's. From here on that folder is the last.
CURRENT_FOLDER: str | None = None  # in sys.path only as the current folder
if sys.argv[:1] == ["-m"]:  # so it is while Python looks for the module to run
    if sys.path[:1] == [os.getcwd()]:
        del sys.path[0]
        CURRENT_FOLDER = os.environ.get(FOLDER, os.getcwd())
        sys.path.append(CURRENT_FOLDER)
    os.chdir(os.environ.pop(FOLDER, "."))

# MKL keeps a heap of its own beside that of the process, 60 MB in a run, which gains nothing where the process keeps its
# memory (align/engine/cpu.py). It reads this when torch loads it.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
