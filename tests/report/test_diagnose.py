"""Faults that were injected into real runs are named, and sound runs are silent."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from align.__main__ import main
from align.report.diagnose import diagnose
from align.report.findings import correlation
from align.report.pipelines import read_pipelines
from align.report.read import read_run
from tests.report.recorded import RUNS, make_run
from tests.worlds import manifest, write_jsonl

# Recorded run -> the fault by its name, and how severe the worst is.
FAULTS = {
    "flat_scores": ("flat scores", 4),
    "kl_explosion": ("KL explosion", 4),
    "value_model": ("value model explains nothing", 3),
    "length_growth": ("length growth", 4),
    "repeated_text": ("repeated text", 4),
    "eos_loss": ("EOS loss", 4),
    "rate_too_low": ("learning rate too low", 3),
    "rate_too_high": ("learning rate too high", 4),
    "out_of_data": ("reward model out of its data", 4),
    "ensemble_disagrees": ("ensemble disagreement", 3),
}
SOUND = sorted(path.stem for path in RUNS.glob("*.json") if path.stem.startswith(("sound", "quickstart")))


@pytest.mark.parametrize("name", FAULTS)
def test_an_injected_fault_is_named_with_numbers_and_remedy(name, tmp_path, capsys):
    fault, code = FAULTS[name]
    run = make_run(name, tmp_path / name)
    found = {each.name: each for each in diagnose(read_run(run))}
    assert fault in found, found
    assert any(character.isdigit() for character in found[fault].evidence)
    assert "`" in found[fault].remedy
    assert main(["diagnose", str(run)]) == code
    assert f": {fault}: " in capsys.readouterr().out


@pytest.mark.parametrize("name", [*FAULTS, *SOUND])
def test_a_run_that_logged_few_of_its_updates(name, tmp_path):
    """With the default `logging_steps`, 10: the first line, every tenth, the last; evaluations are logged all the same."""
    run = make_run(name, tmp_path / name)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] % 10 and line not in (lines[0], lines[-1]):
            for metric in [each for each in line if each.startswith(("objective/", "policy/", "value/", "response/"))]:
                del line[metric]
    write_jsonl(run / "metrics.jsonl", lines)
    found = {each.name for each in diagnose(read_run(run))}
    assert FAULTS[name][0] in found if name in FAULTS else not found


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_is_silent(name, tmp_path, capsys):
    run = make_run(name, tmp_path / name)
    assert diagnose(read_run(run)) == []
    assert main(["diagnose", str(run)]) == 0
    assert "nothing found" in capsys.readouterr().out


def test_there_are_enough_of_both():
    assert len(FAULTS) >= 6
    assert len([name for name in SOUND if "sound" in name or "ppo" in name]) >= 6


def change(run: Path, value_of: Any, metric: str) -> dict[str, str]:
    """Faults by name, and evidence, of a run whose metric is changed: `value_of(index, value)` for every line that has it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    having = [line for line in lines if metric in line]
    for index, line in enumerate(having):
        line[metric] = value_of(index / len(having), line[metric])
    write_jsonl(run / "metrics.jsonl", lines)
    return {each.name: each.evidence for each in diagnose(read_run(run))}


# What is changed in a sound run, and the fault that it then has.
CHANGED = {
    "EOS loss": ("response/eos_rate", lambda at, value: 1 - 0.6 * at),
    "repeated text": ("response/repetition", lambda at, value: 0.5 * at),
    "clipping all the time": ("policy/clipfrac", lambda at, value: 0.4),
    "entropy collapse": ("objective/entropy", lambda at, value: value if at < 0.5 else 0.01),
    "negative KL": ("objective/kl", lambda at, value: -1.5),
    "sampling and training disagree": ("policy/first_ratio", lambda at, value: 1.2),
    "not finite": ("policy/loss", lambda at, value: None if at > 0.8 else value),
    "falling scores": ("objective/score", lambda at, value: -value),
    "objective fell": ("objective/reward", lambda at, value: -5 * at),
}


@pytest.mark.parametrize("fault", CHANGED)
def test_a_metric_that_goes_wrong_is_named(fault, tmp_path):
    metric, value_of = CHANGED[fault]
    assert set(change(make_run("sound_seed1", tmp_path / "run"), value_of, metric)) == {fault}


