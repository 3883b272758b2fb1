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

OF_PAIRS = ("token_type_ids", "next_sentence_label")  # columns of pairs of pieces


class Masking:
    """Collator that chooses the tokens to predict as transformers does: 80% masked, 10% random, 10% unchanged.

    The choice depends on seed, epoch and the piece's number alone. With `whole_words` it is by word: all tokens of a word
    are to be predicted or none, each word with the probability, so that their share is the same as without.
    """

    objective = "masked language modeling"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int, whole_words: bool = False):
        self.probability = probability
        # Of the tokens that it is given leave to mask, which are those of the chosen words, it masks all.
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=1.0 if whole_words else probability)
        self.pad_id = int(tokenizer.pad_token_id)
        self.seed = seed
        self.epoch = 0  # set by `MaskedTrainer`

    def mask(
        self, ids: Sequence[int], piece: int, draw: int | str, words: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masked ids, and labels (-100 where there is nothing to predict), both [n] int64.

        Args:
            draw: epoch, or "evaluation".
            words: with `whole_words`, the number of each token's word; -1 for special tokens.
        """
        digest = hashlib.sha256(json.dumps([self.seed, draw, piece]).encode()).digest()
        self.collator.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        kept = None if words is None else self._kept(ids, torch.tensor(words))[None]
        masked, labels = self.collator.torch_mask_tokens(torch.tensor([ids]), kept)
        return masked[0], labels[0]

    def _kept(self, ids: Sequence[int], words: Tensor) -> Tensor:
        """Which tokens are special, or in words that are not chosen, [n]."""
        draws = torch.rand(int(words.max()) + 2, generator=self.collator.generator)
        special = self.collator.tokenizer.get_special_tokens_mask([*ids], already_has_special_tokens=True)
        return (draws[words] >= self.probability) | (words < 0) | torch.tensor(special).bool()

    def mask_once(self, pieces: Dataset) -> Dataset:
        """Evaluation pieces with the mask that all evaluations use: `input_ids`, `labels` and `weight`.

        Raises:
            UserError: no token is masked.
        """
        masked = [self.mask(piece["input_ids"], piece["row"], "evaluation", piece.get("words")) for piece in pieces]
        if not any((labels != IGNORE_INDEX).any() for _, labels in masked):
            raise UserError(
                f"eval_dataset: no token of the {len(pieces)} held-out pieces of text is masked; give more text, or raise "
                "mlm_probability."
            )
        columns = {
            "input_ids": [ids.tolist() for ids, _ in masked],
            "labels": [labels.tolist() for _, labels in masked],
        }
        kept = {name: pieces[name][:] for name in OF_PAIRS if name in pieces.column_names}
        return Dataset.from_dict({**columns, **kept, "weight": [1] * len(masked)})

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `attention_mask` and `labels` [B, S]; `weight` [B], the number of tokens to predict.

        Of pairs also `token_type_ids` [B, S], and `next_sentence_label` [B]: 0 if the second piece follows the first, 1 if it is
        of another text, -100 for a padding row.
        """
        masked = [
            (torch.tensor(row["input_ids"]), torch.tensor(row["labels"]))
            if "labels" in row
            else self.mask(row["input_ids"], row["row"], self.epoch, row.get("words"))
            for row in rows
        ]
        real = torch.tensor([row["weight"] for row in rows])[:, None]  # 0 for a padding row
        ids, mask = pad_right([ids.tolist() for ids, _ in masked], self.pad_id)
        labels, _ = pad_right([labels.tolist() for _, labels in masked], IGNORE_INDEX)
        labels = labels.masked_fill(real == 0, IGNORE_INDEX)
        of_pairs = {}
        if "next_sentence_label" in rows[0]:
            types, _ = pad_right([row["token_type_ids"] for row in rows], 0)
            following = torch.tensor([row["next_sentence_label"] for row in rows])
            following = following.masked_fill(real[:, 0] == 0, IGNORE_INDEX)
            of_pairs = {"token_type_ids": types, "next_sentence_label": following}
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            **of_pairs,
            "labels": labels,
            "weight": (labels != IGNORE_INDEX).sum(dim=1),
        }
