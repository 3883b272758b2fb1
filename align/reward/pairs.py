"""The preference pairs of the reward stage, loaded and tokenized once for all models that are trained on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset
from torch import Tensor

from align.config.reward import RewardRecipe
from align.data.load import DataSettings, Rows, load_rows
from align.data.rows import Preference
from align.data.tokenize import check_margins, tokenize_preferences
from align.errors import UserError
from align.models.context_length import check_rows_fit
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


def load_pairs(recipe: RewardRecipe, inputs: RewardInputs) -> Pairs:
    """Load, check, split and tokenize the pairs.

    Raises:
        UserError: rows that cannot be used.
    """
    rows = load_rows(DataSettings.from_recipe(recipe), Preference)
    check_margins((rows.train, rows.evaluation), recipe.on_bad_row)
    tokenize = partial(
        tokenize_preferences,
        tokenizer=inputs.tokenizer,
        max_length=recipe.max_length,
        on_bad_row=recipe.on_bad_row,
        is_encoder=inputs.is_encoder,
    )
    skipped = {}
    trained: list[Preference] = []
    held_out: list[Preference] = []
    train_rows, skipped["train"] = tokenize(rows.train, kept=trained)
    check_rows_fit(chain(train_rows["chosen_ids"], train_rows["rejected_ids"]), inputs.config)
    eval_rows = margins = None
    if rows.evaluation:
        eval_rows, skipped["evaluation"] = tokenize(rows.evaluation, kept=held_out)
        check_rows_fit(chain(eval_rows["chosen_ids"], eval_rows["rejected_ids"]), inputs.config)
        if "tie" in eval_rows.column_names and all(eval_rows["tie"][:]):
            raise UserError("every pair that is held out is a tie; add pairs of which one response is better.")
        margins = true_margins(inputs, held_out)
    return Pairs(rows, train_rows, eval_rows, trained, held_out, margins, skipped)
