"""PPO with trained reward models: what is scored, where the value model starts, which checkpoint is the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from align.config.load import load_recipe
from align.engine.batch_plan import batch_plan
from align.engine.distributed import World
from align.errors import UserError
from align.models.forward import position_ids
from align.ppo.inputs import check_ppo_inputs
from align.ppo.setup import load_models
from align.ppo.train import run
from reward_models.heads import init_head
from reward_models.responses import Responses
from tests.ppo.test_train import make_recipe
from tests.worlds import LETTERS, letter_tokenizer, tiny_llama

SCORE_MEAN = 0.75


def save_decoder_reward(folder: Path) -> str:
    """A reward model with the policy's tokenizer, whose zero is not at 0."""
    config = tiny_llama().config.to_dict() | {"num_labels": 1, "score_mean": SCORE_MEAN}
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(tiny_llama().config.__class__(**config))
    init_head(model, 5)
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def save_encoder_reward(folder: Path) -> str:
    """A BERT-like reward model with a tokenizer of its own: other ids, and pairs as [CLS] prompt [SEP] response [SEP]."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *reversed(LETTERS)]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(6)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokens), num_labels=1, initializer_range=0.5, **size)
    )
    model.config.score_mean = SCORE_MEAN
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def samples(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "out" / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if row["name"] != "warnings"]


def test_an_encoder_scores_what_plain_transformers_scores(tmp_path):
    reward = save_encoder_reward(tmp_path / "reward")
    recipe = make_recipe(
        tmp_path, reward_funcs=[], reward_model_path=reward, total_episodes=16, missing_eos_penalty=None, eval_steps=1
    )
    run(load_recipe("ppo", recipe))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward), AutoTokenizer.from_pretrained(reward)
    rows = [row for row in samples(tmp_path) if row["response"]]  # plain tokenizers take an empty text for none
    assert rows
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"], row["response"])["input_ids"]])
        with torch.no_grad():
            assert row["score"] == pytest.approx(float(model(input_ids=ids).logits) - SCORE_MEAN, abs=1e-5)


def test_a_decoder_scores_the_very_ids_that_were_sampled(tmp_path):
    reward = save_decoder_reward(tmp_path / "reward")
    recipe = load_recipe("ppo", make_recipe(tmp_path, reward_funcs=[], reward_model_path=reward))
    models = load_models(recipe, check_ppo_inputs(recipe), batch_plan(recipe, 1), World(0, 1, torch.device("cpu")))
    prompts, responses = [[3], [3, 4, 5, 6]], [[7, 8, 9, 2], [2]]
    batch = Responses(
        prompts=["a", "abcd"], texts=["efg", ""], completions=["efg", ""], prompt_ids=prompts, response_ids=responses
    )
    plain = AutoModelForSequenceClassification.from_pretrained(reward)
    total, by_name, _ = models.rewards.score(batch)
    assert list(by_name) == ["reward_model"]
    for score, prompt, response in zip(total, prompts, responses, strict=True):
        with torch.no_grad():
            logit = float(plain(input_ids=torch.tensor([prompt + response])).logits)
        assert float(score) == pytest.approx(logit - SCORE_MEAN, abs=1e-5)


def test_the_value_of_the_last_token_starts_as_the_score(tmp_path):
    reward = save_decoder_reward(tmp_path / "reward")
    recipe = load_recipe("ppo", make_recipe(tmp_path, reward_funcs=[], reward_model_path=reward))
    world = World(0, 1, torch.device("cpu"))
    models = load_models(recipe, check_ppo_inputs(recipe), batch_plan(recipe, 1), world)
    ids = torch.tensor([[3, 9, 4, 28, 2]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        value = models.value(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask.bool())).logits[
            0, -1, 0
        ]
        plain = AutoModelForSequenceClassification.from_pretrained(reward)(input_ids=ids).logits[0, 0]
    assert float(value) == pytest.approx(float(plain) - SCORE_MEAN, abs=1e-5)
    assert models.value.module.config.score_mean == 0.0, "the zero is in the bias now, not to be taken off twice"


def test_without_a_reward_model_every_value_starts_at_zero(tmp_path):
    recipe = load_recipe("ppo", make_recipe(tmp_path))
    models = load_models(recipe, check_ppo_inputs(recipe), batch_plan(recipe, 1), World(0, 1, torch.device("cpu")))
    with torch.no_grad():
        assert models.value(input_ids=torch.tensor([[3, 9, 4]])).logits.abs().max() == 0


def test_a_reward_model_and_a_function_are_summed_with_their_weights(tmp_path):
    reward = save_decoder_reward(tmp_path / "reward")
    recipe = make_recipe(
        tmp_path, reward_model_path=reward, reward_weights=[2.0, -3.0], total_episodes=16, missing_eos_penalty=None
    )
    run(load_recipe("ppo", recipe))
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    parts = first["objective/score/reward_model"], first["objective/score/rules_for_test:count_a"]
    assert first["objective/score"] == pytest.approx(2 * parts[0] - 3 * parts[1], abs=1e-5)


def test_the_frozen_models_stay_as_they_were(tmp_path):
    reward = save_decoder_reward(tmp_path / "reward")
    recipe = load_recipe("ppo", make_recipe(tmp_path, reward_funcs=[], reward_model_path=reward))
    models = load_models(recipe, check_ppo_inputs(recipe), batch_plan(recipe, 1), World(0, 1, torch.device("cpu")))
    frozen = [*models.reference.module.parameters(), *models.rewards.sources[0].model.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)


def test_a_best_checkpoint_must_keep_to_the_kl_budget(tmp_path, capsys):
    recipe = make_recipe(tmp_path, total_episodes=32, eval_steps=1, max_kl=1e-9)
    results = run(load_recipe("ppo", recipe))
    assert results.metrics["eval/kl"] > 0
    assert results.best["update"] == 0
    told = "the SFT model: no evaluation had a higher eval/score than its"
    assert f"`best/` {told}" in (tmp_path / "out/README.md").read_text()
    said = " ".join(capsys.readouterr().err.split())
    assert f"best/ holds {told}" in said
    assert "within 1e-09 nats of KL (max_kl)" in said
    best, sft = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out/best", "policy"))
    assert all(torch.equal(best[name], sft[name]) for name in sft)


def test_a_value_model_of_another_vocabulary(tmp_path):
    encoder = save_encoder_reward(tmp_path / "reward")
    with pytest.raises(UserError, match=r"value_model_path: .* another vocabulary"):
        run(load_recipe("ppo", make_recipe(tmp_path, value_model_path=encoder)))
