"""transformers' Trainer for the demonstrations of an encoder-decoder, with the objectives of `align/sft/trainer.py`.

The encoder reads the prompt, and the decoder predicts every token of the completion, its end included, from those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from align.config.sft import SFTRecipe
from align.data.tokenize import IGNORE_INDEX
from align.models.trainable import peft_config
from align.sft.evaluated_trainer import DemonstrationEvaluation
from align.sft.evaluation import GROUP, group_sums
from align.sft.fused_head import label_scores
from align.trainer.row_trainer import RowTrainer, row_training_arguments


class PairCollator:
    """transformers' collator, which makes `decoder_input_ids` of the labels as the model does, and what the trainer counts by.

    Args:
        example_mean: whether the items of the loss are examples (`weight` 1) instead of label tokens (`weight` their number).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: Any, example_mean: bool):
        tokenizer.padding_side = "right"
        self.collate = DataCollatorForSeq2Seq(tokenizer, model)
        self.end, self.example_mean = int(tokenizer.eos_token_id), example_mean

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        is_empty = [all(label == IGNORE_INDEX for label in row["labels"]) for row in rows]  # a padding row
        # mBART makes its decoder's first token of the last label, and needs one.
        whole = [
            {"input_ids": row["input_ids"], "labels": [self.end] if empty else row["labels"]}
            for row, empty in zip(rows, is_empty, strict=True)
        ]
        batch = dict(self.collate(whole))
        batch["labels"][torch.tensor(is_empty)] = IGNORE_INDEX
        counts = (batch["labels"] != IGNORE_INDEX).sum(dim=1)
        batch["weight"] = (counts > 0).long() if self.example_mean else counts
        if GROUP in rows[0]:
            batch[GROUP] = torch.tensor([row[GROUP] for row in rows])
        return batch


class PairTrainer(DemonstrationEvaluation, RowTrainer):
    """Trainer whose loss is exact over the global batch, by either objective.

    Args:
        label_smoothing: share of each label's probability spread over the vocabulary (with the mean over tokens).
        kwargs: of `DemonstrationEvaluation` and `Trainer`; `data_collator` is a `PairCollator`.
    """

    accuracy = "mean_token_accuracy"
    data_collator: Any

    def __init__(self, *, label_smoothing: float, **kwargs: Any):
        self.label_smoothing = label_smoothing
        super().__init__(**kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        weight, group, labels = batch.pop("weight"), batch.pop(GROUP, None), batch["labels"]
        if "decoder_input_ids" in batch:
            del batch["labels"]  # else the model itself makes them of the labels
        output = model(**batch)
        scores = label_scores(output.logits, labels)
        if self.model.training:
            items = num_items_in_batch
            tokens = (batch["attention_mask"].sum(dim=1) * (weight > 0)).sum() + scores.label_mask.sum()
            self.train_sums += torch.stack([scores.is_top1.sum(), scores.label_mask.sum(), tokens]).double()
        else:
            items = weight.sum()
            values = (-scores.log_probs, scores.is_top1, scores.label_mask, scores.entropy)
            self.sums += group_sums(group[:, None].expand(labels.shape), len(self.groups), *values)
        nll = -scores.log_probs
        if self.label_smoothing and self.model.training:
            uniform = -output.logits.float().log_softmax(dim=-1).mean(dim=-1) * scores.label_mask
            nll = (1 - self.label_smoothing) * nll + self.label_smoothing * uniform
        if self.data_collator.example_mean:
            nll = nll / scores.label_mask.sum(dim=1, keepdim=True).clamp(min=1)
        # Gradients are averaged over processes.
        loss = nll.sum() * self.accelerator.num_processes / items.clamp(min=1)
        return (loss, output) if return_outputs else loss


def pair_trainer(recipe: SFTRecipe, model: PreTrainedModel, arguments: Mapping[str, Any], **common: Any) -> PairTrainer:
    """The trainer of the recipe's `method`, with its adapter.

    Args:
        arguments: of `align.trainer.arguments.training_arguments`.
        common: further arguments of `PairTrainer`.
    """
    trained: Any = model
    if adapter := peft_config(recipe, model.config, "SEQ_2_SEQ_LM"):
        trained = get_peft_model(model, adapter)
    return PairTrainer(
        label_smoothing=recipe.label_smoothing_factor,
        model=trained,
        args=row_training_arguments(arguments),
        data_collator=PairCollator(common["processing_class"], model, recipe.loss_normalization == "example_mean"),
        **common,
    )
