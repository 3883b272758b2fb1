"""What a model forgets while it is fine-tuned: rows of what it could do before, replayed and held out of training.

The rows of `retention` are split as the training rows are: `eval_fraction` of their openings are measured, and never
trained on, whichever source they also stand in; replay draws from the rest. So runs with and without replay are
measured on the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets

from align.config.sft import SFTRecipe
from align.data.load import DataSettings, Rows, load_rows
from align.data.mixture import seeded_sample
from align.data.rows import Demonstration
from align.data.split import NoHeldOutRows, prompts_of, without_prompts
from align.data.tokenize import Report
from align.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """Rows that are measured, and rows to replay: no prompt is in both."""

    measured: list[Demonstration]
    replayable: list[Demonstration]


def load_with_retention(recipe: SFTRecipe) -> tuple[Rows, Retention]:
    """The recipe's rows, and those of its `retention`, both empty without it.

    Training rows with a prompt that is measured for retention are dropped and counted, and rows with a prompt that is
    held out are not replayed.

    Raises:
        UserError: as `load_rows`, or no row is left to train on, to measure or to replay.
    """
    rows = load_rows(DataSettings.from_recipe(recipe), Demonstration)
    if not recipe.retention:
        return rows, Retention([], [])
    sources = recipe.retention
    if not recipe.eval_fraction:  # all are measured, each once
        sources = [dataclasses.replace(source, weight=1.0) for source in sources]
    settings = DataSettings(
        train_dataset=sources,
        eval_fraction=recipe.eval_fraction,
        max_eval_rows=recipe.max_eval_rows,
        on_bad_row=recipe.on_bad_row,
        seed=recipe.seed,
    )
    try:
        found = load_rows(settings, Demonstration)
    except NoHeldOutRows as error:
        instead = (
            "" if recipe.replay_fraction else ", or measure all of them: `eval_fraction: 0` beside an `eval_dataset`"
        )
        raise UserError(
            f"retention: `eval_fraction` ({recipe.eval_fraction:g}) of its prompts are measured, and that came to none; name "
            f"more rows or raise eval_fraction{instead}."
        ) from error
    except UserError as error:
        raise UserError(f"retention, whose rows are split as those of train_dataset: {error}") from error
    measured, replayable = found.evaluation, found.train
    if not recipe.eval_fraction:
        measured, replayable = (
            seeded_sample(replayable, recipe.max_eval_rows or len(replayable), f"{recipe.seed} retention"),
            [],
        )
    train = without_prompts(rows.train, prompts_of(measured))
    if not train:
        raise UserError(
            "retention: every training row has a prompt that is measured here; name other rows than those that are trained."
        )
    replayable = without_prompts(replayable, prompts_of(rows.evaluation))
    if recipe.replay_fraction and not replayable:
        raise UserError("replay_fraction: no row of retention is left to replay; give more, or lower `eval_fraction`.")
    report = {
        **rows.report,
        "sources": [*rows.report["sources"], *map(_described, found.report["sources"])],
        "train_rows": len(train),
        "train_rows_dropped_as_retention": len(rows.train) - len(train),
        "retention": {
            "measured_rows": len(measured),
            "replayable_rows": len(replayable),
            "bad_rows": found.report["bad_rows"],
            "duplicates": found.report["duplicates"],
        },
    }
    return Rows(train, rows.evaluation, report), Retention(measured, replayable)


def _described(source: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in source.items() if name != "train_rows"}, "used_for": "retention"}


def replay_count(fraction: float, rows: int) -> int:
    """How many rows beside `rows` others make up `fraction` of all of them; at least one, if there are to be any."""
    return max(1, round(fraction * rows / (1 - fraction))) if fraction else 0


def with_replay(
    training: Dataset,
    replayable: Sequence[Demonstration],
    replay_fraction: float,
    seed: int,
    tokenize: Callable[[Sequence[Demonstration]], tuple[Dataset, Report]],
) -> tuple[Dataset, Report]:
    """The training rows followed by replayed ones, `replay_fraction` of all; and the bad rows among the latter by reason.

    A seeded sample is replayed, the same rows in every epoch. Rows are used more than once only when there are too few.
    """
    if not (count := replay_count(replay_fraction, len(training))):
        return training, {}
    rows, bad = tokenize(seeded_sample(replayable, count, f"{seed} replay"))
    order = list(range(len(rows)))
    again = seeded_sample(order, count % len(rows), f"{seed} replay again")
    return concatenate_datasets([training, rows.select(order * (count // len(rows)) + again)]), bad
