"""A core of the matrix, in process: exactness and the three stages, end to end. The whole of it is the command."""

from __future__ import annotations

import os
import signal

import pytest
from transformers import GPT2Config

from align.cli.architectures import command
from align.cli.architectures.cases import Case, make_cases, write_small_model
from align.cli.architectures.exactness import PACKED, packed_lengths, response_room
from align.cli.architectures.examine import FAILED, OK, REFUSED, Examination, examine
from align.errors import UserError

EXACT = {"sampling", "training", "padded", "loss", "scores", "values"}


@pytest.mark.parametrize(
    ("name", "packs"),
    [("mistral", True), ("gemma2", True), ("qwen3_moe", True), ("bloom", False), ("mamba2", False)],
)
def test_an_architecture(name, packs, tmp_path):
    found = examine(Case(name), tmp_path)
    assert found.verdict == OK, found
    assert found.gaps.keys() == (EXACT | {"packed"} if packs else EXACT)
    assert found.stages.pop("packing") == (OK if packs else REFUSED)
    assert set(found.stages.values()) == {OK}, found


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_an_encoder_decoder(name, tmp_path):
    found = examine(Case(name), tmp_path)
    assert found.verdict == REFUSED, found
    assert found.gaps.keys() == {"padded", "loss", "scores"}
    assert {part for part, state in found.stages.items() if state == REFUSED} == {"packing", "ppo"}
    assert FAILED not in found.stages.values(), found
    assert {"sft", "reward", "saved"} <= found.stages.keys()


def test_a_model_that_reads_few_tokens(tmp_path):
    write_small_model("gpt2", tmp_path / "base", positions=16)
    (tmp_path / "work").mkdir()
    found = examine(Case("gpt2", str(tmp_path / "base")), tmp_path / "work")
    assert found.verdict == OK, found
    assert found.gaps.keys() == EXACT | {"packed"}
    assert set(found.stages.values()) == {OK}, found
    assert packed_lengths(GPT2Config(n_positions=222)) == PACKED
    assert sum(packed_lengths(GPT2Config(n_positions=221))) <= 221
    with pytest.raises(UserError, match="the model reads 15 tokens; examining it takes at least 16"):
        response_room(GPT2Config(n_positions=15))


def test_a_process_that_dies_is_a_row_that_failed(monkeypatch):
    def die_or_find(case, *_):
        return os.kill(os.getpid(), signal.SIGKILL) if case.name == "dies" else Examination(case.name)

    monkeypatch.setattr(command, "examine", die_or_find)
    died, other = command.examine_all([Case("dies"), Case("other")], [])
    assert (died.verdict, other.verdict) == (FAILED, OK)
    assert died.notes == {"process": "the process of this row was killed by SIGKILL"}


def test_what_cannot_be_examined_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"--architectures: .* no language model of type 'lama'; did you mean 'llama'"):
        make_cases(["lama"], None)
    with pytest.raises(UserError, match="--model: no model at"):
        make_cases(None, str(tmp_path))
    assert [case.name for case in make_cases(["opt", "opt"], None)] == ["opt"]
