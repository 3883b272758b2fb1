"""Keys of `align token-classification` and `align question-answering`."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.base import TrainerRecipe, check_trainer_rules
from align.config.keys import AT_LEAST_0, AT_LEAST_1, MAX_LENGTH, Where, key, required
from align.errors import UserError

TAG_METRICS = ("accuracy", "precision", "recall", "f1", "f1_low", "f1_high", "macro_f1")
ANSWER_METRICS = ("exact_match", "exact_match_low", "exact_match_high", "f1", "f1_low", "f1_high", "accuracy")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClassificationRecipe(TrainerRecipe):
    """`align token-classification`: labels inside a text, such as names, from an encoder or a decoder."""

    model_name_or_path: str = required("Encoder (BERT-like) or decoder; it gets a head that labels each token.")
    label_names: list[str] = key(
        [], "Names of the tags, in the order of their ids, where rows have `tags` in ids: [O, B-PER, I-PER, ...]."
    )
    max_length: int = key(512, "Maximum tokens of a row; longer rows are bad rows.", MAX_LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAnsweringRecipe(TrainerRecipe):
    """`align question-answering`: the answer to a question as a span of a passage, from an encoder."""

    model_name_or_path: str = required("Encoder (BERT-like); it gets a head for the first and last token of an answer.")
    max_length: int = key(
        384,
        "Maximum tokens of question and passage together; longer passages are read in windows that overlap.",
        MAX_LENGTH,
    )
    doc_stride: int = key(128, "Tokens of the passage that a window has in common with the next one.", AT_LEAST_0)
    max_answer_length: int = key(30, "Maximum tokens of a predicted answer.", AT_LEAST_1)


def check_token_classification_rules(recipe: TokenClassificationRecipe, where: Where) -> None:
    """The rules between the keys of `align token-classification`.

    Raises:
        UserError: names the first broken rule.
    """
    check_trainer_rules(recipe, where, ("loss", *TAG_METRICS))
    if len(set(recipe.label_names)) < len(recipe.label_names):
        repeated = next(name for name in recipe.label_names if recipe.label_names.count(name) > 1)
        raise UserError(f"{where('label_names')}: expected different names, got {repeated!r} twice")


def check_question_answering_rules(recipe: QuestionAnsweringRecipe, where: Where) -> None:
    """The rules between the keys of `align question-answering`.

    Raises:
        UserError: names the first broken rule.
    """
    check_trainer_rules(recipe, where, ("loss", *ANSWER_METRICS))
    if recipe.doc_stride >= recipe.max_length:
        raise UserError(
            f"{where('doc_stride')}: expected less than max_length ({recipe.max_length}), so that each window goes on, got "
            f"{recipe.doc_stride}"
        )
