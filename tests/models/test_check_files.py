"""Configuration, tokenizer and weights of a folder that do not fit together are refused before weights are loaded."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from align.config.sft import SFTRecipe
from align.errors import UserError
from align.models.check_files import check_embeddings, check_files
from align.models.context_length import max_positions
from align.models.load import load_policy, load_pretrained
from align.models.trainable import freeze
from tests.worlds import letter_tokenizer, save_tiny_policy, tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
    "mixtral": {"num_local_experts": 2},
    "gpt2": {"n_positions": 32},
    "bert": {"max_position_embeddings": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A small model of each type."""
    root = tmp_path_factory.mktemp("types")
    for name, changes in TYPES.items():
        auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
        auto.from_config(AutoConfig.for_model(name, **{**SIZES, **changes})).save_pretrained(root / name)
    return root


def check(path: Path, auto: Any = AutoModelForCausalLM, **keys: Any) -> None:
    check_files(auto, str(path), "model_name_or_path", AutoConfig.from_pretrained(path), **keys)


@pytest.mark.parametrize("name", TYPES)
def test_what_transformers_loads_is_accepted(folders, tmp_path, name):
    """As a language model and with a new head; also the weights of the backbone alone, and under old names."""
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    check(folders / name, auto)
    for headed in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        check(folders / name, headed, new_head=True, num_labels=1)
    AutoModel.from_pretrained(folders / name).save_pretrained(tmp_path)
    check(tmp_path, AutoModelForSequenceClassification, new_head=True)
    if name == "bert":
        found = load_file(tmp_path / "model.safetensors")
        old = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in found.items()}
        old = {f"bert.{key.replace('LayerNorm.bias', 'LayerNorm.beta')}": value for key, value in old.items()}
        save_file({**old, "bert.embeddings.position_ids": torch.arange(32)}, tmp_path / "model.safetensors")
        check(tmp_path, AutoModelForMaskedLM, new_head=True)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return apply


def drop(part: str) -> Callable[[Path], None]:
    return weights(lambda found: [found.pop(name) for name in list(found) if part in name])


def put(name: str, *shape: int) -> Callable[[Path], None]:
    return weights(lambda found: found.update({name: torch.zeros(shape)}))


CAUSAL, HEADED = AutoModelForCausalLM, AutoModelForSequenceClassification
BAD: dict[str, tuple[str, Any, Callable[[Path], None], str]] = {
    "a layer is missing": ("llama", CAUSAL, drop("layers.1."), "LlamaForCausalLM lack model.layers.1.input_layernorm.weight and 8 more"),
    "a layer is missing, new head": ("llama", HEADED, drop("layers.1."), "lack model.layers.1.input_layernorm.weight and 8"),
    "the config has more layers": ("gpt2", CAUSAL, config(n_layer=3), "GPT2LMHeadModel lack transformer.h.2."),
    "the config has fewer layers": ("llama", CAUSAL, config(num_hidden_layers=1), "hold model.layers.1.input_layernorm.weight and 8 more, which its config.json has no place for"),
    "fewer layers, new head": ("gpt2", HEADED, config(n_layer=1), "h.1.attn.c_attn.weight and 10 more, which"),
    "biases that the model would leave out": ("llama", CAUSAL, put("model.layers.0.self_attn.q_proj.bias", 16), "hold model.layers.0.self_attn.q_proj.bias, which"),
    "no head": ("llama", CAUSAL, drop("lm_head"), "lack lm_head.weight;"),
    "a bias of the head": ("llama", CAUSAL, put("lm_head.bias", 29), "hold lm_head.bias, which"),
    "vocabulary": ("llama", CAUSAL, config(vocab_size=40), "hold lm_head.weight and 1 more of shape (29, 16), where its config.json asks for (40, 16)"),
    "a tied vocabulary": ("qwen2", CAUSAL, config(vocab_size=20), "hold model.embed_tokens.weight of shape (29, 16), where"),
    "positions": ("gpt2", HEADED, config(n_positions=64), "hold transformer.wpe.weight of shape (32, 16)"),
    "width, new head": ("llama", HEADED, config(intermediate_size=64), "mlp.down_proj.weight and 5 more of shape (16, 32)"),
    "an expert is missing": ("qwen3_moe", CAUSAL, drop("experts.1."), "experts.down_proj and 3 more of shape (1, 16, 8), where its config.json asks for (2,"),
    "experts of another shape": ("mixtral", CAUSAL, put("model.layers.0.block_sparse_moe.experts.0.w2.weight", 3, 3), "config.json. "),
    "a layer of an encoder": ("bert", AutoModelForMaskedLM, drop("layer.1."), "lack bert.encoder.layer.1."),
    "another type": ("gpt2", CAUSAL, config(model_type="llama", **SIZES), "lack lm_head.weight and 20 more"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "auto", "change", "said"), BAD.values(), ids=BAD)
