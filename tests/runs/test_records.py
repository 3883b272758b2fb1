"""The records of a run: what a damaged or odd one ends in."""

from __future__ import annotations

import copy
import json

import pytest

from align.errors import BadFile
from align.runs.records import is_bare_name, is_inner_path, read_record
from align.runs.schemas import COMPLETE_RECORD, WANDB_RUN_RECORD

WHOLE = {
    "step": 4,
    "layout": "1 process at ZeRO 0",
    "best_checkpoint": "checkpoint-2",
    "progress": {},
    "records": {"metrics.jsonl": [120, 5]},
    "files": {"policy/weights.bin": [10, 3]},
    "digest": "0123",
    "mine": [1],
}
OUTSIDE = ["/etc/passwd.jsonl", "../metrics.jsonl", "a/../../b.jsonl", "..", ".", "", "a\\b.jsonl", "a\nb.jsonl", "a\0.jsonl"]  # fmt: skip


def test_a_whole_record_is_read_with_keys_of_its_own(tmp_path):
    (tmp_path / "complete.json").write_text(json.dumps(WHOLE))
    assert read_record(tmp_path / "complete.json", COMPLETE_RECORD) == WHOLE


@pytest.mark.parametrize("name", COMPLETE_RECORD.required)
def test_a_missing_key_is_named(tmp_path, name):
    (tmp_path / "complete.json").write_text(json.dumps({key: value for key, value in WHOLE.items() if key != name}))
    with pytest.raises(BadFile, match=rf"complete.json: `{name}` is missing"):
        read_record(tmp_path / "complete.json", COMPLETE_RECORD)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("step", value) for value in (-1, 1.0, "4", True, None, [4])),
        *(("records", value) for value in ([], None, {"metrics.jsonl": -1}, {"metrics.jsonl": [1.5, 2]}, {"metrics.jsonl": [1]})),
        *(("records", {path: [0, 0]}) for path in OUTSIDE),
        *(("files", {path: [1, 2]}) for path in (*OUTSIDE, "a//b", "/a", "a/")),
        *(("files", {"a": value}) for value in (3, [1], [1, -2], [1, 2, 3], ["1", 2], [True, 2])),
        *(("best_checkpoint", value) for value in ("../checkpoint-2", "checkpoint-", "checkpoint-\u0663", "checkpoint-02", 2)),
        ("progress", []),
        ("layout", 1),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_named(tmp_path, name, value):
    (tmp_path / "complete.json").write_text(json.dumps({**copy.deepcopy(WHOLE), name: value}))
    with pytest.raises(BadFile) as error:
        read_record(tmp_path / "complete.json", COMPLETE_RECORD)
    assert str(error.value).startswith(f"{tmp_path}/complete.json: {name}: expected ")
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"', "{", "", '{"step": 1, "step": 2}'])
def test_what_is_no_mapping_is_refused(tmp_path, content):
    (tmp_path / "complete.json").write_text(content)
    with pytest.raises(BadFile, match=r"complete\.json: "):
        read_record(tmp_path / "complete.json", COMPLETE_RECORD)


def test_the_error_says_what_to_do(tmp_path):
    (tmp_path / "wandb_run.json").write_text('{"id": "../../x", "processes": 1}')
    with pytest.raises(BadFile) as error:
        read_record(tmp_path / "wandb_run.json", WANDB_RUN_RECORD)
    assert str(error.value) == (
        f'{tmp_path}/wandb_run.json: id: expected the id of a W&B run, got "../../x"; delete the file, and a new W&B '
        "run begins."
    )


def test_bare_names():
    assert is_bare_name("metrics.jsonl")
    assert is_bare_name(".hidden \xe9")
    assert not any(map(is_bare_name, [*OUTSIDE, "a/b", "x" * 256, 3, None]))
    assert is_inner_path("a/b/c.pt")
    assert not any(map(is_inner_path, [*OUTSIDE, "a//b", "/a", "a/", "a/./b"]))
