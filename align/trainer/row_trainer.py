"""transformers' Trainer for rows with weights: one sum over the global batch, and counts from which measures come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments


class Padding:
    """Collates rows of `input_ids`, `labels` and `weight`: ids padded on the right, with an attention mask."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad_id = int(tokenizer.pad_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        mask = [torch.ones_like(each) for each in ids]
        return {
            "input_ids": pad_right(ids, self.pad_id),
            "attention_mask": pad_right(mask, 0),
            "labels": torch.tensor([row["labels"] for row in rows]),
            "weight": torch.tensor([row["weight"] for row in rows]),
        }


def pad_right(rows: Sequence[Tensor], value: int) -> Tensor:
    """Rows [n] of different lengths as [B, longest]."""
    longest = max(map(len, rows))
    return torch.stack([pad(row, (0, longest - len(row)), value=value) for row in rows])


def row_arguments(arguments: Mapping[str, Any]) -> TrainingArguments:
    """transformers' arguments from those of `align.trainer.hf_trainer.training_arguments`."""
    given = {name: value for name, value in arguments.items() if name != "max_length"}  # one of TRL's
    return TrainingArguments(**given, label_names=["labels"])


class RowTrainer(Trainer):  # type: ignore[misc]
    """Its loss is a sum over the global batch, divided by the items in it: how the batch is cut up changes nothing.

    A batch has `weight` [B], the items of the loss that a row holds: 0 for a padding row. Metrics are kept as in TRL's
    trainers, which `ExactEvaluation` expects; a class that mixes that in says in `judge` what the model got right.
    """

    loss_is_scaled_for_ga = True  # it needs no further division by the number of microbatches
    sums: Tensor  # of the evaluation, [loss, correct, items]

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {}, "eval": {}}
        self._total_train_tokens = 0
        self._seen = self._zeros()

    def judge(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the loss and sum of what is right, from float32 logits [B, ...]; called with gradients."""
        raise NotImplementedError

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The microbatches of an optimiser step, and the items in them over all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.stack([batch["weight"].sum() for batch in batches]).sum().to(device)
        return batches, self.accelerator.reduce(items, "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        labels, weight = batch.pop("labels"), batch.pop("weight")
        output = model(**batch)
        total, correct = self.judge(output.logits.float(), labels, weight)
        if self.model.training:
            items = num_items_in_batch
            tokens = (batch["attention_mask"].sum(dim=1) * (weight > 0)).sum()
            self._seen += torch.stack([correct.detach(), weight.sum(), tokens]).double()
        else:
            items = weight.sum()
            self.sums += torch.stack([total, correct, weight.sum()]).double()
        # Gradients are averaged over processes.
        loss = total * self.accelerator.num_processes / items.clamp(min=1)
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if "eval_loss" in logs else "train"
        if "loss" in logs:
            correct, items, tokens = self.accelerator.reduce(self._seen, "sum").tolist()
            self._seen = self._zeros()
            self._total_train_tokens += int(tokens)
            self._metrics["train"] = {"num_tokens": [self._total_train_tokens]}
            if items:
                self._metrics["train"]["accuracy"] = [correct / items]
        prefix = "eval_" if mode == "eval" else ""
        logs |= {f"{prefix}{name}": values[0] for name, values in self._metrics[mode].items()}
        self._metrics[mode] = {}
        super().log(logs, start_time)

    def _zeros(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.args.device)