def test_weights_that_do_not_fit(folders, tmp_path, name, auto, change, said):
    folder = tmp_path / "model"
    shutil.copytree(folders / name, folder)
    change(folder)
    with pytest.raises(UserError) as error:
        check(folder, auto, new_head=auto is not CAUSAL)
    assert str(error.value).startswith(f"model_name_or_path: {folder}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_on_the_hub_are_refused_once_loaded(folders, tmp_path):
    """Where no header could be read before."""
    folder = tmp_path / "model"
    shutil.copytree(folders / "llama", folder)
    config(num_hidden_layers=1)(folder)
    with pytest.raises(UserError, match="no place for"):
        load_policy(str(folder))
    shutil.copytree(folders / "llama", folder, dirs_exist_ok=True)
    config(intermediate_size=64)(folder)
    with pytest.raises(UserError, match="of shape"):
        load_pretrained(HEADED, str(folder), ignore_mismatched_sizes=True)


def test_a_head_that_a_language_model_leaves_out_is_told(folders, tmp_path, capsys):
    shutil.copytree(folders / "llama", tmp_path / "m")
    head = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    weights = load_file(tmp_path / "m/model.safetensors")
    old_buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    for more in ({}, old_buffer, head):
        save_file({**weights, **more}, tmp_path / "m/model.safetensors", {"format": "pt"})
        check_files(AutoModelForCausalLM, str(tmp_path / "m"), "k", AutoConfig.from_pretrained(tmp_path / "m"))
        told = "LlamaForCausalLM has no place for some of the weights in its files, and leaves them out: v_head.summary.bias, v_"
        assert (told in capsys.readouterr().err) == (more is head)


def test_an_adapters_base_is_checked(tmp_path):
    save_tiny_policy(tmp_path / "base")
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    base = AutoConfig.from_pretrained(tmp_path / "base")
    check_files(CAUSAL, str(tmp_path / "adapter"), "models", base)
    drop("layers.1.")(tmp_path / "base")
    with pytest.raises(
        UserError, match=re.escape(f"models: {tmp_path / 'base'}: the weights of this LlamaForCausalLM lack")
    ):
        check_files(CAUSAL, str(tmp_path / "adapter"), "models", base)


def test_an_embedding_for_every_token():
    tokenizer, model = letter_tokenizer(), tiny_llama(layers=1).config
    check_embeddings(tokenizer, model, "m", "k")
    model.vocab_size = 64  # padded
    check_embeddings(tokenizer, model, "m", "k")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{n}>" for n in range(36)]})
    with pytest.raises(
        UserError,
        match=r"k: m: the tokenizer has 65 tokens, and the model 64 embeddings \(vocab_size\), none for '<35>';",
    ):
        check_embeddings(tokenizer, model, "m", "k")
    tokenizer.image_token = "<35>"  # of a multimodal sibling
    check_embeddings(tokenizer, model, "m", "k")


def test_kernels_that_transformers_does_not_know(folders):
    check(folders / "llama", attn_implementation="flash_attention_2")  # told once it is loaded
    with pytest.raises(UserError, match="nosuch"):
        check(folders / "llama", attn_implementation="nosuch")


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "embedding"])
def test_an_adapter_whose_weights_are_not_all_there(tmp_path, kind):
    save_tiny_policy(tmp_path / "base")
    lora = LoraConfig(
        target_modules=["q_proj", *(["embed_tokens"] if kind == "embedding" else [])], use_dora=kind == "dora"
    )
    adapted = get_peft_model(
        tiny_llama(), lora if kind != "ia3" else IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(str(adapter))
    base = AutoConfig.from_pretrained(tmp_path / "base")
    check_files(CAUSAL, str(adapter), "models", base)
    load_policy(str(adapter))
    found = load_file(adapter / "adapter_model.safetensors")
    last = [name for name in found if "layers.1." in name][-1]
    for value, said in ((None, "missing adapter keys"), (torch.zeros(7, 7), r"Error\(s\) in loading")):
        changed = {name: tensor for name, tensor in found.items() if name != last}
        save_file(changed if value is None else {**changed, last: value}, adapter / "adapter_model.safetensors")
        with pytest.raises(UserError, match=f"^models: {adapter}: the adapter does not fit its base model.*{said}"):
            check_files(CAUSAL, str(adapter), "models", base)
        with pytest.raises(UserError, match=rf"cannot load the adapter.*{said}"):
            load_policy(str(adapter))


METHODS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "an adapter on the head": ("llama", {"method": "lora", "lora_target_modules": ["lm_head"]}, "'lm_head' belongs to the head"),
    "on a tied embedding": ("qwen2", {"method": "lora", "lora_target_modules": ["embed_tokens"]}, "'embed_tokens' is also the head"),
    "on an embedding": ("llama", {"method": "lora", "lora_target_modules": ["embed_tokens"]}, None),
    "on nothing": ("llama", {"method": "lora", "lora_target_modules": ["c_attn"]}, "'c_attn' is not in this model"),
    "no known place": ("qwen3_moe", {"method": "ia3"}, "method: ia3 does not fit this model: ValueError: Please specify"),
    "too many layers": ("gpt2", {"method": "freeze", "freeze_layers": 3}, "freeze_layers: expected at most 2"),
    "a tied head": ("qwen2", {"method": "head"}, "method: freeze with freeze_layers: 2 trains that weight"),
    "no such parameter": ("llama", {"method": "freeze", "trainable_pattern": "x9"}, "'x9' matches no parameter"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "said"), METHODS.values(), ids=METHODS)
