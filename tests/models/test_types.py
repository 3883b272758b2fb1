"""What single model types need: their own positions, small models of them, dropout that is off, adapters that fit."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GPTNeoConfig, LlamaConfig

from align.cli.architectures.cases import write_small_model
from align.cli.architectures.exactness import measure_policy
from align.errors import UserError
from align.models import virtual_tokens
from align.models.causality import check_causal
from align.models.dropout import disable_dropout
from align.models.inspect_folder import inspect_folder
from align.models.load import load_config
from align.models.packing import check_packing, example_rows
from align.models.small_model import small_model
from align.models.tokenizer import load_tokenizer, saved_pad_id
from align.models.virtual_tokens import check_takes_virtual_tokens


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta-xl"])
def test_a_decoder_that_counts_its_positions_from_its_padding_id(name, tmp_path):
    write_small_model(name, tmp_path, is_decoder=True)
    _, gaps, _ = measure_policy(str(tmp_path), load_tokenizer(str(tmp_path)), packs=False)
    assert max(gaps.values()) < 1e-5


@pytest.mark.parametrize(
    "name",
    ["modernbert-decoder", "roberta", "cwm", "falcon_h1", "gemma4_text", "gemma3n_text", "kimi_linear", "xlstm", "youtu",
     "zamba", "zamba2"],
)  # fmt: skip
def test_a_type_is_tried(name, capsys):
    config = AutoConfig.for_model(name)
    config.is_decoder = True
    check_causal(config, "k", "m")
    assert not capsys.readouterr().err


def test_a_type_that_cannot_be_tried_is_named(capsys):
    check_causal(LlamaConfig(hidden_act="none such"), "k", "m")
    assert "note: k: m: whether a model of type llama reads later tokens could not be tried" in capsys.readouterr().err


def test_a_packed_row_longer_than_the_positions_of_a_model_whose_mask_ends_there():
    config = GPTNeoConfig()
    check_packing(config, "packing", False, tokens=2048)
    with pytest.raises(UserError, match=r"packing: a batch .* may have 2049 tokens .* its 2048 positions"):
        check_packing(config, "packing", False, tokens=2049)
    check_packing(LlamaConfig(), "packing", False, tokens=10**6)  # its positions begin anew in each example


@pytest.mark.parametrize("name", ["jetmoe", "deepseek_v3", "falcon", "mpt"])
def test_virtual_tokens_that_do_not_fit_the_layers(name):
    with pytest.raises(UserError, match=rf"method: prefix: m \({name}\): PEFT's virtual tokens .* use method: lora"):
        check_takes_virtual_tokens(AutoConfig.for_model(name), "prefix", "method: prefix: m")


@pytest.mark.parametrize(
    ("name", "method"), [("gpt_bigcode", "prefix"), ("jetmoe", "prompt"), ("gemma3_text", "prefix")]
)
def test_virtual_tokens_that_fit(name, method):
    check_takes_virtual_tokens(AutoConfig.for_model(name), method, "m")


def test_virtual_tokens_that_evaluation_would_compute_otherwise_than_training(monkeypatch):
    positions = virtual_tokens.position_ids
    monkeypatch.setattr(virtual_tokens, "position_ids", lambda mask: positions(mask) + 1)
    with pytest.raises(
        UserError, match=r"m \(gpt2\): PEFT's virtual tokens give log-probabilities that are off by up to [\d.]+ nats"
    ):
        check_takes_virtual_tokens(AutoConfig.for_model("gpt2"), "prompt", "m")


@pytest.mark.parametrize("name", ["falcon", "persimmon", "gpt_neo", "gptj"])
def test_dropout_that_a_layer_reads_from_the_configuration(name):
    config = AutoConfig.for_model(name)
    rates = {key: 0.5 for key, value in config.to_dict().items() if "drop" in key and isinstance(value, float)}
    config.update(rates)
    model, ids = small_model(config, 64), torch.tensor(example_rows((9,), 64))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        disable_dropout(model)
        assert torch.allclose(model.train()(input_ids=ids).logits, expected, atol=1e-5)
    assert rates
    assert model.config.to_dict().items() >= rates.items()


def test_a_model_with_layers_for_each_language_needs_to_know_which(tmp_path):
    config = AutoConfig.for_model("xmod", languages=["en_XX", "de_DE"])
    for language in (None, "fr_XX"):
        config.default_language = language
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=rf"^k: .*: its config.json gives {language!r} .* one of en_XX, de_DE\."):
            load_config(str(tmp_path), "k")
    config.default_language = "de_DE"
    config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path), "k").default_language == "de_DE"


@pytest.mark.parametrize("name", ["mixtral", "minimax_m2", "phimoe"])
def test_no_noise_routes_tokens_to_experts_in_training(name):
    """Phi-MoE draws experts at random whatever its noise is."""
    config = AutoConfig.for_model(name)
    config.update({key: 0.3 for key in config.to_dict() if "jitter" in key})
    model, ids = small_model(config, 64), torch.tensor(example_rows((9,), 64))
    expected = model(input_ids=ids).logits.detach()
    disable_dropout(model)
    logits = model.train()(input_ids=ids).logits
    torch.testing.assert_close(logits.detach(), expected)
    logits[0, -1, 3].backward()
    routers = [
        weight.grad for name, weight in model.named_parameters() if "gate.weight" in name or "router.weight" in name
    ]
    assert routers
    assert all(grad.abs().max() > 0 for grad in routers)
    assert all(module.training for module in model.modules() if not any("jitter" in name for name in vars(module)))


def test_the_padding_id_of_a_saved_model(tmp_path):
    write_small_model("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert saved_pad_id(LlamaConfig(), tokenizer) == tokenizer.pad_token_id == 0
    tokenizer.pad_token = tokenizer.eos_token  # in place of one that it lacks
    assert saved_pad_id(LlamaConfig(), tokenizer) is None
    assert saved_pad_id(LlamaConfig(pad_token_id=1), tokenizer) == 1
    assert saved_pad_id(LlamaConfig(pad_token_id=-1), tokenizer) == 2
    assert saved_pad_id(LlamaConfig(), tokenizer, scores=True) == 2
    assert saved_pad_id(AutoConfig.for_model("roberta"), tokenizer, scores=True) == 1


def test_an_adapter_of_a_model_that_its_run_has_removed(tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "untrained")}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match=rf"the run has merged the two: name {tmp_path}\."):
        inspect_folder(str(tmp_path / "adapter"), "align merge")
