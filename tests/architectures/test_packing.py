"""Packed rows are refused before training where an architecture does not keep their examples apart."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.cli.architectures.cases import ARCHITECTURES, write_small_model
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.models.load import load_policy
from align.models.packing import check_packing
from align.sft.train import run
from tests.worlds import claimed, training_keys


def config_of(name: str, **changes):
    return AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})


@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("gemma3_text", {}), ("falcon", {"alibi": False})])
def test_an_architecture_that_keeps_examples_apart_packs(name, changes):
    check_packing(config_of(name, **changes), "packing", trust_remote_code=False)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("opt", "does not keep them apart"),  # makes its mask without the positions
        ("gpt_oss", "does not keep them apart"),  # so does this one, though Llama's does not
        ("falcon", "does not keep them apart"),  # ALiBi rounds positions above 256 to bfloat16
        ("mamba", "does not keep them apart"),  # its state goes on
        ("qwen3_next", "cannot be computed"),  # without a kernel for GPUs
    ],
)
def test_another_is_refused_with_the_key_to_change(name, why):
    with pytest.raises(UserError, match=f"^padding_free: packed .* type {name} .*{why}.*; set padding_free: false"):
        check_packing(config_of(name), "padding_free", trust_remote_code=False)


def test_the_check_draws_nothing_from_the_generator():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_packing(config_of("llama"), "packing", trust_remote_code=False)
    assert torch.equal(torch.rand(3), expected)


def test_the_stage_refuses_before_it_loads_weights(tmp_path, monkeypatch):
    write_small_model("bloom", tmp_path / "base")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it has loaded weights"))
    keys = training_keys("sft", tmp_path, [{"text": "some text"}] * 4, [])
    with pytest.raises(UserError, match=r"packing: packed examples in a model of type bloom .* set packing: false"):
        run(claimed(SFTRecipe(**keys, packing=True)))


def test_a_loaded_model_gives_the_same_numbers_in_training_and_in_evaluation(tmp_path):
    """OPT has rates of dropout that are numbers; RWKV divides its weights when it goes from training to evaluation."""
    for name, changes in (("opt", {}), ("rwkv", {"rescale_every": 1})):
        write_small_model(name, tmp_path / name, **changes)
        model = load_policy(str(tmp_path / name))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        ids = torch.arange(12)[None]
        with torch.no_grad():
            trained, evaluated = (model.train(mode)(input_ids=ids, use_cache=False).logits for mode in (True, False))
        assert torch.equal(trained, evaluated), name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name
