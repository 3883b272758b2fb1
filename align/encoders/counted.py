"""Evaluation by counts that add up over rows and ranks, for the stages that put a head on a backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align.compat.trl import pending_metrics
from align.trainer.callback import StageCallback
from align.trainer.hf_trainer import ExactEvaluation
from align.trainer.row_trainer import RowTrainer


class CountedEvaluation(ExactEvaluation, RowTrainer):
    """A Trainer whose metrics come from sums over all rows and ranks.

    A subclass adds to `counts` what each evaluation batch has, in `loss_and_correct`, and defines `summarize`.
    """

    counts: Tensor  # of the evaluation so far, on this rank
    eval_counts: Tensor | None = None  # of the last evaluation, over all ranks; None before this process's first

    def no_counts(self) -> Tensor:
        """Zeros of the shape of `counts`, or of one that broadcasts to it, float64."""
        return torch.zeros((), dtype=torch.float64)

    def summarize(self, counts: Tensor, correct: float, items: float) -> dict[str, float]:
        """Metrics by name, without `eval_`, from the sums of an evaluation."""
        raise NotImplementedError

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.counts = self.no_counts().to(self.args.device)
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            _, correct, items = self.accelerator.reduce(self.sums, "sum").tolist()
            self.eval_counts = self.accelerator.reduce(self.counts, "sum").cpu()
            metrics = self.summarize(self.eval_counts, correct, items)
            pending_metrics(self, "eval").update({name: [value] for name, value in metrics.items()})
        super().log(logs, start_time)


def last_counts(trainer: CountedEvaluation) -> Tensor:
    """The counts of the last evaluation, over all ranks. Every rank must call it."""
    if trainer.eval_counts is None:  # resumed after it, and what it measured is in metrics.jsonl already
        logging: Any = trainer.pop_callback(StageCallback)
        trainer.evaluate()
        trainer.add_callback(logging)
    assert trainer.eval_counts is not None
    return trainer.eval_counts
