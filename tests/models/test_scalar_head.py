"""Heads that stages start from: kept under whatever name they were saved, or refused before weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTokenClassification,
    GPT2Config,
    ModernBertDecoderConfig,
    ModernBertDecoderForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)
from transformers import GPT2ForSequenceClassification as GPT2Scorer

from align.cli.check import check
from align.config.ppo import PPORecipe
from align.errors import UserError
from align.models.forward import response_values
from align.models.scalar_head import find_reward_head, start_reward_model
from align.models.value import find_value_head, load_value_model
from align.ppo.inputs import check_ppo_inputs
from align.ppo.setup import start_value_head
from align.reward.train import run
from align.runs.manifest import read_manifest
from reward_models import score_sequences
from reward_models.load import load_reward_model
from tests.reward.test_train import recipe, untrained
from tests.worlds import letter_tokenizer, save_recipe, save_tiny_policy, write_jsonl

W = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
V_HEAD = {
    "v_head.summary.weight": W,
    "v_head.summary.bias": torch.tensor([3.0]),
}  # TRL's AutoModelForCausalLMWithValueHead
TWO = {"score.weight": W.repeat(2, 1)}
MLP = {"v_head.0.weight": W.repeat(8, 1), "v_head.2.weight": W}
IDS = torch.tensor([[0, 4, 5, 6, 7, 8], [3, 4, 5, 9, 2, 0]])
MASK = torch.tensor([[False, *[True] * 5], [*[True] * 5, False]])


def model_with(folder: Path, head: dict[str, Tensor], **config) -> str:
    """A tiny language model whose file holds a head, too."""
    save_tiny_policy(folder)
    save_file({**load_file(folder / "model.safetensors"), **head}, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return str(folder)


def states(path: str, row: int) -> Tensor:
    """Hidden states of the real tokens of a row by plain transformers, [S, H]."""
    with torch.no_grad():
        hidden: Tensor = (
            AutoModel.from_pretrained(path).eval()(input_ids=IDS[row][MASK[row]][None]).last_hidden_state[0]
        )
    return hidden


def value_model(path: str):
    head = find_value_head(path, AutoConfig.from_pretrained(path), "value_model_path")
    model, missing = load_value_model(path, head)
    start_value_head(model, missing)
    return model.eval()


# -- values


def test_the_value_of_a_token_is_the_head_on_its_state(tmp_path):
    """OPT, of which transformers has no token classifier, from a language model: all zero; after training: w . h + b."""
    sizes = {"vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32)).save_pretrained(tmp_path)
    model = value_model(str(tmp_path))
    assert not response_values(model, IDS, MASK, 3).any()
    with torch.no_grad():
        model.score.weight.copy_(W)
        model.score.bias.fill_(0.5)
        values = response_values(model, IDS, MASK, 3)
    for row, (length, first) in enumerate(
        [(3, 1), (2, 2)]
    ):  # of the response; of the state before it, among real tokens
        expected = states(str(tmp_path), row)[first : first + length] @ W[0] + 0.5
        torch.testing.assert_close(values[row, :length], expected)


@pytest.mark.parametrize("head", [V_HEAD, {"value_head.weight": W}, {"classifier.weight": W}], ids=lambda h: min(h))
def test_a_value_head_of_another_name_gives_the_values(head, tmp_path):
    path = model_with(tmp_path, head)
    with torch.no_grad():
        values = response_values(value_model(path), IDS, MASK, 3)
    bias = 3.0 if head is V_HEAD else 0.0
    torch.testing.assert_close(values[0], states(path, 0)[1:4] @ W[0] + bias)


def test_a_value_model_from_a_reward_model_starts_at_its_score_and_is_saved_under_its_own_names(tmp_path):
    """GPT-2's scorer calls its head `score`, its token classifier `classifier`."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=29, n_positions=32, num_labels=1, pad_token_id=0)
    scorer = GPT2Scorer(config).eval()
    scorer.config.score_mean = 0.25
    scorer.save_pretrained(tmp_path / "reward")
    model = value_model(str(tmp_path / "reward"))
    with torch.no_grad():
        last = model(input_ids=IDS[:1, 1:]).logits[0, -1, 0]
        torch.testing.assert_close(last, score_sequences(scorer, IDS[:1, 1:], MASK[:1, 1:])[0])
    model.save_pretrained(tmp_path / "value")
    again, report = AutoModelForTokenClassification.from_pretrained(tmp_path / "value", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(again.classifier.weight, scorer.score.weight)


def test_a_value_model_has_no_head_that_reads_other_layers(tmp_path, capsys, monkeypatch):
    """ModernBERT's decoder scores by dense layer, activation, norm and head: values by its head alone would be no scores."""
    monkeypatch.syspath_prepend(tmp_path)
    save_tiny_policy(tmp_path / "sft")
    sizes = {
        "vocab_size": 29,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    scorer = ModernBertDecoderForSequenceClassification(ModernBertDecoderConfig(**sizes, **special, num_labels=1))
    scorer.save_pretrained(tmp_path / "reward")
    letter_tokenizer().save_pretrained(tmp_path / "reward")
    reward = str(tmp_path / "reward")
    with torch.no_grad():
        assert not response_values(value_model(reward), IDS, MASK, 3).any()
    settings = ppo_recipe(tmp_path, value_model_path=reward)
    check.run(str(save_recipe(settings, tmp_path / "recipe.yaml")))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"{reward} with a new head, since the model's own reads layers that a value model lacks: head.dense, " in said
    )


# -- the reward stage


@pytest.mark.parametrize("head", [{"score.weight": W}, V_HEAD], ids=["score", "v_head"])
def test_the_reward_stage_keeps_a_head(head, tmp_path):
    """At a learning rate of nearly nothing, the scores are the given ones but for their zero."""
    base = model_with(tmp_path / "base", head)
    settings = recipe(tmp_path, max_steps=1, learning_rate=1e-30)
    run(settings)
    saved = load_file(Path(settings.output_dir) / "model.safetensors")
    assert torch.equal(saved["score.weight"], W)
    assert not {"score.bias", *V_HEAD} & saved.keys()
    manifest = read_manifest(settings.output_dir)
    assert manifest is not None
    left = ", without its bias" if "score.weight" not in head else ""
    assert manifest["head"] == f"{min(head).rpartition('.')[0]}, kept from the model's files{left}"
    scores = score_sequences(load_reward_model(settings.output_dir), IDS, MASK)
    torch.testing.assert_close(scores, torch.stack([states(base, row)[-1] @ W[0] for row in (0, 1)]) - manifest["score_mean"])  # fmt: skip


@pytest.mark.parametrize("head", [TWO, MLP, {"score.weight": W}, {}], ids=["two", "mlp", "fitting", "none"])
def test_a_new_head_is_the_same_whatever_the_files_hold(head, tmp_path):
    path = model_with(tmp_path, head)
    assert find_reward_head(path, AutoConfig.from_pretrained(path), new_head=True) is None
    model = start_reward_model(path, None, True, 42)
    assert torch.equal(model.score.weight, untrained(42).score.weight)
    assert torch.equal(model.model.embed_tokens.weight, untrained(42).model.embed_tokens.weight)


# -- refusals, by `align check` and by the stages


def ppo_recipe(folder: Path, **changes) -> PPORecipe:
    rows = write_jsonl(folder / "prompts.jsonl", [{"prompt": "ab"}] * 16)
    (folder / "truth.py").write_text("def score(prompts, completions, **_):\n    return [1.0] * len(prompts)\n")
    sizes = {"total_episodes": 8, "rollout_batch_size": 8, "minibatch_size": 8, "response_length": 4}
    return PPORecipe(
        stage="ppo", output_dir=str(folder / "out"), train_dataset=[{"path": rows}], eval_fraction=0.0, max_prompt_length=8,
        **{"sft_model_path": str(folder / "sft"), "reward_funcs": ["truth:score"], **sizes, **changes},
    )  # fmt: skip


@pytest.mark.parametrize(("head", "found"), [(TWO, "2 outputs instead of one: score.weight [2, 32]"), (MLP, "not one linear layer")])  # fmt: skip
@pytest.mark.parametrize("key", ["model_name_or_path", "reward_model_path", "value_model_path"])
def test_a_head_that_cannot_be_used_is_refused_by_check_as_by_the_stage(
    key, head, found, tmp_path, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    path = model_with(tmp_path / "base", head)
    save_tiny_policy(tmp_path / "sft")
    if key == "model_name_or_path":
        settings, stage = recipe(tmp_path), run
    else:
        changes = {"reward_funcs": [], key: path} if key == "reward_model_path" else {key: path}
        settings, stage = ppo_recipe(tmp_path, **changes), check_ppo_inputs
    with pytest.raises(UserError, match=rf"^{key}: {path}: holds a head .*") as error:
        stage(settings)
    assert found in str(error.value)
    assert {"model_name_or_path": "new_head: true", "reward_model_path": "Name a reward model", "value_model_path": "rloo"}[key] in str(error.value)  # fmt: skip
    assert check.run(str(save_recipe(settings, tmp_path / "recipe.yaml"))) == 2
    assert str(error.value) in capsys.readouterr().out
