"""Keys of `align classify` and `align mlm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from align.config.base import TrainerRecipe, check_trainer_rules
from align.config.keys import ABOVE_0, ABOVE_0_BELOW_1, AT_LEAST_1, MAX_LENGTH, Where, key, required
from align.errors import UserError

ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
MACRO = ("macro_f1", "macro_f1_low", "macro_f1_high", "macro_precision", "macro_recall")
CLASSIFY_METRICS = {  # of an evaluation, beside the loss
    "single_label_classification": (*ACCURACY, *MACRO),
    "multi_label_classification": (*ACCURACY, "micro_f1", "macro_f1"),
    "regression": ("mse", "pearson"),
}
MEAN_NOISE_SPAN_LENGTH = 3.0
MLM_METRICS = ("loss", "accuracy")
NSP_METRICS = ("next_sentence_loss", "next_sentence_accuracy")  # further ones, with next_sentence_prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRecipe(TrainerRecipe):
    """`align classify`: a classifier or a regression on texts or pairs of texts, from an encoder or a decoder."""

    model_name_or_path: str = required("Encoder (BERT-like) or decoder; it gets a classification head.")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = key(
        None,
        "Kind of `label`, by transformers' name: one label per row (text or ids from 0), a list of labels, or a "
        "number. By default text and integers are single labels, lists are multiple labels, and fractions are a "
        "regression.",
    )
    max_length: int = key(512, "Maximum tokens of a row; longer rows are bad rows.", MAX_LENGTH)
    class_weights: Literal["balanced"] | dict[Any, float] | None = key(
        None,
        "Weight of the loss of each label, whose mean is divided by the sum of the weights: a mapping of labels to numbers, or "
        "balanced, rows / (labels * rows of the label). For single labels; evaluation is not weighted.",
    )
    balanced_sampling: bool = key(
        False, "Draw all labels equally often, so that the rows of rare ones repeat within an epoch. For single labels."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MLMRecipe(TrainerRecipe):
    """`align mlm`: continued pre-training on plain text: of an encoder (BERT-like) by masked language modeling, of a T5-like
    encoder-decoder by span corruption, of a BART-like one by text infilling."""

    model_name_or_path: str = required(
        "Encoder to continue training; without a masked-language-model head it gets a new one."
    )
    learning_rate: float = key(5e-5, "Peak learning rate.", ABOVE_0)
    mlm_probability: float = key(
        0.15,
        "Share of the tokens to predict: 80% of them masked, 10% replaced by a random token, 10% unchanged. Of an "
        "encoder-decoder: share of the tokens in spans, each of which a sentinel (T5) or a mask token (BART) replaces.",
        ABOVE_0_BELOW_1,
    )
    whole_word_mask: bool = key(
        False, "Of an encoder: mask all tokens of a word or none; the share of tokens is the same."
    )
    next_sentence_prediction: bool = key(
        False,
        "Of an encoder with such a head (BERT): a row is two pieces, in half of the rows the second of another text, and the model "
        "also predicts which (arXiv 1810.04805). Its loss is added to that of the masked tokens.",
    )
    mean_noise_span_length: float = key(
        MEAN_NOISE_SPAN_LENGTH,
        "Of an encoder-decoder: mean length of the spans, in tokens (arXiv 1910.10683, 1910.13461).",
        AT_LEAST_1,
    )
    max_length: int = key(
        512,
        "Maximum tokens of a piece, with special tokens: longer texts are split into even pieces, none of which is "
        "dropped.",
        MAX_LENGTH,
    )


def check_classify_rules(recipe: ClassifyRecipe, where: Where) -> None:
    """The rules between the keys of `align classify`.

    Raises:
        UserError: names the first broken rule.
    """
    kinds = [recipe.problem_type] if recipe.problem_type else list(CLASSIFY_METRICS)
    names = dict.fromkeys(name for kind in kinds for name in CLASSIFY_METRICS[kind])
    check_trainer_rules(recipe, where, ("loss", *names))
    if recipe.class_weights == {}:
        raise UserError(
            f"{where('class_weights')}: expected balanced or a mapping of labels to numbers, got an empty one"
        )
    for label, weight in recipe.class_weights.items() if isinstance(recipe.class_weights, dict) else ():
        if not ABOVE_0.holds(weight):
            raise UserError(f"{where('class_weights')}.{label}: expected a number above 0, got {weight:g}")
    if recipe.balanced_sampling and recipe.class_weights == "balanced":
        raise UserError(f"{where('class_weights')}: balanced_sampling evens out the labels already; keep one of them")
    if recipe.balanced_sampling and recipe.train_sampling_strategy == "group_by_length":
        raise UserError(
            f"{where('train_sampling_strategy')}: balanced_sampling has an order of its own; leave group_by_length out"
        )


def check_mlm_rules(recipe: MLMRecipe, where: Where) -> None:
    """The rules between the keys of `align mlm`.

    Raises:
        UserError: names the first broken rule.
    """
    check_trainer_rules(recipe, where, (*MLM_METRICS, *NSP_METRICS * recipe.next_sentence_prediction))
