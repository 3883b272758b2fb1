"""Scalar heads on backbones that transformers has no classifier of, and heads that were saved under other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from reward_models import SequenceClassifier, TokenClassifier, load_reward_model, score_sequences
from reward_models.stored_head import stored_head
from tests.worlds import tiny_llama

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
ALL = torch.ones_like(IDS, dtype=torch.bool)
W = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
SIZES: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Architectures without a token classifier; the last four have no sequence classifier either.
LACKING = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0},  # the last states are narrower than the layers
    "gptj": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "n_inner": 32,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gemma3_text": {"head_dim": 8},
    "granite": {},
    "cohere": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
}


def save(folder: Path, model_type: str) -> None:
    """A random language model."""
    torch.manual_seed(0)
    shared = {} if model_type == "gptj" else SIZES
    config = AutoConfig.for_model(model_type, **{"vocab_size": 29, **shared, **LACKING[model_type]})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def states(folder: Path) -> Tensor:
    """Last hidden states of the base model, [B, S, H], by plain transformers."""
    with torch.no_grad():
        hidden: Tensor = AutoModel.from_pretrained(folder).eval()(input_ids=IDS).last_hidden_state
    return hidden


@pytest.mark.parametrize("model_type", LACKING)
def test_a_linear_head_on_the_base_model(model_type, tmp_path):
    """The value of a token is w . hidden + b, with the weights of the file, also after saving and loading."""
    save(tmp_path / "lm", model_type)
    hidden = states(tmp_path / "lm")
    autos = [TokenClassifier] if model_type in ("opt", "gptj", "gemma3_text") else [TokenClassifier, SequenceClassifier]
    for auto in autos:
        model, report = auto.from_pretrained(str(tmp_path / "lm"), num_labels=1, output_loading_info=True)
        assert all(name.startswith("score.") for name in report["missing_keys"])
        expected = hidden @ model.score.weight.T
        if auto is TokenClassifier:
            torch.nn.init.constant_(model.score.bias, 2.0)
            expected = expected + 2.0
        else:
            expected = expected[:, -1]
        rounding = {
            "rtol": 0,
            "atol": 1e-6,
        }  # in float32: a product of some rows may be summed in another order than of all
        torch.testing.assert_close(model.eval()(input_ids=IDS, use_cache=False).logits, expected, **rounding)
        model.save_pretrained(tmp_path / "saved")
        again, report = auto.from_pretrained(str(tmp_path / "saved"), output_loading_info=True)
        assert not any(report.values())
        torch.testing.assert_close(again.eval()(input_ids=IDS).logits, expected, **rounding)
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS).logits.sum().backward()
        torch.testing.assert_close(model.score.weight.grad[0], hidden.sum((0, 1)) if expected.dim() == 3 else hidden[:, -1].sum(0))  # fmt: skip


def test_a_reward_model_without_a_class_scores_the_last_real_token(tmp_path):
    """By the mask: padding on either side, of an id that is real elsewhere, does not matter."""
    save(tmp_path, "granite")
    model = SequenceClassifier.from_pretrained(str(tmp_path), num_labels=1)
    model.save_pretrained(tmp_path)
    loaded = load_reward_model(str(tmp_path))
    assert type(loaded).__name__ == "GraniteForSequenceClassification"
    expected = (states(tmp_path)[:, 2] @ model.score.weight[0]).detach()
    mask = torch.tensor([[True] * 3 + [False] * 2]).expand(2, 5)
    torch.testing.assert_close(score_sequences(loaded, IDS, mask), expected)
    torch.testing.assert_close(loaded(input_ids=IDS, attention_mask=mask.long()).logits[:, 0], expected)
    left = torch.cat([IDS[:, 3:], IDS[:, :3]], dim=1)
    torch.testing.assert_close(score_sequences(loaded, left, mask.flip(1)), expected)


def test_transformers_own_class_is_used_where_there_is_one():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, num_labels=1)
    assert type(SequenceClassifier.skeleton(config)).__module__ == type(AutoModelForSequenceClassification.from_config(config)).__module__  # fmt: skip
    assert not hasattr(TokenClassifier.skeleton(config), "backbone_class")


# -- heads under other names -------------------------------------------------------------------------------------------

READABLE = {
    "TRL": {"v_head.summary.weight": W, "v_head.summary.bias": torch.tensor([3.0])},
    "value_head": {"value_head.weight": W},
    "reward_head": {"reward_head.weight": W, "reward_head.bias": torch.tensor([-1.0])},
    "regression_head": {"regression_head.weight": W},
    "classifier": {"classifier.weight": W},
    "a bias": {"score.weight": W, "score.bias": torch.tensor([0.5])},
    "our own": {"score.weight": W},
    "unknown name": {"preference.weight": W},
}


def llama_with(folder: Path, head: dict[str, Tensor], name: str = "model.safetensors") -> None:
    tiny_llama().save_pretrained(folder)
    base = load_file(folder / "model.safetensors") if name == "model.safetensors" else {}
    save_file({**base, **head}, folder / name, {"format": "pt"})


@pytest.mark.parametrize("head", READABLE.values(), ids=READABLE)
def test_a_head_of_any_name_gives_its_scores(head, tmp_path):
    llama_with(tmp_path, head)
    bias = next((value for name, value in head.items() if name.endswith("bias")), torch.zeros(1))
    scores = score_sequences(load_reward_model(str(tmp_path)), IDS, ALL)
    torch.testing.assert_close(scores, states(tmp_path)[:, -1] @ W[0] + bias)


def test_a_head_in_a_file_of_its_own(tmp_path):
    """As LLaMA-Factory saves it."""
    llama_with(tmp_path, READABLE["TRL"], "value_head.safetensors")
    scores = score_sequences(load_reward_model(str(tmp_path)), IDS, ALL)
    torch.testing.assert_close(scores, states(tmp_path)[:, -1] @ W[0] + 3.0)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"score.weight": W[:, :8]}, r"a head for another width: score.weight \[1, 8\], where 32 is needed"),
        ({"score.weight": W.repeat(2, 1)}, r"a head with 2 outputs instead of one: score.weight \[2, 32\]"),
        ({"v_head.0.weight": W.repeat(8, 1), "v_head.2.weight": W}, "not one linear layer: v_head.0.weight"),
        ({"mlp.0.weight": W.repeat(32, 1), "mlp.out.weight": W}, "not one linear layer: mlp.0.weight"),
        ({"score.weight": W, "v_head.weight": W + 1}, "several heads, .*: score.weight .*, v_head.weight"),
        ({"v_head.weight": W * torch.nan}, "the head v_head hold NaN"),
        ({}, "LlamaForCausalLM, which has no sequence class"),
    ],
)
def test_a_head_that_cannot_be_used_is_refused(head, message, tmp_path):
    llama_with(tmp_path, head)
    with pytest.raises(ValueError, match=message):
        load_reward_model(str(tmp_path))


def test_a_head_in_a_pickle_is_refused(tmp_path):
    llama_with(tmp_path, {})
    (tmp_path / "value_head.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"value_head.bin is a pickle"):
        load_reward_model(str(tmp_path))


def test_layers_of_encoders_below_the_head_and_in_language_models_are_no_heads(tmp_path):
    sizes = {
        "vocab_size": 29,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = RobertaConfig(**sizes, num_labels=1, type_vocab_size=1)
    skeleton = SequenceClassifier.skeleton(config)
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "mlm")
    assert stored_head(str(tmp_path / "mlm"), config, skeleton) is None
    RobertaForMaskedLM(config).roberta.save_pretrained(tmp_path / "base")  # its token types are [1, 32]
    assert stored_head(str(tmp_path / "base"), config, skeleton) is None
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "scorer")
    head = stored_head(str(tmp_path / "scorer"), config, skeleton)
    assert head is not None
    assert (head.name, head.native) == ("classifier.out_proj", True)
    bert = SequenceClassifier.skeleton(BertConfig(**sizes, num_labels=1))
    with pytest.raises(ValueError, match=r"not one linear layer: classifier\.dense\.bias"):
        stored_head(str(tmp_path / "scorer"), config, bert)


def test_an_adapter_has_the_head_that_was_trained_with_it_or_that_of_its_base(tmp_path):
    llama_with(tmp_path / "base", READABLE["TRL"])
    config = AutoConfig.from_pretrained(tmp_path / "base")
    config.num_labels = 1
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    file = tmp_path / "adapter/adapter_model.safetensors"
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    save_file(lora, file)
    skeleton = SequenceClassifier.skeleton(config)
    head = stored_head(str(tmp_path / "adapter"), config, skeleton)
    assert head is not None
    assert head.name == "v_head.summary"
    llama_with(tmp_path / "base", {})
    save_file({**lora, "base_model.model.score.weight": W}, file)
    head = stored_head(str(tmp_path / "adapter"), config, skeleton)
    assert head is not None
    assert head.weight is not None
    assert head.native
    assert torch.equal(head.weight.read(), W)
