"""Every stage, stopped and run again, ends like a run that was not: to the bit, alone and with two ranks.

Ranks are forked from one process that has imported everything (`tests/resume_worker.py`), with the environment that
the `deepspeed` launcher gives them; one test goes through the launcher itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.resume_worker import work
from tests.worlds import LETTERS, deepspeed_file, free_port, save_tiny_policy, write_jsonl

RULES = '''
def count_a(prompts, completions, **columns):
    """The share of a's."""
    return [text.count("a") / max(len(text), 4) for text in completions]
'''
WORDS = [("ab", "c"), ("a", "bcdef"), ("xyz", "zy"), ("k", "l"), ("mn", "opq"), ("q", "rs"), ("cc", "d"), ("b", "a")]
COMMON = {"eval_steps": 2, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 1}
TRAINER = {**COMMON, "train_batch_size": 4, "num_train_epochs": 4, "learning_rate": 1e-2, "warmup_steps": 2}
LAYOUTS = {"alone": (1, None), "zero0": (2, 0), "zero2": (2, 2), "zero3": (2, 3)}


def write_recipe(stage: str, folder: Path, zero: int | None = None, **changes: Any) -> Path:
    """A recipe of eight steps, with a checkpoint after the third, the sixth and, where TRL trains, the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resume_rules.py").write_text(RULES)
    if not (folder / "base").exists():
        save_tiny_policy(folder / "base")
    if stage == "ppo":
        rows = [{"prompt": LETTERS[i : i + 1 + i % 3]} for i in range(10)]
        keys = {
            **COMMON, "sft_model_path": str(folder / "base"), "reward_funcs": ["resume_rules:count_a"], "kl_coef": 0.02,
            "total_episodes": 64, "rollout_batch_size": 8, "minibatch_size": 4, "num_ppo_epochs": 2,
            "response_length": 5, "learning_rate": 5e-3, "temperature": 0.9, "missing_eos_penalty": 0.1,
        }  # fmt: skip
    elif stage == "reward":
        rows = [{"prompt": prompt, "chosen": word + "z", "rejected": word} for prompt, word in WORDS]
        keys = {**TRAINER, "model_name_or_path": str(folder / "base"), "normalize_prompts": 4, "response_length": 4}
    else:
        rows = [{"prompt": prompt, "completion": word} for prompt, word in WORDS]
        keys = {**TRAINER, "model_name_or_path": str(folder / "base")}
    keys |= {
        "stage": stage,
        "output_dir": str(folder / "out"),
        "train_dataset": write_jsonl(folder / "train.jsonl", rows),
        "eval_dataset": write_jsonl(folder / "eval.jsonl", rows[:3]),
        **({} if zero is None else {"deepspeed": deepspeed_file(folder / "ds.json", zero)}),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**keys, **changes}))
    return path


@pytest.fixture(scope="module")
def forks() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume_worker"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        multiprocessing.forkserver.ensure_running()
    return context


def start(forks: Any, recipe: Path, ranks: int, stall: str | None = None) -> list[BaseProcess]:
    stage, port = yaml.safe_load(recipe.read_text())["stage"], free_port()
    processes = [
        forks.Process(
            target=work, args=(stage, str(recipe), rank, ranks, port, str(recipe.with_name(f"rank{rank}.txt")), stall)
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def said(recipe: Path) -> str:
    """What rank 0 of the latest run wrote on stderr."""
    return recipe.with_name("rank0.txt").read_text()


def complete(forks: Any, recipe: Path, ranks: int) -> None:
    for process in start(forks, recipe, ranks):
        process.join()
        assert process.exitcode == 0, said(recipe)[-3000:]


def stop(processes: list[BaseProcess], how: signal.Signals = signal.SIGKILL) -> None:
    for process in processes:
        assert process.pid is not None
        assert process.is_alive(), "it ended before it could be stopped"
        os.kill(process.pid, how)
    for process in processes:
        process.join()
        assert process.exitcode != 0


def wait_for(path: Path, processes: list[BaseProcess]) -> None:
    while not path.exists():
        assert all(process.is_alive() for process in processes), "it ended before it could be stopped"
        time.sleep(0.002)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def records(out: Path) -> list[dict[str, Any]]:
    lines = [line for name in ("metrics", "samples") if (out / f"{name}.jsonl").exists()
             for line in (out / f"{name}.jsonl").read_text().splitlines()]  # fmt: skip
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time")} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    """Weights of every model to the bit, all lines but for the clock's, and the closing numbers."""
    models = [path.relative_to(theirs) for path in theirs.rglob("model.safetensors")]
    models = [path for path in models if "checkpoint" not in str(path)]
    assert models
    for model in models:
        a, b = load_file(ours / model), load_file(theirs / model)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == [], model
    assert records(ours) == records(theirs)
    results = [json.loads((out / "stage.json").read_text())["results"] for out in (ours, theirs)]
    assert results[0] == results[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_killed_while_a_checkpoint_is_written(forks, tmp_path, stage, layout):
    ranks, zero = LAYOUTS[layout]
    whole, killed = (write_recipe(stage, tmp_path / name, zero) for name in ("whole", "killed"))
    complete(forks, whole, ranks)
    processes = start(forks, killed, ranks, stall="checkpoint-6")
    wait_for(killed.with_name("stalled"), processes)
    stop(processes)
    out = killed.with_name("out")
    assert checkpoints(out) == ["checkpoint-3", "checkpoint-6"]
    assert not (out / "checkpoint-6" / "complete.json").exists()
    assert records(out)[-1]["step"] == 6
    complete(forks, killed, ranks)
    assert_same(out, whole.with_name("out"))
    assert checkpoints(out) == checkpoints(whole.with_name("out"))
