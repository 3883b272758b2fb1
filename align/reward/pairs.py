"""The preference pairs of the reward stage, loaded and tokenized once for all models that are trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset
from torch import Tensor

from align.config.reward import RewardRecipe
from align.data.load import DataSettings, Rows, load_halves, load_rows
from align.data.rows import Preference, is_tie
from align.data.tokenize import check_margins, tokenize_preferences
from align.errors import UserError
from align.models.context_length import check_rows_fit
from align.models.model_types import is_encoder_decoder
from align.reward.evaluation import true_margins
from align.reward.inputs import RewardInputs


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows, and the same in token ids, without those that were skipped.

    Attributes:
        evaluation: held-out pairs; None without any.
        trained_rows, held_out_rows: the row of each pair.
        margins: `true_margins` of them.
        skipped: counts of bad rows by reason, by `train` and `evaluation`.
    """

    rows: Rows
    train: Dataset
    evaluation: Dataset | None
    trained_rows: list[Preference]
    held_out_rows: list[Preference]
    margins: Tensor | None
    skipped: dict[str, Any]


def load_pairs(recipe: RewardRecipe, inputs: RewardInputs) -> tuple[Pairs, Pairs | None]:
    """Load, check, split and tokenize the pairs: those of the reward model, and with `train_judge` those of its judge.

    Raises:
        UserError: rows that cannot be used.
    """
    parts = load_preferences(recipe)
    tokenize = partial(
        tokenize_preferences,
        tokenizer=inputs.tokenizer,
        max_length=recipe.max_length,
        on_bad_row=recipe.on_bad_row,
        is_encoder=inputs.is_encoder,
        ends_once=is_encoder_decoder(inputs.config),
    )
    trained: list[list[Preference]] = [[] for _ in parts]
    train_rows = [tokenize(rows.train, kept=kept) for rows, kept in zip(parts, trained, strict=True)]
    for pairs, _ in train_rows:
        check_rows_fit(chain(pairs["chosen_ids"], pairs["rejected_ids"]), inputs.config)
    skipped = {}
    held_out: list[Preference] = []
    eval_rows = margins = None
    if parts[0].evaluation:
        eval_rows, skipped["evaluation"] = tokenize(parts[0].evaluation, kept=held_out)
        check_rows_fit(chain(eval_rows["chosen_ids"], eval_rows["rejected_ids"]), inputs.config)
        check_ties(held_out)
        margins = true_margins(inputs, held_out)
    reward, *judge = (
        Pairs(rows, pairs, eval_rows, kept, held_out, margins, {"train": bad, **skipped})
        for rows, (pairs, bad), kept in zip(parts, train_rows, trained, strict=True)
    )
    return reward, judge[0] if judge else None


def check_ties(held_out: Sequence[Preference]) -> None:
    """Check that not all held-out pairs are ties, of which there is no accuracy.

    Raises:
        UserError: they are.
    """
    if held_out and all(map(is_tie, held_out)):
        raise UserError("every pair that is held out is a tie; add pairs of which one response is better.")


def load_preferences(recipe: RewardRecipe) -> Sequence[Rows]:
    """The rows of the reward model, and with `train_judge` those of its judge.

    Raises:
        UserError: rows that cannot be used.
    """
    settings = DataSettings.from_recipe(recipe)
    parts = load_halves(settings, Preference) if recipe.train_judge else [load_rows(settings, Preference)]
    check_margins((*(rows.train for rows in parts), parts[0].evaluation), recipe.on_bad_row)
    return parts


def describe_halves(reward: int, judge: int) -> str:
    """A line on the numbers of pairs of the two models."""
    return (
        f"train_judge: {reward} pairs for the reward model and {judge} for its judge; no prompt is in both, nor one that differs in case, "
        "white space and punctuation alone"
    )
