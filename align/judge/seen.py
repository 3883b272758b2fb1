"""Pairs that a reward model of ours was trained on, found by what its stage recorded of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.ensemble import JUDGE, NUMBERED
from align.data.rows import Preference
from align.data.sources import files_of
from align.data.split import is_for_judge, is_held_out
from align.runs.own_files import MANIFEST
from align.runs.records import COUNT, NUMBER, TEXT, Kind, Record, check_record, list_of, read_record
from align.runs.schemas import MANIFEST_RECORD

TRUTH = Kind("true or false", lambda value: isinstance(value, bool))
RECIPE = Record({"output_dir": TEXT, "seed": COUNT, "eval_fraction": NUMBER}, {"train_judge": TRUTH})
SOURCES = list_of(
    "a list of mappings with texts `fingerprint` and `used_for`",
    lambda each: isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("fingerprint", "used_for")),
)


def pairs_trained_on(folder: str, pairs: Sequence[Preference], report: Mapping[str, Any]) -> int:
    """How many of the pairs are of a source that the model in `folder` was trained on, and not held out there.

    A source is known by its rows, under whatever name. 0 for models of others, which have no record.

    Args:
        report: of the pairs, from `align.data.load`.

    Raises:
        UserError: the record cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return 0
    recipe, recorded = _read(path)
    trained = {each["fingerprint"] for each in recorded if each["used_for"] == "training"}
    sources = report["sources"]
    evaluated = [each for each in sources if each["used_for"] == "evaluation"] or sources
    names = {
        name
        for each in evaluated
        if each["fingerprint"] in trained
        for name in files_of(each["source"]) or [each["source"]]
    }

    # The seed of the stage split the rows; members and the judge, which are in folders inside it, have seeds of their own.
    inner, seed, fraction = Path(recipe["output_dir"]).name, recipe["seed"], recipe["eval_fraction"]
    stage = Path(folder).resolve().parent / MANIFEST
    if member := NUMBERED.fullmatch(inner):
        seed -= int(member[1]) - 1
    elif inner == JUDGE and recipe.get("train_judge"):
        if stage.is_file():
            seed = _read(stage)[0]["seed"]
        else:
            fraction = 0.0  # it was moved, and which pairs were held out is not known

    def was_trained_on(row: Preference) -> bool:
        place = row.where.rpartition(":")[0]  # without the row's number; of the hub with the split
        if place not in names and place.rpartition(":")[0] not in names:
            return False
        if not recipe.get("eval_dataset") and is_held_out(row, fraction, seed):
            return False
        return not recipe.get("train_judge") or is_for_judge(row) == (inner == JUDGE)

    return sum(map(was_trained_on, pairs))


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A stage's recipe and the sources of its rows, from its record."""
    record = read_record(path, MANIFEST_RECORD)
    data = record.get("data", {})
    check_record(record["recipe"], RECIPE, f"{path}: recipe")
    check_record(data, Record({}, {"sources": SOURCES}), f"{path}: data")
    return record["recipe"], data.get("sources", [])