@pytest.mark.parametrize(
    ("stage", "metric", "value_of", "fault"),
    [
        ("1_sft", "train/loss", lambda at, value: value * (1 + 2 * at), "learning rate too high"),
        ("2_reward", "train/loss", lambda at, value: 0.69, "learning rate too low"),
        ("0_base", "train/grad_norm", lambda at, value: 80.0, "clipping all the time"),
        ("2_reward", "train/accuracy", lambda at, value: 0.999, "memorized"),
        ("2_reward", "train/margin", lambda at, value: 9.0, "overconfident"),
        ("2_reward", "eval/accuracy_low", lambda at, value: 0.48, "no better than chance"),
        ("2_reward", "eval/ceiling", lambda at, value: 0.57, "accuracy above the ceiling"),
    ],
)
def test_faults_of_the_other_stages(stage, metric, value_of, fault, tmp_path):
    run = make_run(f"quickstart_{stage}", tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    template = [line for line in lines if metric in line]
    while len([line for line in lines if metric in line]) < 8:  # a few lines are too few to tell
        lines.append({**template[-1], "step": lines[-1]["step"] + 50})
    write_jsonl(run / "metrics.jsonl", lines)
    assert fault in change(run, value_of, metric)


def test_values_that_are_worse_than_a_constant(tmp_path):
    run = make_run("sound_seed1", tmp_path / "run")
    change(run, lambda at, value: -5.0, "value/explained_variance")
    (found,) = diagnose(read_run(run))
    assert (found.name, found.title) == ("value model explains nothing", "the values are worse than a constant")


def test_a_score_beyond_what_the_reward_model_gave_to_its_pairs(tmp_path):
    make_run("quickstart_2_reward", tmp_path / "2_reward")
    run = make_run("quickstart_3_ppo", tmp_path / "3_ppo")
    record = json.loads((run / "stage.json").read_text())
    record["recipe"]["reward_model_path"] = "elsewhere/2_reward"  # found beside the run
    (run / "stage.json").write_text(json.dumps(record))
    assert diagnose(read_run(run)) == []
    told = change(run, lambda at, value: value + 6 * at, "objective/score")
    assert "the highest that the reward model gave to its held-out pairs" in told["reward model out of its data"]


def test_a_bad_report_card_of_a_reward_stage_is_told(tmp_path):
    run = make_run("quickstart_2_reward", tmp_path / "run")
    record = json.loads((run / "stage.json").read_text())
    for verdict, told in (("good", []), ("bad", ["bad: words alone."])):
        record["results"]["card"] = {"verdict": verdict, "summary": f"{verdict}: words alone", "lines": {}}
        (run / "stage.json").write_text(json.dumps(record))
        assert [each.evidence for each in diagnose(read_run(run))] == told


def test_a_run_that_died_before_its_first_line(tmp_path, capsys):
    run = make_run("quickstart_3_ppo", tmp_path / "run")
    (run / "stage.json").rename(run / "run.json")
    (run / "metrics.jsonl").unlink()
    assert main(["diagnose", str(run)]) == 3
    assert "unfinished, at step 0 of 20" in capsys.readouterr().out


def test_what_is_no_run_is_one_error(tmp_path, capsys):
    assert main(["diagnose", str(tmp_path)]) == 2
    assert main(["diagnose", str(tmp_path), "--seed", "1"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "no run in it" in told[0]


def test_rank_correlation():
    numbers = random.Random(0)
    xs, ys = ([numbers.choice([1.0, 2.0, 3.0, math.pi]) for _ in range(50)] for _ in range(2))
    assert correlation(xs, ys) == pytest.approx(spearmanr(xs, ys).statistic, abs=1e-12)
    assert correlation([1.0, 2.0], [3.0, 3.0]) == 0


def test_warnings_and_verdicts_of_the_run_itself(tmp_path, capsys):
    """Logged warnings, a verdict of no gain, and that best/ is the SFT model."""
    run = make_run("sound_seed1", tmp_path / "run")
    record = json.loads((run / "stage.json").read_text())
    record["results"] |= {
        "verdict": ["no different from SFT by judge: -0.03", "better than SFT by score: +0.7"],
        "best": {"update": 0},
    }
    (run / "stage.json").write_text(json.dumps(record))
    lines = (run / "samples.jsonl").read_text() if (run / "samples.jsonl").exists() else ""
    warning = {"step": 0, "name": "warnings", "kind": "kl_coef", "text": "kl_coef 0.05: hardly a limit"}
    (run / "samples.jsonl").write_text(lines + (json.dumps(warning) + "\n") * 2)
    found = {each.name: each.evidence for each in diagnose(read_run(run))}
    assert set(found) == {"logged warning", "no gain over SFT", "best is SFT"}
    assert found["logged warning"] == "kl_coef 0.05: hardly a limit"
    assert main(["diagnose", str(run)]) == 3
    assert "verdict: better than SFT by score: +0.7" in capsys.readouterr().out


def test_runs_come_after_what_they_start_from(tmp_path):
    names = {"kill": ("ppo", "out/sft"), "sft": ("sft", "base")}
    for name, (stage, start) in names.items():
        folder = tmp_path / name
        folder.mkdir()
        key = "sft_model_path" if stage == "ppo" else "model_name_or_path"
        (folder / "stage.json").write_text(json.dumps(manifest(stage, recipe={key: start}, results={"table": []})))
    (pipeline,) = read_pipelines([[tmp_path / "kill", tmp_path / "sft"]])
    assert [run.name for run in pipeline.runs] == ["sft", "kill"]
