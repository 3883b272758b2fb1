"""The rows of `classify` and `mlm` as `align check` shows them: the first one with the tokens that matter marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config import ClassifyRecipe, MLMRecipe
from align.labels import Labels
from align.masking import Masking
from align.rows import Labelled, Passage
from align.texts import piece_length, tokenize_labelled, tokenize_passages
from align.tokenization import IGNORED

# Ids with their marks by name; what the marks mean; the ids of all rows; the bad rows by reason.
Sample = tuple[dict[str, tuple[list[int], list[bool]]], str, list[list[int]], dict[str, Any]]


def sample_labelled(
    rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, labels: Labels, recipe: ClassifyRecipe, encoder: bool
) -> Sample:
    """Raises as `tokenize_labelled`."""
    data, bad = tokenize_labelled(rows, tokenizer, labels, recipe, encoder)
    ids = data[0]["input_ids"]
    place = 0 if encoder else len(ids) - 1
    note = f"marked: the token from which the label is read; {labels.problem_type}, {labels.describe()}"
    shown = {f"row labelled {rows[0].label!r}": (ids, [index == place for index in range(len(ids))])}
    return shown, note, data["input_ids"][:], bad


def sample_pieces(
    rows: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, recipe: MLMRecipe
) -> Sample:
    """Raises as `tokenize_passages`."""
    data = tokenize_passages(rows, tokenizer, piece_length(tokenizer, config, recipe))
    masked, labels = Masking(tokenizer, recipe.mlm_probability, recipe.seed).mask(data[0]["input_ids"], 0, 0)
    note = f"marked: the tokens to predict; {len(data)} pieces"
    return {"piece": (masked.tolist(), (labels != IGNORED).tolist())}, note, data["input_ids"][:], {}
