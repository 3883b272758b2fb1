"""Stages that measure and train nothing (`evaluate`, `bon`, `judge-reward`): `results.json` is the mark of a finished one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.config.recipe import Recipe
from align.models.inspect_folder import inspect_inputs
from align.runs.output_folder import RESULTS, claim, clear_finished
from align.runs.records import Record, read_record
from align.runs.run_record import identity
from align.runs.same_run import changes, check_same
from align.terminal import say


def finished_measurement(
    recipe: Recipe,
    record: Record,
    again: str,
    identity_of: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda results: results,
) -> dict[str, Any] | None:
    """The content of `results.json` in `output_dir`; None when there is none.

    Args:
        record: what it holds.
        again: what a user may want to do instead, "evaluate again".
        identity_of: the identity in the results, of older versions too.

    Raises:
        UserError: it is damaged, of another recipe, or a model, the data or a function has changed since.
    """
    file = Path(recipe.output_dir) / RESULTS
    if not os.path.lexists(file):
        return None
    results = read_record(file, record)
    different = changes(identity_of(results), identity(recipe, results.get("sums")), recipe)
    check_same(different, recipe, "results that differ", again)
    return results


def say_finished(recipe: Recipe, words: str) -> None:
    """Say that the results are there, and remove what only an unfinished run needs."""
    if _is_main():
        clear_finished(recipe.output_dir)
    say(f"{recipe.output_dir}: {words}")


def claim_measurement(recipe: Recipe) -> dict[str, Any]:
    """Check the models' files, claim the output folder, and return the run's identity.

    Raises:
        UserError: the first mistake; nothing is written then.
    """
    inspect_inputs(recipe)
    this = identity(recipe)
    if _is_main():
        claim(recipe.output_dir, this, resuming=False)
    return this


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0  # before ranks are connected
