"""Span corruption (arXiv 1910.10683, section 3.1.4): what a T5-like encoder-decoder has to fill in.

Spans of a piece of text are replaced by one sentinel each (<extra_id_0>, <extra_id_1>, ...); the decoder writes each sentinel
and the span that it stands for. The shares are exact: of n tokens round(n x density) lie in spans, round(that / mean length)
of them, and the lengths of spans, and of the text between them, are random, as in the code that T5 was trained with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.data.collate import pad_right
from align.data.tokenize import IGNORE_INDEX
from align.encoders.tokenize import piece_length, special_tokens
from align.errors import UserError


class SpanCorruption:
    """Collator that corrupts spans of pieces. The spans depend on seed, epoch and the piece's number alone.

    Args:
        density: share of the tokens that are in spans.
        mean_span_length: of the spans, in tokens.
        start: the token that the decoder starts from.
    """

    objective = "span corruption"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, density: float, mean_span_length: float, seed: int, start: int
    ):
        self.sentinels = sentinel_ids(tokenizer)
        self.before, self.after = special_tokens(tokenizer)
        self.pad_id, self.end, self.start = int(tokenizer.pad_token_id), int(tokenizer.eos_token_id), start
        self.density, self.mean_span_length, self.seed = density, mean_span_length, seed
        self.epoch = 0  # set by `MaskedTrainer`

    def generator(self, piece: int, draw: int | str) -> np.random.Generator:
        """What decides on the spans of a piece."""
        digest = hashlib.sha256(json.dumps([self.seed, draw, piece]).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))

    def corrupt(self, ids: Sequence[int], piece: int, draw: int | str) -> tuple[list[int], list[int]]:
        """What the encoder reads, and what the decoder has to write; the latter is empty if there is nothing to hide.

        Args:
            ids: of the piece, with the tokenizer's special tokens.
            draw: epoch, or "evaluation".
        """
        text = ids[len(self.before) : len(ids) - len(self.after)]
        if len(text) < 2:
            return list(ids), []
        source, target = [*self.before], []
        spans = noise_spans(len(text), self.density, self.mean_span_length, self.generator(piece, draw))
        for sentinel, (kept, first, last) in zip(self.sentinels, spans, strict=False):
            source += [*text[kept:first], sentinel]
            target += [sentinel, *text[first:last]]
        return [*source, *self.after], [*target, self.end]

    def mask_once(self, pieces: Dataset) -> Dataset:
        """Evaluation pieces with the spans of all evaluations: `input_ids`, `labels` and `weight`.

        Raises:
            UserError: no piece has two tokens.
        """
        corrupted = [self.corrupt(piece["input_ids"], piece["row"], "evaluation") for piece in pieces]
        if not any(target for _, target in corrupted):
            raise UserError(
                f"eval_dataset: no span of the {len(pieces)} held-out pieces of text can be hidden; give more text."
            )
        columns = {"input_ids": [source for source, _ in corrupted], "labels": [target for _, target in corrupted]}
        return Dataset.from_dict({**columns, "weight": [1] * len(corrupted)})

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `attention_mask` [B, S], `decoder_input_ids`, `labels` [B, T]; `weight` [B], tokens to write."""
        pairs = [
            (row["input_ids"], row["labels"])
            if "labels" in row
            else self.corrupt(row["input_ids"], row["row"], self.epoch)
            for row in rows
        ]
        ids, mask = pad_right([source for source, _ in pairs], self.pad_id)
        targets = [target or [self.end] for _, target in pairs]
        shifted, _ = pad_right([[self.start, *target[:-1]] for target in targets], self.pad_id)
        labels, _ = pad_right(targets, IGNORE_INDEX)
        # A padding row has weight 0, and a piece of one token no target.
        counts = [bool(target) and row["weight"] > 0 for row, (_, target) in zip(rows, pairs, strict=True)]
        labels = labels.masked_fill(~torch.tensor(counts)[:, None], IGNORE_INDEX)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "decoder_input_ids": shifted,
            "labels": labels,
            "weight": (labels != IGNORE_INDEX).sum(dim=1),
        }


def span_counts(length: int, density: float, mean_span_length: float) -> tuple[int, int]:
    """How many of `length` tokens (2 or more) are in spans, and the number of spans."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span_length), 1), noise, length - noise)
    return noise, spans


def noise_spans(
    length: int, density: float, mean_span_length: float, generator: np.random.Generator
) -> list[tuple[int, int, int]]:
    """For each span: where the text that is kept before it begins, and where the span begins and ends."""
    noise, spans = span_counts(length, density, mean_span_length)
    hidden, kept = (_parts(total, spans, generator) for total in (noise, length - noise))
    ends = np.cumsum(kept + hidden)
    return [
        (int(end - size - before), int(end - size), int(end))
        for end, size, before in zip(ends, hidden, kept, strict=True)
    ]


def _parts(total: int, parts: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Positive whole numbers with this sum; all ways to cut it are equally likely."""
    cuts = np.sort(generator.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1> and so on, as many as the tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    found: list[int] = []
    while True:
        names = (f"{prefix}<extra_id_{len(found)}>" for prefix in ("", "\u2581"))  # mT5's begin with a space
        known = next((vocabulary[name] for name in names if name in vocabulary), None)
        if known is None:
            return found
        found.append(known)


def check_sentinels(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    path: str,
    *,
    max_length: int,
    density: float,
    mean_span_length: float,
) -> None:
    """Check that the tokenizer has a sentinel for each span of the longest piece, or a mask token and no sentinels.

    Raises:
        UserError: it has not.
    """
    sentinels = len(sentinel_ids(tokenizer))
    if not sentinels and tokenizer.mask_token_id is not None:
        return  # text infilling
    if not sentinels:
        raise UserError(
            f"model_name_or_path: {path} ({config.model_type}) is an encoder-decoder whose tokenizer has neither sentinels (<extra_id_0>, "
            "...) nor a mask token, by which T5-like and BART-like models learn to fill in spans; name one that has, or fine-tune "
            "this one by the sft stage."
        )
    before, after = special_tokens(tokenizer)
    length = piece_length(tokenizer, config, max_length) - len(before) - len(after)
    _, spans = span_counts(max(length, 2), density, mean_span_length)
    if spans > sentinels:
        raise UserError(
            f"max_length: a piece of {length} tokens has {spans} spans, and the tokenizer {sentinels} sentinels; lower max_length "
            "or mlm_probability, or raise mean_noise_span_length."
        )
