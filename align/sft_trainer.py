"""TRL's SFTTrainer with the objective of an optimiser step named and exact, however rows are cut up, packed or spread.

token_mean      sum over label tokens of -log p, divided by their number
example_mean    mean over examples of the mean over each example's own label tokens

Both are over the whole batch of an optimiser step: all microbatches of all ranks. A packed row holds several
examples, told apart by its position ids, which start again at 0 with each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from align.trainers import ExactEvaluation


class DemonstrationTrainer(ExactEvaluation, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose loss is one of the above, and whose evaluation is a mean over tokens.

    Args:
        example_mean: which of the two objectives it trains.
    """

    accuracy = "mean_token_accuracy"

    def __init__(self, *args: Any, example_mean: bool, **kwargs: Any):
        self.example_mean = example_mean
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        def measured(**batch: Any) -> Any:
            output = model(**batch)
            if "fused_lm_head" not in batch:
                return output  # the logits, for label smoothing
            if not self.model.training:
                nll: Tensor = -output.log_probs.sum()
                self.sums += torch.stack([nll, output.is_top1.sum(), output.label_mask.sum()]).double()
            elif self.example_mean:
                output.log_probs = output.log_probs * token_shares(inputs)
            return output

        return super().compute_loss(measured, inputs, return_outputs, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        if not self.example_mean:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.stack(
            [token_shares(batch).sum() for batch in batch_samples]
        ).sum()  # an example's shares sum to 1
        return self.accelerator.reduce(count.to(device), "sum")


def token_shares(batch: dict[str, Tensor]) -> Tensor:
    """1 / |y| at each of the |y| label tokens of an example, [m, S - 1] float32 for predicted tokens; 0 elsewhere.

    Args:
        batch: `labels` [m, S], -100 where nothing is learnt; `position_ids` [m, S] in rows of several examples.
    """
    counted = batch["labels"][:, 1:] != -100
    if "position_ids" in batch:
        examples = (batch["position_ids"][:, 1:] == 0).long().cumsum(dim=1)
    else:
        examples = torch.zeros_like(counted, dtype=torch.long)
    sizes = torch.zeros(counted.shape[0], int(examples.max()) + 1, device=counted.device)
    sizes.scatter_add_(1, examples, counted.float())
    return counted / sizes.gather(1, examples).clamp(min=1)
