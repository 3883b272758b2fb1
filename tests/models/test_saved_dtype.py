"""Settings of training do not reach the saved model, and its weights have the data types of the base's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from align.config.sft import SFTRecipe
from align.models.load import load_policy
from align.models.saved_dtype import base_dtypes, set_saved_dtype
from align.sft.train import run
from tests.worlds import letter_ids, letter_tokenizer, save_tiny_policy, tiny_llama, trained, training_keys


def test_a_saved_model_has_the_settings_and_types_of_its_base(tmp_path):
    """Of a mixture of experts, whose router's logits TRL asks for, trained with recomputed activations, so without a cache."""
    config = AutoConfig.for_model("mixtral", vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, attention_dropout=0.1,
                                  max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.generation_config.update(eos_token_id=[2, 5], do_sample=True, temperature=0.6)
    base.save_pretrained(tmp_path / "base")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    weights = load_file(file)
    router = next(name for name in weights if "gate.weight" in name)
    save_file({**weights, router: weights[router].float()}, file, {"format": "pt"})
    recipe = SFTRecipe(
        **training_keys("sft", tmp_path, [{"prompt": "abc", "completion": "def"}] * 4, []),
        max_steps=1,
        gradient_checkpointing=True,
    )
    run(recipe)
    assert (tmp_path / "out/model.safetensors").stat().st_mode == (tmp_path / "out/config.json").stat().st_mode
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tmp_path / "base" / name).read_text())
    saved = trained(recipe)
    assert {name: weight.dtype for name, weight in saved.items()} == {
        name: torch.float32 if name == router else torch.bfloat16 for name in weights
    }
    assert not torch.equal(saved["lm_head.weight"], weights["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.generate(torch.tensor([letter_ids("abc")]), max_new_tokens=4, do_sample=False).shape[1] > 3


@pytest.mark.parametrize(("asked", "dtype"), [("auto", torch.float32), ("float16", torch.float16)])
def test_in_shards(tmp_path, asked, dtype):
    base = save_tiny_policy(tmp_path / "base")
    model = tiny_llama(1)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*"))) > 1
    assert set_saved_dtype(tmp_path / "out", base, asked) == str(dtype).removeprefix("torch.")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert all(
        torch.equal(new, old.to(dtype)) for new, old in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    total = sum(parameter.nbytes for parameter in loaded.parameters())
    assert json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["metadata"]["total_size"] == total


def test_the_type_of_a_base(tmp_path: Path):
    """By its files, whatever its config.json says; that of an adapter is its base's."""
    tiny_llama().half().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}))
    for name in ("base", "adapter"):
        assert base_dtypes(str(tmp_path / name))[0] == torch.float16


def test_settings_that_are_neutral_in_a_stage_are_the_bases_in_what_it_saves(tmp_path):
    """With router logits on, transformers' mixtures cannot read a batch of generated tokens; tuples have no names."""
    base = tmp_path / "base"
    config = MixtralConfig(
        vocab_size=29, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=0, output_router_logits=True,
    )  # fmt: skip
    config.return_dict = False
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    model = load_policy(str(base))
    assert model(input_ids=torch.tensor([[3, 4]])).keys() & {"router_logits", "logits"} == {"logits"}
    model.save_pretrained(tmp_path / "out")
    set_saved_dtype(tmp_path / "out", str(base), "auto")
    given, saved = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert saved == given
    assert (given["return_dict"], given["output_router_logits"]) == (False, True)
