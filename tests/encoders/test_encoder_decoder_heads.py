"""Encoder-decoders as classifiers and as reward models, against transformers' own classes; and where they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import ByteLevel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PegasusConfig

from align.cli.check.check import run as run_check
from align.cli.predict import load
from align.config.encoders import ClassifyRecipe
from align.config.reward import RewardRecipe
from align.data.rows import as_response
from align.encoders.classify import run as classify
from align.errors import BadRow, UserError
from align.evaluate.reward_model import encode_for_reward
from align.models.tokenizer import load_tokenizer
from align.reward.train import run as train_reward
from reward_models.load import load_reward_model
from reward_models.responses import Responses
from reward_models.trained import ModelReward
from tests.ranks import run_stage
from tests.worlds import (
    LETTERS,
    deepspeed_file,
    letter_tokenizer,
    measured,
    save_recipe,
    save_tiny_pair_model,
    save_tiny_policy,
    trained,
    training_keys,
    write_jsonl,
)

LABELLED = [{"text": LETTERS[i : i + 1 + i % 4], "label": "ab"[i % 2]} for i in range(12)]
PAIRS = [{"prompt": LETTERS[i : i + 1 + i % 3], "chosen": LETTERS[i], "rejected": LETTERS[i + 1] * (1 + i % 2)} for i in range(12)]  # fmt: skip
KINDS = ("t5", pytest.param("bart", marks=pytest.mark.slow))


def keys(stage: str, folder: Path, kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    save_tiny_pair_model(folder / "base", kind)
    found = training_keys(stage, folder, rows[:8], rows[8:])
    del found["stage"]
    return found | {"per_device_train_batch_size": 2, "max_steps": 3}


def test_predictions_end_as_training_rows_do(tmp_path: Path) -> None:
    """The label is read at the one end of a row: a tokenizer without one gets it, a second is a bad row."""
    settings = ClassifyRecipe(**keys("classify", tmp_path, "t5", LABELLED))
    classify(settings)
    predictor = load(settings.output_dir)
    (expected,) = predictor.predict([{"text": "abc"}])
    ids, end = predictor.tokenizer("abc")["input_ids"], predictor.tokenizer.eos_token_id
    predictor.tokenizer.backend_tokenizer.post_processor = ByteLevel()  # adds nothing
    assert predictor.tokenizer("abc")["input_ids"] == [each for each in ids if each != end]
    (found,) = predictor.predict([{"text": "abc"}])
    assert found == {"predicted_label": expected["predicted_label"], "score": pytest.approx(expected["score"])}
    with pytest.raises(BadRow, match="the text of the end-of-text token </s>"):
        list(predictor.predict([{"text": "a</s>b</s>"}]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier(tmp_path: Path, kind: str) -> None:
    settings = ClassifyRecipe(**keys("classify", tmp_path, kind, LABELLED))
    result = classify(settings)
    model = AutoModelForSequenceClassification.from_pretrained(settings.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.output_dir)
    losses = []
    for row in LABELLED[8:]:  # each alone, without padding
        logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([model.config.label2id[row["label"]]])))
    assert result.metrics["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=2e-6)
    assert result.metrics["eval_loss"] != pytest.approx(result.metrics["eval_loss_before"], abs=1e-3)


@pytest.mark.parametrize(
    "method", ["freeze", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "ia3"))]
)
def test_methods_of_a_classifier(tmp_path: Path, method: str) -> None:
    more = {"freeze_layers": 1} if method == "freeze" else {}
    base = ClassifyRecipe(**keys("classify", tmp_path, "t5", LABELLED), method=method, **more)
    classify(base)
    before = AutoModelForSequenceClassification.from_pretrained(base.model_name_or_path, num_labels=2).state_dict()
    changed = {name for name, weight in trained(base).items() if not torch.equal(weight, before.get(name, weight * 0))}
    assert any(name.startswith("classification_head") for name in changed)
    assert ("transformer.encoder.block.0.layer.0.SelfAttention.k.weight" in changed) == (method != "freeze")
    assert "transformer.decoder.block.1.layer.0.SelfAttention.k.weight" in changed


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model(tmp_path: Path, kind: str) -> None:
    settings = RewardRecipe(**keys("reward", tmp_path, kind, PAIRS), normalize_prompts=4)
    result = train_reward(settings)
    plain = AutoModelForSequenceClassification.from_pretrained(settings.output_dir).eval()
    tokenizer = load_tokenizer(settings.output_dir)

    def score(prompt: str, response: str) -> float:
        return float(plain(input_ids=torch.tensor([tokenizer(prompt + response)["input_ids"]])).logits)

    gaps = torch.tensor(
        [score(row["prompt"], row["chosen"]) - score(row["prompt"], row["rejected"]) for row in PAIRS[8:]]
    )
    loss = -torch.nn.functional.logsigmoid(gaps).mean()
    assert result.metrics["eval_loss"] == pytest.approx(float(loss), abs=1e-5)
    # The scores of PPO, best-of-n and the report card: of a padded batch, of rows that hold the end token's text too.
    mean = plain.config.score_mean
    source = ModelReward(
        "r", load_reward_model(settings.output_dir), batch_size=3, max_length=None,
        encode=lambda prompt, text, tools: encode_for_reward(tokenizer, False, prompt, text, tools, ends_once=True),
    )  # fmt: skip
    prompts, texts = ["ab", "c", "d</s>e"], ["cde", "f</s>", "ab"]
    batch = Responses(
        prompts, texts, [as_response(p, t) for p, t in zip(prompts, texts, strict=True)], [[]] * 3, [[]] * 3
    )  # type: ignore[arg-type]
    expected = [score("ab", "cde"), score("c", "f"), score("de", "ab")]
    torch.testing.assert_close(source.score(batch), torch.tensor(expected) - mean, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_ranks_train_the_same_reward_model(tmp_path: Path) -> None:
    settings = RewardRecipe(**keys("reward", tmp_path, "bart", PAIRS), normalize_prompts=4)
    train_reward(settings)
    file = deepspeed_file(tmp_path / "zero.json", 2)
    shared = RewardRecipe(
        **keys("reward", tmp_path, "bart", PAIRS) | {"output_dir": str(tmp_path / "shared"), "deepspeed": file},
        normalize_prompts=4,
    )
    done = run_stage("reward", save_recipe(shared, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=5e-5, rtol=0)
    assert measured(shared)[-1].keys() == measured(settings)[-1].keys()


def test_rows_with_an_end_of_their_own_are_bad(tmp_path: Path) -> None:
    settings = ClassifyRecipe(**keys("classify", tmp_path, "t5", LABELLED))
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a</s>b", "label": "a"}, *LABELLED])
    with pytest.raises(UserError, match="the text of the end-of-text token </s>, at which an encoder-decoder is read"):
        classify(settings)


def test_one_without_a_classifier_in_transformers(tmp_path: Path) -> None:
    settings = ClassifyRecipe(**keys("classify", tmp_path, "bart", LABELLED))
    PegasusConfig(vocab_size=29, d_model=8, encoder_layers=1, decoder_layers=1).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="transformers has no sequence classifier of pegasus"):
        classify(settings)


@pytest.mark.parametrize(
    ("stage", "own", "key"),
    [
        ("ppo", {"sft_model_path": "t5", "reward_funcs": ["rewards:length"], "total_episodes": 64}, "sft_model_path"),
        ("ppo", {"sft_model_path": "llama", "reward_funcs": ["rewards:length"], "value_model_path": "t5", "total_episodes": 64}, "value_model_path"),
        ("bon", {"model_name_or_path": "t5", "reward_funcs": ["rewards:length"]}, "model_name_or_path"),
        ("judge-reward", {"reward_funcs": ["rewards:length"], "policy_path": "t5"}, "policy_path"),
    ],
)  # fmt: skip
def test_policies_are_refused_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stage: str, own: dict[str, Any], key: str
) -> None:  # fmt: skip
    save_tiny_pair_model(tmp_path / "t5", "t5")
    save_tiny_policy(tmp_path / "llama")
    letter_tokenizer().save_pretrained(tmp_path / "llama")
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [len(each) for each in completions]\n"
    )
    data = "eval_dataset" if stage == "judge-reward" else "train_dataset"
    rows = PAIRS if stage == "judge-reward" else [{"prompt": row["prompt"]} for row in PAIRS]
    lines = [
        f"stage: {stage}",
        f"output_dir: {tmp_path / 'out'}",
        f"{data}: {write_jsonl(tmp_path / 'rows.jsonl', rows)}",
    ]
    lines += [
        f"{name}: {value if not str(value).endswith(('t5', 'llama')) else tmp_path / value}"
        for name, value in own.items()
    ]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_check(str(tmp_path / "recipe.yaml")) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"{key}: {tmp_path / 't5'} is an encoder-decoder (t5), which cannot stand here: sft, mlm, classify, reward, evaluate take it"
        in said
    )
