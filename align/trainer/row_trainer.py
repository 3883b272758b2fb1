"""A transformers Trainer for weighted rows, whose loss is one sum over the global batch divided by its items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from align.data.collate import pad_right


class RowCollator:
    """Collates rows of `input_ids`, `labels` and `weight` to tensors: ids are padded on the right, with `attention_mask`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad_id = int(tokenizer.pad_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad_right([row["input_ids"] for row in rows], self.pad_id)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "labels": self.labels(rows),
            "weight": torch.tensor([row["weight"] for row in rows]),
        }

    def labels(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """The rows' labels, [B, ...]."""
        return torch.tensor([row["labels"] for row in rows])


def row_training_arguments(arguments: Mapping[str, Any]) -> TrainingArguments:
    """`TrainingArguments` from those of `align.trainer.hf_trainer.training_arguments`."""
    kept = {
        name: value for name, value in arguments.items() if name != "max_length"
    }  # an argument of TRL's configs only
    return TrainingArguments(**kept, label_names=["labels"])


class RowTrainer(Trainer):
    """A Trainer whose loss does not depend on how the global batch is split into microbatches.

    `weight` [B] of a batch is the number of loss items in each row (0 for a padding row); the loss is summed over the
    global batch and divided by its items. Metrics are kept as in TRL's trainers, as `ExactEvaluation` expects. Subclasses
    mix that in, and define `loss_and_correct`.
    """

    model: nn.Module
    accuracy = "accuracy"  # name of the metric of training
    loss_is_scaled_for_ga = True  # no further division by the number of microbatches
    sums: Tensor  # of the evaluation, [loss, correct, items]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        self._total_train_tokens = 0
        self.train_sums = self._zeros()

    def loss_and_correct(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the loss (with gradients) and number of correct items, from float32 logits [B, ...]."""
        raise NotImplementedError

    def logits_of(self, output: Any) -> Tensor:
        """The logits [B, ...] of the model's output."""
        logits: Tensor = output.logits
        return logits

    def loss_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the sum of a microbatch's losses is divided by, together with that of the other microbatches and ranks."""
        return batch["weight"].sum()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The microbatches of an optimizer step, and the items in them over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.stack([self.loss_items(batch) for batch in batches]).sum().to(device)
        return batches, self.accelerator.reduce(items, "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        labels, weight = batch.pop("labels"), batch.pop("weight")
        output = model(**batch)
        total, correct = self.loss_and_correct(self.logits_of(output).float(), labels, weight)
        if self.model.training:
            items = num_items_in_batch
            tokens = (batch["attention_mask"].sum(dim=1) * (weight > 0)).sum()
            self.train_sums += torch.stack([correct.detach(), weight.sum(), tokens]).double()
        else:
            items = weight.sum()
            self.sums += torch.stack([total, correct, weight.sum()]).double()
        # Gradients are averaged over processes.
        loss = total * self.accelerator.num_processes / (items + (items == 0))
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if "eval_loss" in logs else "train"
        if "loss" in logs:
            correct, items, tokens = self.accelerator.reduce(self.train_sums, "sum").tolist()
            self.train_sums = self._zeros()
            self._total_train_tokens += int(tokens)
            self._metrics["train"] = {"num_tokens": [self._total_train_tokens]}
            if items:
                self._metrics["train"][self.accuracy] = [correct / items]
        prefix = "eval_" if mode == "eval" else ""
        logs |= {f"{prefix}{name}": values[0] for name, values in self._metrics[mode].items()}
        self._metrics[mode] = {}
        super().log(logs, start_time)

    def _zeros(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.args.device)
