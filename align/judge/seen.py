"""Pairs that a reward model of ours was trained on, found by what its stage recorded of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.ensemble import JUDGE, NUMBERED
from align.data.rows import Preference
from align.data.split import is_for_judge, is_held_out
from align.runs.own_files import MANIFEST
from align.runs.records import read_record
from align.runs.schemas import MANIFEST_RECORD


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
    record = read_record(path, MANIFEST_RECORD)
    recipe = record["recipe"]
    trained = {each["fingerprint"] for each in record["data"].get("sources", ()) if each.get("used_for") == "training"}
    sources = report["sources"]
    evaluated = [each for each in sources if each["used_for"] == "evaluation"] or sources
    names = tuple(each["source"] for each in evaluated if each["fingerprint"] in trained)

    # Members and judges are in a folder of the stage whose seed split the rows; their own seed is another.
    stage = Path(folder).resolve().parent / MANIFEST
    inner = Path(recipe.get("output_dir", "")).name
    split = (
        read_record(stage, MANIFEST_RECORD)["recipe"]
        if (inner == JUDGE or NUMBERED.fullmatch(inner)) and stage.is_file()
        else recipe
    )

    def was_trained_on(row: Preference) -> bool:
        if not row.where.startswith(names):
            return False
        if not recipe.get("eval_dataset") and is_held_out(row, split.get("eval_fraction", 0.0), split.get("seed", 0)):
            return False
        halved = recipe.get("train_judge", False)
        return not halved or is_for_judge(row) == (inner == JUDGE)

    return sum(map(was_trained_on, pairs))
