"""Retention rows: examples of what the base model could do, held out to measure forgetting, or replayed in training.

The rows of `retention` are split like the training rows: `eval_fraction` of their openings are measured and never trained
on, even if another source contains them too; replay draws from the rest. So runs with and without replay are measured on
the same rows.
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
    """Retention rows to evaluate on and those that may be replayed; no prompt is in both."""

    evaluation: list[Demonstration]
    replayable: list[Demonstration]


def load_with_retention(recipe: SFTRecipe) -> tuple[Rows, Retention]:
    """The recipe's training and evaluation rows, and its retention rows (empty without `retention`).

    Training rows with a prompt on which retention is measured are dropped and counted, and rows with a prompt of the
    evaluation rows are not replayed.

    Raises:
        UserError: as `load_rows`, or no row is left to train on, to measure or to replay.
    """
    rows = load_rows(DataSettings.from_recipe(recipe), Demonstration)
    if not recipe.retention:
        return rows, Retention([], [])
    loaded = _load_retention(recipe)
    evaluation, replayable = loaded.evaluation, loaded.train
    if not recipe.eval_fraction:
        evaluation = seeded_sample(loaded.train, recipe.max_eval_rows or len(loaded.train), f"{recipe.seed} retention")
        replayable = []
    train = without_prompts(rows.train, prompts_of(evaluation))
    if not train:
        raise UserError(
            "retention: every training row has a prompt that retention is measured on; use different rows for `retention`."
        )
    replayable = without_prompts(replayable, prompts_of(rows.evaluation))
    if recipe.replay_fraction and not replayable:
        raise UserError("replay_fraction: no row of retention is left to replay; give more, or lower `eval_fraction`.")
    report = {
        **rows.report,
        "sources": [*rows.report["sources"], *map(_retention_source, loaded.report["sources"])],
        "train_rows": len(train),
        "train_rows_dropped_as_retention": len(rows.train) - len(train),
        "retention": {
            "measured_rows": len(evaluation),
            "replayable_rows": len(replayable),
            "bad_rows": loaded.report["bad_rows"],
            "duplicates": loaded.report["duplicates"],
        },
    }
    return Rows(train, rows.evaluation, report), Retention(evaluation, replayable)


def _load_retention(recipe: SFTRecipe) -> Rows:
    """The rows of `retention`, split by `eval_fraction`; with `eval_fraction: 0` all are in `train`, each once."""
    sources = recipe.retention
    if not recipe.eval_fraction:
        sources = [dataclasses.replace(source, weight=1.0) for source in sources]
    settings = DataSettings(
        train_dataset=sources,
        eval_fraction=recipe.eval_fraction,
        max_eval_rows=recipe.max_eval_rows,
        on_bad_row=recipe.on_bad_row,
        seed=recipe.seed,
    )
    try:
        return load_rows(settings, Demonstration, "retention")
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


def _retention_source(source: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in source.items() if name != "train_rows"}, "used_for": "retention"}


def replay_count(replay_fraction: float, rows: int) -> int:
    """How many rows, added to `rows` others, make up `replay_fraction` of the total; at least 1 if the fraction is not 0."""
    return max(1, round(replay_fraction * rows / (1 - replay_fraction))) if replay_fraction else 0


def with_replay(
    training: Dataset,
    replayable: Sequence[Demonstration],
    replay_fraction: float,
    seed: int,
    tokenize: Callable[[Sequence[Demonstration]], tuple[Dataset, Report]],
) -> tuple[Dataset, Report]:
    """The training rows, followed by replayed ones that make up `replay_fraction` of all; and the bad rows among these.

    Replayed rows are a seeded sample, the same in every epoch; they repeat only if there are too few.
    """
    if not (count := replay_count(replay_fraction, len(training))):
        return training, {}
    rows, bad = tokenize(seeded_sample(replayable, count, f"{seed} replay"))
    order = list(range(len(rows)))
    again = seeded_sample(order, count % len(rows), f"{seed} replay again")
    return concatenate_datasets([training, rows.select(order * (count // len(rows)) + again)]), bad
