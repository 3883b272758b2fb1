"""Stages that measure and do not train (`evaluate`, `bon`, `judge-reward`); they are finished once `results.json` exists."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.config.paths import dataset_keys
from align.config.recipe import Recipe
from align.config.stages import stage_of
from align.errors import BadFile, OtherRun
from align.models.inspect_folder import inspect_inputs
from align.runs.files import write_json
from align.runs.fingerprints import row_fingerprints
from align.runs.output_folder import PARTS, RESULTS, claim, clear_finished
from align.runs.own_files import RUN, owned
from align.runs.records import Record, fingerprint_of, read_record
from align.runs.run_record import identity, without_data
from align.runs.same_run import changes, check_same, input_changes
from align.runs.schemas import RUN_RECORD
from align.terminal import say

UNFINISHED = "an unfinished run that differs"


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


def print_finished(recipe: Recipe, words: str) -> None:
    """Print that the results exist, and delete what only an unfinished run needs."""
    if _is_main():
        clear_finished(recipe.output_dir)
    say(f"{recipe.output_dir}: {words}")


def claim_measurement(recipe: Recipe, again: str) -> dict[str, Any]:
    """Check the models' files, claim the output folder, and return the run's identity, as it was when the run began.

    Args:
        again: as for `finished_measurement`.

    Raises:
        UserError: the first mistake; nothing is written then.
    """
    inspect_inputs(recipe)
    this = unfinished_measurement(recipe, again) or identity(recipe)
    if _is_main():
        claim(recipe.output_dir, this, resuming=False)
    return this


def unfinished_measurement(recipe: Recipe, again: str) -> dict[str, Any] | None:
    """What a killed run in `output_dir` began with that has finished a part of its work; None if there is none.

    Rows are compared once they are loaded, by `check_measured_rows`. Writes nothing.

    Raises:
        OtherRun: it is of another recipe, or of inputs that have changed since, or its record is damaged.
    """
    folder = Path(recipe.output_dir)
    parts = any(part.is_file() and part.stat().st_size for part in folder.glob(f"{PARTS}/*"))
    if not parts or not os.path.lexists(folder / RUN):
        return None
    try:
        found = read_record(folder / RUN, RUN_RECORD)
    except BadFile as error:
        raise OtherRun(
            f"{error}. It says what {folder / PARTS} was made from: put it back from a copy, or delete the folder to {again}."
        ) from None
    if found["stage"] != stage_of(recipe).name:
        return None  # `claim` refuses it
    mine = identity(recipe, found.get("sums"))
    mine["inputs"] = without_data(mine["inputs"], recipe)
    words = check_same(changes(found, mine, recipe), recipe, UNFINISHED, again)
    accepted = found.get("accepted", [])
    if new := [each for each in words if not any(each in earlier["changes"] for earlier in accepted)]:
        accepted = [*accepted, {"at": PARTS, "changes": new}]
    accepted_entry = {"accepted": accepted} if accepted else {}
    return {**{name: value for name, value in found.items() if name != "files"}, **accepted_entry}


def check_measured_rows(recipe: Recipe, found: Mapping[str, Any], report: Mapping[str, Any], again: str) -> None:
    """Check that the rows are those that a killed run began with. No recipe can accept others: its parts are of them.

    Args:
        found: from `unfinished_measurement`.
        report: of the rows, from `align.data.load`.

    Raises:
        OtherRun: they are not.
    """
    different = input_changes(found, row_fingerprints(report), recipe)
    check_same(different, recipe, UNFINISHED, again, never=dataset_keys(type(recipe)))


def record_rows(recipe: Recipe, this: dict[str, Any], report: Mapping[str, Any], again: str) -> dict[str, Any]:
    """The identity of a run with its rows, which are checked and written into `run.json` on rank 0.

    Raises:
        OtherRun: the run is resumed, and they are not those that it began with.
    """
    if _is_main():
        check_measured_rows(recipe, this, report, again)
        for place, kinds in row_fingerprints(report).items():
            this["inputs"].setdefault(place, {}).update(kinds)
        this["fingerprint"] = fingerprint_of(this)
        write_json(Path(recipe.output_dir) / RUN, {**this, "files": sorted(owned(recipe.output_dir))})
    return this


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0  # before ranks are connected
