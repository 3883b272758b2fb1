"""One rank of a run of test_resume.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import align.engine.parts
import align.trainer.checkpoint
from align.config.load import load_recipe
from align.ppo import train as ppo
from align.reward import train as reward
from align.runs.launch import end_on_signals
from align.sft import train as sft

STAGES = {"sft": sft, "reward": reward, "ppo": ppo}


def work(stage: str, recipe: str, stall: str | None) -> None:
    """Run a stage as this rank.

    Args:
        stall: a checkpoint's name: stop for good in the middle of writing it, and create the file `stalled`.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    make_noisy(rank)
    end_on_signals()
    if stall is not None:
        marker = Path(recipe).with_name("stalled")
        for module, function in ((align.engine.parts, "write_file"), (align.trainer.checkpoint, "write_generators")):
            setattr(module, function, stalling(getattr(module, function), stall, rank + 1 == ranks, marker))
    STAGES[stage].run(load_recipe(stage, recipe))


def make_noisy(rank: int) -> None:
    """Have what TRL trains depend on this rank's generator, as dropout would; ranks draw at a pace of their own."""
    for trainer in (sft.DemonstrationTrainer, reward.PairTrainer):
        plain = trainer.compute_loss

        def noisy(self: Any, model: Any, *args: Any, plain: Callable[..., Any] = plain, **kwargs: Any) -> Any:
            loss = plain(self, model, *args, **kwargs)
            return loss * (0.5 + torch.rand(rank + 1)[-1]) if self.model.training else loss

        trainer.compute_loss = noisy


def stalling(write: Callable[..., Any], checkpoint: str, last_rank: bool, marker: Path) -> Callable[..., Any]:
    """`write`, but of the last file of the checkpoint only the first half, and then nothing any more.

    Of a checkpoint by TRL's trainer that is the last rank's generator; the other ranks are done with theirs.
    """

    def save(*args: Any, **kwargs: Any) -> Any:
        written = write(*args, **kwargs)
        path = next(place for place in args if isinstance(place, str | Path))
        place = str(path)
        if f"/{checkpoint}/value/" in place or (last_rank and f"/{checkpoint}/random/" in place):
            os.truncate(path, os.path.getsize(path) // 2)
            marker.touch()
            time.sleep(600)
        return written

    return save
