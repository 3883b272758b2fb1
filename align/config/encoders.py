"""Keys of `align classify` and `align mlm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.config.base import TrainerRecipe
from align.config.keys import ABOVE_0, ABOVE_0_BELOW_1, MAX_LENGTH, key, required


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRecipe(TrainerRecipe):
    """`align classify`: a classifier or a regression on texts or pairs of texts, from an encoder or a decoder."""

    model_name_or_path: str = required("Encoder (BERT-like) or decoder to put the classification head on.")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = key(
        None,
        "What `label` means, by transformers' name: one label per row (text or ids from 0), the list of those that apply, "
        "or a number. By default text and whole numbers are single labels, lists multiple ones, and fractions a regression.",
    )
    max_length: int = key(512, "Most tokens of a row; longer rows are bad rows.", MAX_LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class MLMRecipe(TrainerRecipe):
    """`align mlm`: continued pre-training of an encoder (BERT-like) on plain text by masked language modelling."""

    model_name_or_path: str = required(
        "Encoder to go on training; one without a masked-language-model head gets a new one."
    )
    learning_rate: float = key(5e-5, "Peak learning rate of AdamW.", ABOVE_0)
    mlm_probability: float = key(
        0.15,
        "Share of the tokens to predict: 80% of them masked, 10% replaced by a random token, 10% left as they are.",
        ABOVE_0_BELOW_1,
    )
    max_length: int = key(
        512,
        "Most tokens of a piece, special tokens included: longer texts are cut into even pieces, of which none is lost.",
        MAX_LENGTH,
    )
