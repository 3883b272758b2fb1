"""TRL's RewardTrainer without a loss from padding rows."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import RewardTrainer

from align.trainer.hf_trainer import ExactEvaluation


class PairTrainer(ExactEvaluation, RewardTrainer):
    """RewardTrainer in which padding rows (chosen and rejected are the same ids) add nothing to loss or metrics."""

    accuracy = "accuracy"

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        margin = inputs.get("margin", 0.0)  # [pairs], of rows that have one

        def scored(**batch: Any) -> Any:
            output = model(**{name: value for name, value in batch.items() if name != "margin"})
            chosen_ids, rejected_ids = batch["input_ids"].chunk(2)
            real = (chosen_ids != rejected_ids).any(dim=1)  # [pairs]
            output.logits = output.logits.float() * real.repeat(2)[:, None]  # so the centering term is 0 as well
            if not self.model.training:
                chosen, rejected = output.logits.squeeze(-1).chunk(2)
                correct = (chosen > rejected) + 0.5 * (chosen == rejected)
                loss = -logsigmoid(chosen - rejected - margin)
                self.sums += torch.stack([loss[real].sum(), correct[real].sum(), real.sum()])
            return output

        return super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
