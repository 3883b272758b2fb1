"""A core of the matrix, in process: exactness and the three stages, end to end. The whole of it is the command."""

from __future__ import annotations

import pytest

from align.cli.architectures.cases import Case
from align.cli.architectures.examine import OK, REFUSED, examine

EXACT = {"sampling", "training", "padded", "scores", "values"}


@pytest.mark.parametrize(
    ("name", "packs"),
    [("mistral", True), ("gemma2", True), ("gpt2", True), ("qwen3_moe", True), ("bloom", False), ("mamba2", False)],
)
def test_an_architecture(name, packs, tmp_path):
    found = examine(Case(name), tmp_path)
    assert found.verdict == OK, found
    assert found.gaps.keys() == (EXACT | {"packed"} if packs else EXACT)
    assert found.stages.pop("packing") == (OK if packs else REFUSED)
    assert set(found.stages.values()) == {OK}, found
