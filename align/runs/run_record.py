"""`run.json`: what an unfinished run began with, and whether that is still the same."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.base import StageRecipe
from align.config.ensemble import JUDGE
from align.config.evaluate import EvaluateRecipe
from align.config.paths import dataset_keys
from align.config.ppo import PPORecipe
from align.config.recipe import Recipe
from align.config.stages import input_models, stage_of
from align.errors import BadFile, OtherRun, UserError
from align.runs.checkpoint import has_progress
from align.runs.files import digest, write_json
from align.runs.fingerprints import FileSums, Inputs, input_fingerprints, row_fingerprints
from align.runs.own_files import MANIFEST, RUN, owned
from align.runs.records import SCHEMA_VERSION, fingerprint_of, read_record
from align.runs.same_run import changes, check_same, input_changes
from align.runs.schemas import BEST, COMPLETE, MANIFEST_RECORD, METRICS, RUN_RECORD, SAMPLES, SUMS, SUMS_RECORD


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a finished stage in `folder`, or None for a model that `align` did not make.

    Raises:
        BadFile: it is damaged.
        UserError: the folder holds a stage that was started and not finished, or a newer version's manifest.
    """
    manifest = Path(folder) / MANIFEST
    if os.path.lexists(manifest):
        return read_record(manifest, MANIFEST_RECORD, follow_links=True)
    if (Path(folder) / RUN).is_file():
        raise UserError(f"{folder}: the stage that writes this folder has not finished; run it again to resume it.")
    return None


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return plain


def identity(recipe: Recipe, known: Mapping[str, list[Any]] | None = None) -> dict[str, Any]:
    """The identity of a run: stage, recipe, and fingerprints of the inputs, which only rank 0 computes.

    Args:
        known: `sums` of an earlier record, so that files that have not changed since are not read again.

    Raises:
        UserError: an input is not finished, or cannot be read.
    """
    stage = stage_of(recipe).name
    plain = recipe_dict(recipe)
    inputs: Inputs = {}
    sums = FileSums(dict(known or {}))
    if int(os.environ.get("RANK", "0")) == 0:
        models = input_models(recipe)
        if isinstance(recipe, PPORecipe) and recipe.method != "full":  # by which reward models may score
            adapters = {place: f"{path}/adapter" for place, path in models.items() if "reward_model" in place}
            models |= {f"{place}.adapter": path for place, path in adapters.items() if Path(path).is_dir()}
        if isinstance(recipe, EvaluateRecipe):
            plain["models"] = [list(each) for each in models.items()]  # a list, since the order counts
            models = {f"models.{name}": path for name, path in models.items()}
            if recipe.templates:  # records from before the key have none
                plain["templates"] = [list(each) for each in recipe.templates.items()]
        inputs = input_fingerprints(recipe, models, sums)
        for place, path in models.items():
            if manifest := read_manifest(path):
                content = {name: value for name, value in manifest.items() if name not in ("sums", "files")}
                inputs.setdefault(place, {})["manifest"] = digest(content)  # without what no result depends on
    found = {"stage": stage, "recipe": plain, "inputs": inputs}
    return {"schema_version": SCHEMA_VERSION, **found, "fingerprint": fingerprint_of(found), "sums": sums.known}


def without_data(inputs: Inputs, recipe: Recipe) -> Inputs:
    """Fingerprints but for those of data files: of a run that goes on, rows are compared once they are loaded."""
    data = dataset_keys(type(recipe))
    return {place: kinds for place, kinds in inputs.items() if place.split("[")[0] not in data}


def read_run(recipe: StageRecipe) -> dict[str, Any] | None:
    """`run.json` of the run in `output_dir`; None if it is lost or damaged."""
    try:
        return read_record(Path(recipe.output_dir) / RUN, RUN_RECORD)
    except BadFile:
        return None


def required_run(recipe: StageRecipe) -> dict[str, Any] | None:
    """`run.json` of the run in `output_dir`; None if there is no such run.

    With `accept_changes: [run.json]`, a lost or damaged one is written anew, from the checkpoints and this recipe.

    Raises:
        OtherRun: there are checkpoints, and it is lost or damaged.
    """
    folder = Path(recipe.output_dir)
    checkpoints = [path.parent.name for path in sorted(folder.glob(f"checkpoint-*/{COMPLETE}"))]
    try:
        if os.path.lexists(folder / RUN):
            return read_record(folder / RUN, RUN_RECORD)
        if not checkpoints:
            return None
        raise BadFile(f"{folder / RUN}: is missing")
    except BadFile as error:
        if RUN not in recipe.accept_changes:
            raise OtherRun(
                f"{error}. It says what the checkpoints in {folder} were trained on, and which files are the run's: put it "
                f"back from a copy, or, if nothing has changed since, add `accept_changes: [{RUN}]` to resume with this "
                "recipe, or delete the folder to start over."
            ) from None
    found = identity(recipe)
    if int(os.environ.get("RANK", "0")) == 0:
        mine = [*checkpoints, METRICS, SAMPLES, "untrained", JUDGE, *_best_files(folder)]
        accepted = [
            {"at": checkpoints[-1] if checkpoints else "the beginning", "changes": [f"{RUN} was lost or damaged"]}
        ]
        files = [name for name in mine if os.path.lexists(folder / name)]
        write_json(folder / RUN, {**found, "accepted": accepted, "files": files})
    return found


def _best_files(folder: Path) -> list[str]:
    """The files of `best/`, by its own sums."""
    try:
        return [f"{BEST}/{name}" for name in (SUMS, *read_record(folder / BEST / SUMS, SUMS_RECORD)["files"])]
    except BadFile:
        return []


def check_rows(recipe: StageRecipe, report: Mapping[str, Any]) -> None:
    """Check that the rows are those that the unfinished run in `output_dir` began with. On every rank.

    Args:
        report: of the rows, from `align.data.load`.

    Raises:
        OtherRun: they are not.
    """
    if has_progress(recipe.output_dir) and (found := read_run(recipe)):
        different = input_changes(found, row_fingerprints(report), recipe)
        check_same(different, recipe, "an unfinished run that differs", "start over")


def record_run(recipe: StageRecipe, report: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Write into `run.json` what the run starts from, its rows included, and which changes it accepted. For rank 0."""
    found = read_run(recipe)
    mine = identity(recipe, (found or {}).get("sums"))
    for place, kinds in row_fingerprints(report).items():
        mine["inputs"].setdefault(place, {}).update(kinds)
    mine["fingerprint"] = fingerprint_of(mine)
    if found and has_progress(recipe.output_dir):
        words = [change.description for change in changes(found, mine, recipe)]
        at = checkpoint.name if checkpoint is not None else "the models inside"
        earlier = found.get("accepted", [])
        mine["accepted"] = [*earlier, {"at": at, "changes": words}] if words else earlier
    write_json(Path(recipe.output_dir) / RUN, {**mine, "files": sorted(owned(recipe.output_dir))})
