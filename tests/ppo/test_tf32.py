"""PPO's self-checks under TF32, which is emulated: sound runs pass by its limits, and faults do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from align.config.load import load_recipe
from align.ppo import self_checks, update
from align.ppo.self_check_limits import FLOAT32, TF32, Check, limits_of
from tests.emulated.tf32 import TF32 as EmulatedTF32
from tests.emulated.tf32 import rounded
from tests.ppo.runs import ppo_run
from tests.ppo.test_self_checks import cold
from tests.ppo.test_train import make_recipe

FEW_ROWS = 16  # of a decoding step, whose products a GPU may compute without TF32


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return ppo_run(load_recipe("ppo", make_recipe(tmp_path_factory.mktemp("tf32"))))


def failed(run, tf32: bool) -> list[Check]:
    run = dataclasses.replace(run, world=dataclasses.replace(run.world, tf32=tf32))
    with EmulatedTF32(exact_rows=FEW_ROWS):
        checks, _ = self_checks.run_checks(run)
    return [check for check in checks if check.required and not check.passed]


def test_numbers_are_rounded_to_10_bits():
    ulp = 2.0**-10
    numbers = torch.tensor([1 + 0.49 * ulp, 1 + 0.51 * ulp, -1 - 0.51 * ulp, 3 * 2.0**-20, 0.0, torch.inf])
    assert rounded(numbers).tolist() == [1, 1 + ulp, -1 - ulp, 3 * 2.0**-20, 0, torch.inf]


def test_a_sound_run_needs_the_limits_of_tf32(run):
    assert not failed(run, tf32=True)
    assert any("generation gap" in str(check) for check in failed(run, tf32=False))


def test_a_temperature_missing_in_training_is_found(run, monkeypatch):
    monkeypatch.setattr(update, "response_loss", cold(update.response_loss))
    assert any(") ratio" in f") {check}" for check in failed(run, tf32=True))


def test_the_limits_are_between_those_of_the_other_precisions():
    assert limits_of(False, False) == FLOAT32
    assert limits_of(False, True) == TF32
    bfloat16 = limits_of(True, True)
    for name in (field.name for field in dataclasses.fields(TF32)):
        assert getattr(FLOAT32, name) < getattr(TF32, name) < getattr(bfloat16, name)
        assert getattr(bfloat16, name) / getattr(TF32, name) == pytest.approx(2**3, rel=0.05)  # three bits
