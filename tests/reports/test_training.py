"""Public reports of training on another objective than the recipe's, or of a mistake that was told too late."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from align.cli.check import check
from align.config.load import as_recipe
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.reward.train import run as run_reward
from align.sft.train import run as run_sft
from tests.reward import test_train as reward
from tests.sft.letter_rows import ROWS, nll, recipe
from tests.worlds import letter_tokenizer, metrics, save_recipe, save_tiny_policy, tiny_llama, write_jsonl


def test_the_loss_depends_on_gradient_accumulation(tmp_path):
    """https://github.com/huggingface/transformers/issues/24725, https://github.com/huggingface/transformers/pull/34191: rows of
    2 to 8 tokens, one by one; a mean of their means is another number, and another gradient."""
    save_tiny_policy(tmp_path / "base", layers=1)
    settings = recipe(tmp_path, ROWS[:4], max_steps=1, per_device_train_batch_size=1)
    run_sft(settings)
    model = tiny_llama(layers=1)
    total, count = nll(model, ROWS[:4])
    (total / count).backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert metrics(settings)[0]["train/loss"] == pytest.approx(float(total / count), abs=1e-5)
    assert metrics(settings)[0]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_margins_are_ignored_or_mixed_with_other_pairs(tmp_path):
    """https://github.com/modelscope/ms-swift/pull/9927, https://github.com/huggingface/trl/issues/718: scores [B, 1] less
    margins [B] are a square, of which every pair gets every margin."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in reward.ROWS[:4]]
    margins = [0.0, 0.5, 1.0, 4.0]
    file = write_jsonl(tmp_path / "pairs.jsonl", [{**row, "margin": m} for row, m in zip(rows, margins, strict=True)])
    settings = reward.recipe(tmp_path, max_steps=1, train_dataset=[reward.DataSource(path=file)], normalize_prompts=2)
    run_reward(settings)
    model = reward.untrained()
    gaps = [reward.score(model, p, good) - reward.score(model, p, bad) for p, good, bad in reward.ROWS[:4]]
    expected = -logsigmoid(torch.stack(gaps) - torch.tensor(margins)).mean()
    first = next(row for row in metrics(settings) if "train/loss" in row)
    assert first["train/loss"] == pytest.approx(float(expected), abs=1e-5)


KEYS = {"output_dir": "o", "train_dataset": "r", "model_name_or_path": "m"}
TOO_LATE = {
    "the optimizer of a DeepSpeed file": (
        {"deepspeed": "ds.json"},
        "optimizer: is set by the recipe's keys",
    ),
    "a schedule that needs arguments": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_type: cosine_with_min_lr needs either min_lr",
    ),
    "a metric that no evaluation has": (
        {"load_best_model_at_end": True, "metric_for_best_model": "eval_epoch", "eval_fraction": 0.1, "eval_steps": 1},
        "metric_for_best_model",
    ),
}


@pytest.mark.parametrize(("keys", "said"), TOO_LATE.values(), ids=TOO_LATE)
def test_a_setting_is_ignored_or_fails_after_hours(tmp_path, monkeypatch, keys, said):
    """https://github.com/huggingface/transformers/issues/24359, https://github.com/modelscope/ms-swift/issues/491;
    https://github.com/hiyouga/LlamaFactory/pull/4006; https://github.com/modelscope/ms-swift/issues/4323,
    https://github.com/hiyouga/LlamaFactory/issues/7906."""
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    with pytest.raises(UserError, match=said):
        as_recipe(SFTRecipe, {**KEYS, **keys})


def test_the_check_passes_and_the_run_fails(tmp_path, capsys):
    """https://github.com/OpenRLHF/OpenRLHF/issues/87: tokens without an embedding, seen in the first step."""
    save_tiny_policy(tmp_path / "base", layers=1)
    tokenizer = letter_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path / "base")
    settings = recipe(tmp_path)
    with pytest.raises(UserError, match="the tokenizer has 30 tokens, and the model 29 embeddings"):
        run_sft(settings)
    assert check.run(str(save_recipe(settings, tmp_path / "sft.yaml"))) != 0
    assert "the tokenizer has 30 tokens, and the model 29 embeddings" in " ".join(capsys.readouterr().out.split())


def test_the_best_model_is_one_that_is_worse_than_before(tmp_path):
    """https://github.com/huggingface/transformers/issues/28539, https://github.com/axolotl-ai-cloud/axolotl/issues/2424: not
    every evaluation counts, or the best checkpoint is gone; the model before training is one of them."""
    save_tiny_policy(tmp_path / "base", layers=1)
    settings = recipe(
        tmp_path, ROWS[:4], ROWS[4:6], max_steps=1, learning_rate=0.5, load_best_model_at_end=True, eval_steps=1
    )
    results = run_sft(settings)
    assert results.metrics["eval_loss"] == results.metrics["eval_loss_before"]
