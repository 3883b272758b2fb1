"""Not overfitting: the best model instead of the last, and a stop when nothing gets better."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.config.load import load_recipe
from align.errors import UserError
from align.runs.checkpoint import complete_checkpoints
from align.sft.train import run
from tests.sft.letter_rows import nll, recipe
from tests.worlds import metrics, tiny_llama, trained, unfinished

HELD_OUT = [("ab", "d"), ("k", "m"), ("q", "zs"), ("b", "c")]
# Four rows have prompts of their own: 12 steps, in which the held-out loss falls at first and then rises.
SETTINGS = {"eval_rows": HELD_OUT, "num_train_epochs": 12, "learning_rate": 2e-2, "eval_steps": 2}


def evaluations(settings) -> list[tuple[int, float]]:
    return [(row["step"], row["eval/loss"]) for row in metrics(settings) if "eval/loss" in row]


def held_out_loss(settings) -> float:
    with torch.no_grad():
        total, count = nll(AutoModelForCausalLM.from_pretrained(settings.output_dir), HELD_OUT)
    return float(total / count)


def test_the_best_model_is_saved_instead_of_the_last(tmp_path):
    settings = recipe(tmp_path, **SETTINGS, load_best_model_at_end=True, save_total_limit=1)
    results = run(settings)
    seen = evaluations(settings)
    during, closing = seen[1:-1], seen[-1]
    best_step, best = min(during, key=lambda pair: pair[1])
    assert best < during[-1][1] - 0.05, "the test wants a model that gets worse"
    assert closing[1] == results.metrics["eval_loss"] == pytest.approx(best, abs=1e-6)
    assert held_out_loss(settings) == pytest.approx(best, abs=1e-5)
    assert [path.name for path in complete_checkpoints(settings.output_dir)] == [
        f"checkpoint-{best_step}",
        "checkpoint-12",
    ]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_model_before_training_may_be_the_best(tmp_path, capsys, method):
    keys = {**SETTINGS, "learning_rate": 0.5 if method == "full" else 20.0, "num_train_epochs": 2, "eval_steps": 1}
    settings = recipe(tmp_path, **keys, load_best_model_at_end=True, method=method)
    results = run(settings)
    (_, before), *after = evaluations(settings)
    assert min(loss for _, loss in after) > before
    assert results.metrics["eval_loss"] == results.metrics["eval_loss_before"] == before
    base = tiny_llama().state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in trained(settings).items())
    assert held_out_loss(settings) == pytest.approx(before, abs=1e-5)
    assert "so the model that training started from is saved" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_goes_on_elsewhere_still_has_the_best(tmp_path):
    """Its folder was renamed after a kill in the closing evaluation; then the best checkpoint is damaged."""
    whole = recipe(tmp_path, **SETTINGS, load_best_model_at_end=True, save_total_limit=1)
    run(whole)
    expected = trained(whole)
    out = Path(whole.output_dir).rename(tmp_path / "renamed")
    (out / "stage.json").rename(out / "run.json")
    renamed = dataclasses.replace(whole, output_dir=str(out))
    run(renamed)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained(renamed).items())

    (out / "stage.json").rename(out / "run.json")
    best = complete_checkpoints(out)[0]
    content = bytearray((best / "state" / "rank-00000.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (best / "state" / "rank-00000.safetensors").write_bytes(content)
    with pytest.raises(
        UserError, match=f"{best.name}: damaged, state/rank-00000.safetensors has other bytes.* the best"
    ):
        run(renamed)


def test_another_metric_may_choose(tmp_path):
    settings = recipe(
        tmp_path, **SETTINGS, load_best_model_at_end=True, metric_for_best_model="eval_mean_token_accuracy"
    )
    results = run(settings)
    accuracies = [row["eval/mean_token_accuracy"] for row in metrics(settings) if "eval/loss" in row]
    assert results.metrics["eval_token_accuracy"] == max(accuracies[1:])


def test_it_stops_when_nothing_gets_better(tmp_path):
    settings = recipe(tmp_path, **SETTINGS, early_stopping_patience=2)
    run(settings)
    losses = [loss for _, loss in evaluations(settings)[1:]]
    last = evaluations(settings)[-1][0]
    assert last < 12
    best = min(range(len(losses)), key=losses.__getitem__)
    assert best == len(losses) - 3, "two more evaluations after the best one"


def test_how_patient_it_still_is_survives_a_kill(tmp_path):
    """What a kill right after the checkpoint of the first evaluation that was no better leaves behind."""
    whole = recipe(tmp_path, **SETTINGS, early_stopping_patience=2, save_steps=2, save_total_limit=99)
    run(whole)
    steps = [step for step, _ in evaluations(whole)]
    out = shutil.copytree(whole.output_dir, tmp_path / "cut")
    unfinished(out)
    for folder in complete_checkpoints(out):
        if int(folder.name.rsplit("-", 1)[1]) > steps[-2]:
            shutil.rmtree(folder)
    cut = dataclasses.replace(whole, output_dir=str(out))
    run(cut)
    assert [step for step, _ in evaluations(cut)] == steps
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(cut).items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("load_best_model_at_end: true", "load_best_model_at_end: needs evaluations during training; set eval_steps"),
        ("early_stopping_patience: 2", "early_stopping_patience: needs evaluations"),
        ("early_stopping_patience: 2\neval_steps: 2\neval_fraction: 0", "needs held-out rows"),
        ("load_best_model_at_end: true\neval_steps: 4\nsave_steps: 6", r"save_steps: expected eval_steps \(4\)"),
        (
            "early_stopping_patience: 2\neval_steps: 2\nmetric_for_best_model: eval_los",
            r"sft.yaml:6: metric_for_best_model: no metric eval_los; did you mean 'eval_loss'\?; this stage evaluates .*eval_gap",
        ),
    ],
)
def test_refused(tmp_path, changes, words):
    (tmp_path / "sft.yaml").write_text(f"output_dir: o\nmodel_name_or_path: m\ntrain_dataset: d.jsonl\n{changes}\n")
    with pytest.raises(UserError, match=words):
        load_recipe("sft", str(tmp_path / "sft.yaml"))


@pytest.mark.parametrize(
    ("name", "changes", "last"),
    [
        ("eval_spell/loss", {"early_stopping_patience": 2}, "eval_gap"),
        ("eval_bleu", {"load_best_model_at_end": True, "eval_metrics": ["exact_match"]}, "eval_exact_match"),
    ],
)
def test_a_metric_that_the_evaluation_before_the_first_step_does_not_have(tmp_path, name, changes, last):
    """A task's name is known from the rows, and some metrics name their numbers as they compute them."""
    settings = recipe(tmp_path, **SETTINGS, **changes, metric_for_best_model=name)
    with pytest.raises(UserError, match=rf"metric_for_best_model: no metric {name}.*eval_loss, .*{last}\.$"):
        run(settings)
    assert not (tmp_path / "out").exists()
