"""Schemas of a run's records, by which `align.runs.records` reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.runs.own_files import MANIFEST, RUN
from align.runs.records import (
    CHECKPOINT,
    COUNT,
    MAPPING,
    NUMBER,
    TEXT,
    Kind,
    Record,
    is_bare_name,
    is_count,
    is_inner_path,
    is_number,
    mapping_of,
)

COMPLETE = "complete.json"
WANDB_RUN = "wandb_run.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
WARNINGS = "warnings"  # name of the table in samples.jsonl that has what the run warned of
BEST = "best"  # folder of PPO's best policy
SUMS = ".sums"  # file in it
OF_TOKENIZER = ("vocabulary", "bos_token_id", "eos_token_id", "chat_template")
RECORD_FILES = (MANIFEST, RUN, WANDB_RUN, METRICS, SAMPLES)


def _is_sum(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_sums(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_inputs(value: Any) -> bool:
    """Fingerprints by place in the recipe: of each kind, text or sums by file; in schema 0 the digest of a manifest."""
    return isinstance(value, dict) and all(
        _is_text(kinds)
        or (isinstance(kinds, dict) and all(_is_text(each) or _is_sums(each) for each in kinds.values()))
        for kinds in value.values()
    )


def _are_results(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("table", []), list):
        return False
    samples, verdict = value.get("samples", []), value.get("verdict", [])
    return (
        isinstance(samples, list)
        and isinstance(verdict, list)
        and all(map(_is_text, verdict))
        and all(isinstance(each, dict) for each in samples)
        and all(
            isinstance(row, list)
            and len(row) == 3
            and _is_text(row[0])
            and all(each is None or is_number(each) for each in row[1:])
            for row in value.get("table", [])
        )
    )


def _is_tokenizer(value: Any) -> bool:
    return isinstance(value, dict) and all(name in value for name in OF_TOKENIZER)


def _is_score_check(value: Any) -> bool:
    """Token ids of pairs of sequences, and their scores."""
    if not isinstance(value, dict):
        return False
    ids, scores = value.get("ids"), value.get("scores")
    return (
        isinstance(ids, list)
        and isinstance(scores, list)
        and len(ids) == len(scores) > 0
        and all(isinstance(each, list) and each and all(map(is_count, each)) for each in ids)
        and all(map(is_number, scores))
    )


def _is_known_file(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 5 and all(map(is_count, value[:4])) and _is_text(value[4])


def _are_accepted(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("changes"), list) for each in value
    )


IDENTITY: Mapping[str, Kind] = {"stage": TEXT, "recipe": MAPPING, "inputs": Kind("fingerprints by place", _is_inputs)}
OF_IDENTITY: Mapping[str, Kind] = {
    "schema_version": COUNT,
    "fingerprint": TEXT,
    "accepted": Kind("a list of mappings with a list `changes`", _are_accepted),
    "files": Kind(
        "a list of paths in the folder", lambda value: isinstance(value, list) and all(map(is_inner_path, value))
    ),
    "sums": mapping_of("a mapping of paths to inode, size, two times and SHA-256", _is_text, _is_known_file),
}
RUN_RECORD = Record(IDENTITY, OF_IDENTITY)
MANIFEST_RECORD = Record(
    {
        **IDENTITY,
        "tokenizer": Kind(f"a mapping with {', '.join(OF_TOKENIZER)}", _is_tokenizer),
        "results": Kind("a mapping whose `table` has rows of a measure and two numbers", _are_results),
    },
    {
        **OF_IDENTITY,
        "chat_template_date": TEXT,
        "data": MAPPING,
        "versions": mapping_of("a mapping of packages to versions", _is_text, _is_text),
        "head": TEXT,
        "score_mean": NUMBER,
        "score_std": NUMBER,
        "score_check": Kind("lists `ids`, of token ids, and `scores`, of as many numbers", _is_score_check),
    },
    "restore the file from a copy, or run the stage that writes the folder again",
)
FILE_SUMS = mapping_of("a mapping of paths inside the folder to size and CRC-32", is_inner_path, _is_sum)
SUMS_RECORD = Record({"files": FILE_SUMS})
COMPLETE_RECORD = Record(
    {
        "step": COUNT,
        "layout": TEXT,
        "records": mapping_of(
            "a mapping of names of files to size and CRC-32", is_bare_name, lambda each: _is_sum(each) or is_count(each)
        ),
        "files": FILE_SUMS,
        "digest": TEXT,
    },
    {"version": COUNT, "best_checkpoint": CHECKPOINT, "progress": MAPPING},
)
WANDB_RUN_RECORD = Record(
    {
        "id": Kind(
            "the id of a W&B run", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w-]{1,64}", value))
        ),
        "processes": COUNT,
    },
    remedy="delete the file, and a new W&B run begins",
)
