"""The quickstart, cut to seconds: all four stages alone (in forks), under launchers on two nodes, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.cli import run
from tests import ranks
from tests.documented_metrics import undocumented
from tests.ranks import run_recipes, two_nodes
from tests.worlds import deepspeed_file

RECIPES = Path(__file__).parents[2] / "recipes" / "quickstart"
STAGES = ["0_base", "1_sft", "2_reward", "3_ppo"]
CUT = ["--max_steps", "4", "--train_dataset.generator_kwargs.num_rows", "300", "--max_eval_rows", "32",
       "--normalize_prompts", "32", "--total_episodes", "128", "--rollout_batch_size", "64", "--minibatch_size", "32",
       "--response_length", "16", "--logging_steps", "1", "--eval_fraction", "0.1",
       "--normalize_scores", "false"]  # fmt: skip
# A reward model of four steps gives all responses nearly the same score: normalized, its rounding would decide what PPO does.


def align(folder: Path, *more: str, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align", "run", str(RECIPES), *CUT, *more]
    environment = {**os.environ, "COLUMNS": "160", "WANDB_MODE": "offline", **env}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def align_in_forks(*words: str) -> int:
    """`align WORDS`, whose stages are forks of this process, which has imported the libraries."""
    from align.__main__ import main

    def fork(command: list[str], environment: Mapping[str, str]) -> int:
        assert (command[:3], environment) == ([sys.executable, "-m", "align"], {})
        sys.stdout.flush()
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = main(command[3:])
        sys.stdout.flush()
        os._exit(code)

    run.run_process = fork
    return main(words)


def manifests(folder: Path) -> list[dict]:
    return [json.loads((folder / "outputs" / "quickstart" / stage / "stage.json").read_text()) for stage in STAGES]


def has_gpu() -> bool:
    """Whether the machine has one; the tests' own processes are kept from it (`tests/conftest.py`)."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, check=False).returncode == 0


def assert_same_tables(ours: Path, theirs: Path) -> None:
    """The closing tables of two quickstarts, in these folders, are the same but for rounding."""
    for one, other in zip(manifests(ours), manifests(theirs), strict=True):
        for mine, its in zip(one["results"]["table"], other["results"]["table"], strict=True):
            assert [value is None for value in mine] == [value is None for value in its]
            numbers = [(a, b) for a, b in zip(mine[1:], its[1:], strict=True) if a is not None]
            assert numbers
            for a, b in numbers:
                assert a == pytest.approx(b, abs=0.02, rel=0.01), (one["stage"], mine[0])


@pytest.fixture(scope="module")
def alone(shared_folder) -> tuple[Path, subprocess.CompletedProcess[str]]:
    def make(folder: Path) -> None:
        words = ["run", str(RECIPES), *CUT, "--report_to", "wandb"]
        done = ranks.run(
            align_in_forks, *words, ranks=1, cwd=folder, log=folder / "fork", env={"COLUMNS": "160"}, timeout=900
        )
        (folder / "done.pickle").write_bytes(pickle.dumps(done))

    folder = shared_folder("quickstart", make)
    return folder, pickle.loads((folder / "done.pickle").read_bytes())


def test_it_ends_with_a_table_of_before_and_after(alone):
    _, done = alone
    assert done.returncode == 0, done.stderr[-3000:]
    for measure in (
        "held-out loss",
        "accuracy ceiling (annotator noise; ",
        "win rate by true reward",
        "KL from SFT",
        "EOS rate",
    ):
        assert measure in done.stdout


def test_it_leaves_a_report(alone):
    folder, done = alone
    assert "report: outputs/quickstart/report.html" in done.stdout
    html = (folder / "outputs" / "quickstart" / "report.html").read_text(encoding="utf-8")
    for words in ("0_base", "1_sft", "2_reward", "3_ppo", "Report card of the reward", "Samples side by side", "GiB"):
        assert words in html


def test_nobody_else_chatters(alone):
    _, done = alone
    said = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if "WARNING" in line or "Warning" in line or "it/s" in line
    ]
    assert said == []


def test_plain_transformers_loads_what_each_stage_leaves(alone):
    folder, _ = alone
    outputs = folder / "outputs" / "quickstart"
    for stage in ("0_base", "1_sft", "3_ppo"):
        AutoModelForCausalLM.from_pretrained(outputs / stage)
    reward = AutoModelForSequenceClassification.from_pretrained(outputs / "2_reward")
    tokenizer = AutoTokenizer.from_pretrained(outputs / "2_reward")
    assert reward.config.num_labels == 1
    # The scores that the manifest recorded, by the plain model and its own pooling.
    check = json.loads((outputs / "2_reward" / "stage.json").read_text())["score_check"]
    assert check["ids"]
    for ids, score in zip(check["ids"], check["scores"], strict=True):
        with torch.no_grad():
            logit = float(reward(input_ids=torch.tensor([ids])).logits)
        assert logit - reward.config.score_mean == pytest.approx(score, abs=1e-4)
        assert ids[-1] == tokenizer.eos_token_id


def test_every_stage_logs_documented_metrics_and_to_one_group(alone):
    folder, _ = alone
    for stage in STAGES:
        output = folder / "outputs" / "quickstart" / stage
        names = {name for line in (output / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
        assert undocumented(names - {"step", "time"}) == []
        assert (output / "README.md").exists()
        assert (output / "wandb_run.json").exists()


def test_a_second_run_does_nothing_but_show_the_table(alone):
    folder, _ = alone
    before = manifests(folder)
    again = align(folder, "--report_to", "wandb")
    assert again.returncode == 0, again.stderr[-3000:]
    assert manifests(folder) == before
    assert "win rate by true reward" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_and_zero_give_the_results_of_one(alone, tmp_path, monkeypatch, stage):
    folder, _ = alone
    settings = deepspeed_file(tmp_path / "ds.json", stage)
    if stage == 3:  # a launcher on each of two nodes; pre-training is SFT as well, and 1_sft goes through them
        base = Path("outputs", "quickstart", "0_base")
        shutil.copytree(folder / base, tmp_path / base)
        hostfile, environment = two_nodes(tmp_path)
        done = align(tmp_path, "--hostfile", str(hostfile), "--deepspeed", settings, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("deepspeed with 2 processes") == 3
    else:
        monkeypatch.chdir(tmp_path)
        run_recipes(RECIPES, 2, [*CUT, "--deepspeed", settings])
    assert_same_tables(folder, tmp_path)
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))


@pytest.mark.skipif(not has_gpu(), reason="this machine has no GPU")
@pytest.mark.parametrize("launched", [[], ["--num_gpus", "1"]], ids=["alone", "zero3"])
def test_a_gpu_gives_the_results_of_the_cpu(alone, tmp_path, launched):
    folder, _ = alone
    settings = ["--deepspeed", deepspeed_file(tmp_path / "ds.json", 3)] if launched else []
    done = align(tmp_path, *launched, *settings, env={"CUDA_VISIBLE_DEVICES": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_tables(folder, tmp_path)


@pytest.mark.skipif(not has_gpu(), reason="this machine has no GPU")
def test_bfloat16_on_a_gpu_passes_the_self_checks(tmp_path):
    done = align(tmp_path, "--bf16", "true", env={"CUDA_VISIBLE_DEVICES": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "self-checks: all finite" in done.stdout + done.stderr
