"""TRL's SFTTrainer with an exact objective, however rows are split, packed or distributed.

token_mean      sum over label tokens of -log p, divided by their number
example_mean    mean over examples of the mean over each example's own label tokens

Both are over the whole batch of an optimizer step: all microbatches of all ranks. A packed row holds several examples,
whose position ids each start at 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from trl import SFTTrainer

from align.compat.trl import FUSED_HEAD_ARGUMENT, fused_head_on_label_tokens
from align.data.tokenize import IGNORE_INDEX
from align.engine.sequence_parallel import ULYSSES, SequenceGroup
from align.sft.evaluated_trainer import DemonstrationEvaluation
from align.sft.evaluation import GROUP, GroupCollator, group_sums, groups_of_tokens
from align.sft.fused_head import HAS_FUSED_HEAD, token_scores
from reward_models.heads import hf_model


class DemonstrationTrainer(DemonstrationEvaluation, SFTTrainer):
    """SFTTrainer with one of the objectives above, and an evaluation that is exact over tokens.

    Args:
        example_mean: train the second objective instead of the first.
        fused_head: whether TRL's fused head is exact for the model (`align.sft.fused_head`); otherwise losses come from logits.
        sequence: the processes that share rows with this one, each of which computes its part of every row.
        kwargs: of `DemonstrationEvaluation` and `SFTTrainer`.
    """

    data_collator: Any

    def __init__(
        self,
        *args: Any,
        example_mean: bool,
        fused_head: bool = True,
        sequence: SequenceGroup | None = None,
        **kwargs: Any,
    ):
        self.example_mean, self.fused_head, self.sequence = example_mean, fused_head, sequence
        super().__init__(*args, **kwargs)
        if sequence is not None:
            hf_model(self.model).set_attn_implementation(ULYSSES)
        self.data_collator = GroupCollator(self.data_collator)
        if not HAS_FUSED_HEAD:
            self.compute_loss_func = self._loss_from_logits
            self.num_virtual_tokens = 0  # TRL must not cut their logits off a second time

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        group = inputs.pop(GROUP, None)
        # The first token has no prediction, except after virtual tokens: leave it out for these too.
        inputs["labels"][:, 0] = IGNORE_INDEX
        batch = dict(inputs)  # Trainer removes the labels before it calls a loss function
        if self.sequence is not None:
            inputs = own_part(self.sequence, batch)

        def sum_or_weight(scores: Any) -> Any:
            """In evaluation, add to the sums; in training by `example_mean`, weight the log-probabilities."""
            if not self.model.training:
                values = (-scores.log_probs, scores.is_top1, scores.label_mask, scores.entropy)
                width = scores.log_probs.shape[1] if self.sequence is None else batch["labels"].shape[1] - 1
                groups = self._own(groups_of_tokens(batch, group, width))
                self.sums += group_sums(groups, len(self.groups), *values)
            elif self.example_mean:
                weights = self._own(example_mean_weights(batch))
                virtual = scores.log_probs.shape[1] - weights.shape[1]
                scores.log_probs = scores.log_probs * F.pad(weights, (virtual, 0))
            return scores

        def call_model(**arguments: Any) -> Any:
            if self.sequence is not None:
                del arguments["attention_mask"]  # which TRL counts tokens by
            if FUSED_HEAD_ARGUMENT in arguments and not self.fused_head:
                del arguments[FUSED_HEAD_ARGUMENT]
                labels = arguments.pop("labels")
                output = model(**arguments)
                scores = token_scores(at_labels(output.logits, labels), labels)
                scores.aux_loss = getattr(output, "aux_loss", None)
                return sum_or_weight(scores)
            if FUSED_HEAD_ARGUMENT in arguments and self.sequence is not None:
                arguments["shift_labels"] = arguments["labels"][:, 1:]
            output = model(**arguments)
            if FUSED_HEAD_ARGUMENT in arguments:
                return sum_or_weight(output)
            output.logits = at_labels(output.logits, inputs["labels"])  # for label smoothing
            return output

        self._sum_or_weight = sum_or_weight
        if not HAS_FUSED_HEAD:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        with fused_head_on_label_tokens():
            return super().compute_loss(call_model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]

    def _loss_from_logits(self, output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        """The loss that TRL computes with its fused head, which TRL 1.14, the last for Python 3.10, does not have."""
        output.logits = at_labels(output.logits, labels)
        scores = self._sum_or_weight(token_scores(output.logits, labels))
        if self.label_smoother is not None:
            return self.label_smoother(output, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
        count = scores.label_mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -scores.log_probs.sum() / count.clamp(min=1)
        if self.aux_loss_enabled and self.model.training:
            # It is a mean over microbatches and ranks, while Trainer sums what it gets over both.
            parts = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss + self.router_aux_loss_coef * output.aux_loss / parts
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        if self.example_mean:
            # The weights of an example sum to 1, so this counts examples.
            count = torch.stack([example_mean_weights(batch).sum() for batch in batch_samples]).sum()
            items = self.accelerator.reduce(count.to(device), "sum")
        else:
            items = super()._get_num_items_in_batch(batch_samples, device)
        return items if self.sequence is None else items / self.sequence.size  # each process has counted whole rows

    def _own(self, values: Tensor) -> Tensor:
        """This process's part of values of the predicted tokens of whole rows, [m, S - 1], at the places that predict them."""
        return values if self.sequence is None else self.sequence.part(F.pad(values, (0, 1)), 0)

    def add_exact_metrics(self, logs: dict[str, float]) -> None:
        if self.sequence is None:
            return super().add_exact_metrics(logs)
        model = hf_model(self.model)
        model.set_attn_implementation("sdpa")  # each process answers prompts of its own
        super().add_exact_metrics(logs)
        model.set_attn_implementation(ULYSSES)
        return None


def own_part(sequence: SequenceGroup, batch: dict[str, Any]) -> dict[str, Any]:
    """A process's part of a batch of whole rows: arguments of the model, `attention_mask` and `labels`.

    The labels [m, 1 + S / size] are those that the part predicts, the first of the next part among them, after a column without
    labels, so that shifting them by one aligns them.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    predicted = sequence.part(F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), IGNORE_INDEX)
    return {
        **sequence.inputs(ids, batch.get("position_ids")),
        "attention_mask": sequence.part(batch.get("attention_mask", torch.ones_like(ids)), 0),
        "labels": F.pad(predicted, (1, 0), value=IGNORE_INDEX),
    }


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [m, S, V] at the places of labels [m, S]: without virtual tokens, which come first.

    The last one predicts nothing: where the labels are those of `own_part`, it is added.
    """
    if logits.shape[1] < labels.shape[1]:
        return F.pad(logits, (0, 0, 0, 1))
    return logits[:, -labels.shape[1] :]


def example_mean_weights(batch: dict[str, Tensor]) -> Tensor:
    """1 / |y| at each of the |y| label tokens of an example, 0 elsewhere: [m, S - 1] float32, for predicted tokens.

    Args:
        batch: `labels` [m, S], -100 where the loss ignores a token; `position_ids` [m, S] if rows hold several examples.
    """
    is_label = batch["labels"][:, 1:] != IGNORE_INDEX
    if "position_ids" in batch:
        example = (batch["position_ids"][:, 1:] == 0).long().cumsum(dim=1)
    else:
        example = torch.zeros_like(is_label, dtype=torch.long)
    sizes = torch.zeros(is_label.shape[0], int(example.max()) + 1, device=is_label.device)
    sizes.scatter_add_(1, example, is_label.float())
    return is_label / sizes.gather(1, example).clamp(min=1)
