"""The Trainer of masked language modeling, and of span corruption."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from align.data.tokenize import IGNORE_INDEX
from align.trainer.hf_trainer import ExactEvaluation
from align.trainer.row_trainer import RowTrainer


class MaskedTrainer(ExactEvaluation, RowTrainer):
    """Trainer with loss and accuracy of masked tokens, exact over all pieces and ranks."""

    accuracy = "accuracy"

    data_collator: Any  # MaskingCollator

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.data_collator.epoch = kwargs["epoch"]
        super()._run_epoch(*args, **kwargs)

    def loss_and_correct(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return total, (logits.argmax(dim=-1) == labels).sum()
