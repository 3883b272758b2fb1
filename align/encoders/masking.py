"""Masking: which tokens a masked language model has to predict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from align.data.collate import pad_right
from align.data.tokenize import IGNORE_INDEX
from align.errors import UserError


class Masking:
    """Collator that chooses the tokens to predict as transformers does: 80% masked, 10% random, 10% unchanged.

    The choice depends on seed, epoch and the piece's number alone.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int):
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)
        self.pad_id = int(tokenizer.pad_token_id)
        self.seed = seed
        self.epoch = 0  # set by `MaskedTrainer`

    def mask(self, ids: Sequence[int], piece: int, draw: int | str) -> tuple[Tensor, Tensor]:
        """Masked ids, and labels (-100 where there is nothing to predict), both [n] int64.

        Args:
            draw: epoch, or "evaluation".
        """
        digest = hashlib.sha256(json.dumps([self.seed, draw, piece]).encode()).digest()
        self.collator.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        masked, labels = self.collator.torch_mask_tokens(torch.tensor([ids]))
        return masked[0], labels[0]

    def mask_once(self, pieces: Dataset) -> Dataset:
        """Evaluation pieces with the mask that all evaluations use: `input_ids`, `labels` and `weight`.

        Raises:
            UserError: no token is masked.
        """
        masked = [self.mask(piece["input_ids"], piece["row"], "evaluation") for piece in pieces]
        if not any((labels != IGNORE_INDEX).any() for _, labels in masked):
            raise UserError(
                f"eval_dataset: no token of the {len(pieces)} held-out pieces of text is masked; give more text, or raise "
                "mlm_probability."
            )
        columns = {
            "input_ids": [ids.tolist() for ids, _ in masked],
            "labels": [labels.tolist() for _, labels in masked],
        }
        return Dataset.from_dict({**columns, "weight": [1] * len(masked)})

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `attention_mask` and `labels` [B, S]; `weight` [B], the number of tokens to predict."""
        masked = [
            (torch.tensor(row["input_ids"]), torch.tensor(row["labels"]))
            if "labels" in row
            else self.mask(row["input_ids"], row["row"], self.epoch)
            for row in rows
        ]
        real = torch.tensor([row["weight"] for row in rows])[:, None]  # 0 for a padding row
        ids, mask = pad_right([ids.tolist() for ids, _ in masked], self.pad_id)
        labels, _ = pad_right([labels.tolist() for _, labels in masked], IGNORE_INDEX)
        labels = labels.masked_fill(real == 0, IGNORE_INDEX)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "labels": labels,
            "weight": (labels != IGNORE_INDEX).sum(dim=1),
        }