def test_a_method_that_does_not_fit_the_model(folders, name, keys, said):
    recipe = SFTRecipe(output_dir="out", train_dataset=[], **keys)
    with pytest.raises(UserError, match=re.escape(said)) if said else contextlib.nullcontext():
        check(folders / name, trained_by=recipe)


def test_freezing_layers_leaves_an_embedding_that_is_the_head_alone_and_says_so(folders, capsys):
    model = load_policy(str(folders / "qwen2"))
    freeze(model, model.get_output_embeddings(), "freeze", freeze_layers=1)
    assert {name for name, each in model.named_parameters() if not each.requires_grad} == {
        name for name, _ in model.named_parameters() if "layers.0." in name
    }
    for name, said in (("qwen2", True), ("llama", False)):
        check(folders / name, trained_by=SFTRecipe(output_dir="o", train_dataset=[], method="freeze", freeze_layers=1))
        assert ("its embedding is its head, too (tied weights), and stays trainable" in capsys.readouterr().err) == said


@pytest.mark.parametrize("name", ["roberta", "mpnet", "bert", "mpt", "gpt2"])
def test_as_many_positions_as_the_model_has(name):
    """A row of `max_positions` tokens can be read, and none that is longer."""
    sizes = (
        {"max_seq_len": 32, "d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 29} if name == "mpt" else SIZES
    )
    positions = {} if name == "mpt" else {"max_position_embeddings": 32}
    model = AutoModel.from_config(AutoConfig.for_model(name, **sizes, **positions))
    limit = max_positions(model.config)
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_weights_that_are_trained_as_plain_ones_are_told(tmp_path, capsys):
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "fp8", "dequantize": True})
    config.save_pretrained(tmp_path)
    recipe = SFTRecipe(stage="sft", output_dir="o", model_name_or_path=str(tmp_path), train_dataset=[])
    check(tmp_path)
    assert not capsys.readouterr().err
    check(tmp_path, trained_by=recipe)
    told = f"note: model_name_or_path: {tmp_path}: the `quantization_config` in its config.json is used to load it, and not kept"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_that_are_quantized_in_a_way_that_cannot_be_loaded_here(tmp_path, method):
    path = save_tiny_policy(tmp_path / "m")
    config = AutoConfig.from_pretrained(path)
    config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 128}
    with pytest.raises(UserError, match=r"k: .*m: cannot be loaded with the `quantization_config` in its config.json"):
        check_files(AutoModelForCausalLM, path, "k", config)
