"""A tenth of the campaign, drawn by a fixed seed, in about half a minute of one core; and that it notices what it looks for.

Left to the full campaign: what starts programs that import the libraries anew (`kills outside`, `programs`).
"""

from __future__ import annotations

import re

import pytest

from tests import ranks
from tests.campaign.__main__ import run
from tests.campaign.campaign import all_cases, draw
from tests.campaign.judge import changed, refused, snapshot
from tests.campaign.process import Ended

SEED, FRACTION = 13, 0.1
SLOW = {"kills outside", "programs"}
RUNS = {
    "kills",
    "kills of a rank",
    "damaged files",
    "forged files",
    "altered inputs",
    "users' files",
    "folders",
    "machine",
    "functions",
    "judges",
}


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [True, False], ids=["inputs", "runs"])  # one each for the two processes of pytest
def test_a_tenth_of_the_cases(tmp_path, inputs):
    drawn = draw(
        [case for case in all_cases() if case.kind not in SLOW and (case.kind in RUNS) != inputs], SEED, FRACTION
    )
    found = run(tmp_path, ranks.ROOT, [(case.kind, case.name) for case in drawn], SEED, minutes=10)
    assert len(found) == len(drawn)
    assert [each for each in found if each["problems"]] == []


@pytest.mark.parametrize(
    ("codes", "err", "problem"),
    [
        ([0], "", "accepted"),
        ([1], "Traceback (most recent call last):\nKeyError: 'x'\n", "traceback"),
        ([None], "", "hang"),
        ([2], "error: something is wrong\n", "unnamed"),
        ([2], "", "no error line"),
        ([2], "error: rows.jsonl: \x1b[31mred\n", "control characters"),
        ([2], f"error: rows.jsonl: {'x' * 5000}\n", "flood"),
        ([2], "error: rows.jsonl:2: no `prompt`\n", None),
    ],
)
def test_what_counts_as_a_refusal(codes, err, problem):
    problems = refused(Ended(codes, "", err, 1.0), ["rows.jsonl"])
    assert [each.partition(":")[0] for each in problems][:1] == ([problem] if problem else [])


def test_what_counts_as_a_loss(tmp_path):
    for name in ("kept", "lost", "rewritten", "out/model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = snapshot(tmp_path)
    (tmp_path / "lost").unlink()
    (tmp_path / "rewritten").write_text("again")
    (tmp_path / "canary_code").touch()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    (tmp_path / "out" / "model").unlink()
    expected = ["code ran: canary_code", "lost file: 'lost'", "trace left: 'new'", "changed file: 'rewritten'"]
    assert changed(before, snapshot(tmp_path), ours=["out"]) == expected


def test_what_the_table_of_trust_names_is_there():
    text = (ranks.ROOT / "SECURITY.md").read_text(encoding="utf-8")
    kinds = {case.kind for case in all_cases()}
    named = [
        kind
        for line in re.findall(r"campaign: (.*?) \|", text)
        for kind in re.findall(r"`([^`]+)`", re.sub(r"\(.*?\)", "", line))
    ]
    assert named
    assert set(named) <= kinds
    files = re.findall(r"`(tests/[^`]+)`", text)
    assert files
    assert [file for file in files if not (ranks.ROOT / file).is_file()] == []
