"""RLHF in three stages: supervised fine-tuning, a reward model, PPO.

From Python: `from align import sft, reward, ppo, evaluate, encoders`, then `sft.run(recipe)` and so on.
"""

import os

# MKL keeps a heap of its own beside that of the process, 60 MB in a run, which gains nothing where the process keeps its
# memory (align/engine/cpu.py). It reads this when torch loads it.
os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")
