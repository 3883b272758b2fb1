"""Checkpoints of the stages that run a Trainer: data that no program hides in, and that any layout goes on from."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from align.engine.distributed import World
from align.errors import UserError
from align.runs.checkpoint import complete_checkpoints, mark_complete, read_state, synced_sums
from align.trainer.checkpoint import SafeCheckpoints, check_trainer_state, read_generators, write_generators
from tests import ranks as ranks_of
from tests.encoders.test_classify import save_tiny_bert
from tests.runs.test_resume import WORDS, assert_same
from tests.trainer.leg_worker import leg
from tests.worlds import deepspeed_file, save_tiny_policy, write_jsonl

ALONE, LAUNCHED = (1, None), (2, None)
ONE = World(0, 1, torch.device("cpu"))
# What does not depend on how a batch is split, and is logged in every layout.
EXACT = ("step", "train/loss", "train/learning_rate", "train/num_tokens")
EXACT += ("eval/loss", "eval/perplexity", "eval/accuracy", "eval/mean_token_accuracy", "eval/macro_f1")


def write_recipe(stage: str, folder: Path, zero: int | None = None, **changes: Any) -> Path:
    """A recipe of ten steps in three and a half epochs, with a checkpoint after every second one."""
    rows = {
        "sft": [{"prompt": prompt, "completion": word} for prompt, word in WORDS],
        "reward": [{"prompt": prompt, "chosen": word + "z", "rejected": word} for prompt, word in WORDS],
        "classify": [{"text": word, "label": prompt[0] < "k"} for prompt, word in WORDS],
    }[stage]
    base = folder.parent / f"base-{stage}"
    if not base.exists():
        if stage == "classify":
            save_tiny_bert(base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        else:
            save_tiny_policy(base)
    folder.mkdir(exist_ok=True)
    keys = {
        "stage": stage,
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(base),
        "train_dataset": write_jsonl(folder / "train.jsonl", rows),
        "eval_dataset": write_jsonl(folder / "eval.jsonl", rows[:3]),
        "eval_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "max_steps": 10,
        "train_batch_size": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,
        "warmup_steps": 2,
        **({} if zero is None else {"deepspeed": deepspeed_file(folder / f"ds{zero}.json", zero)}),
        **({"normalize_prompts": 4, "response_length": 4, "method": "lora", "lora_r": 2} if stage == "reward" else {}),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**keys, **changes}))
    return path


def run(recipe: Path, ranks: int = 1, last: int | None = None, stop: int | None = None) -> ranks_of.Ranks:
    """Run its stage, up to the checkpoint of step `last`, to a SIGTERM during step `stop`, or to its end."""
    stage = yaml.safe_load(recipe.read_text())["stage"]
    started = ranks_of.start(leg, stage, str(recipe), last, stop, ranks=ranks, log=recipe.with_name("rank"))
    assert started.wait() == [143 if stop else 0] * ranks, started.stderr[-3000:]
    return started


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name in EXACT} for line in lines]


def assert_close(ours: Path, theirs: Path, tolerance: float) -> None:
    """Weights and metrics of two runs; with tolerance 0 to the bit."""
    weights = [load_file(folder / "out" / "model.safetensors") for folder in (ours, theirs)]
    torch.testing.assert_close(*weights, atol=tolerance, rtol=0)
    assert [line["step"] for line in metrics(ours)] == [line["step"] for line in metrics(theirs)]
    for mine, other in zip(metrics(ours), metrics(theirs), strict=True):
        assert mine == pytest.approx(other, abs=10 * tolerance)


@pytest.fixture(scope="module")
def whole(shared_folder) -> Callable[[str], Path]:
    """The folder of an uninterrupted run of a stage on one process."""
    return lambda stage: shared_folder(f"trainer-{stage}", lambda folder: run(write_recipe(stage, folder)))


class TestLayouts:
    """A run that goes through several layouts, two steps in each, is the run of one process."""

    @pytest.mark.parametrize(
        ("stage", "layouts"),
        [
            ("sft", [(2, 3), ALONE, (2, 2), LAUNCHED, (1, 3)]),
            ("reward", [ALONE, (2, 3), (2, 0)]),
            ("classify", [(2, 3), LAUNCHED, (1, 1)]),
        ],
    )
    def test_a_run_that_moves_is_the_run_that_stays(self, whole, tmp_path, stage, layouts):
        for index, (ranks, zero) in enumerate(layouts, 1):
            last = None if index == len(layouts) else 2 * index
            run(write_recipe(stage, tmp_path, zero, per_device_train_batch_size=1 + index % 2), ranks, last)
        assert_close(tmp_path, whole(stage), tolerance=2e-5)

    def test_the_random_generators_of_another_number_of_ranks_start_anew(self, tmp_path):
        def drawn(rank: int, ranks: int, step: int, seed: int = 1) -> float:
            args = SimpleNamespace(process_index=rank, world_size=ranks, seed=seed)
            trainer = SimpleNamespace(args=args, state=SimpleNamespace(global_step=step))
            trainer._generators_file = lambda folder: SafeCheckpoints._generators_file(trainer, folder)
            SafeCheckpoints._load_rng_state(trainer, str(tmp_path))
            return float(torch.rand(1))

        write_generators(tmp_path / "random" / "0-of-2.json")
        expected = float(torch.rand(1))
        assert drawn(0, 2, step=4) == expected
        seeds = [(0, 1, 4), (0, 3, 4), (1, 3, 4), (0, 1, 5), (0, 1, 4, 2)]
        values = [drawn(*place) for place in seeds]
        assert values == [drawn(*place) for place in seeds]
        assert values[0] == values[1], "one rank's place says it all"
        assert len({expected, *values[1:]}) == len(seeds)


def test_intervals_are_those_of_the_recipe_that_goes_on(tmp_path):
    run(write_recipe("sft", tmp_path), last=4)
    run(write_recipe("sft", tmp_path, save_steps=5, logging_steps=3))
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == ["checkpoint-5", "checkpoint-10"]
    logged = [line["step"] for line in metrics(tmp_path) if "train/loss" in line]
    assert logged == [1, 2, 3, 4, 5, 6, 9, 10]  # what is saved is logged, too


@pytest.mark.parametrize(("stage", "ranks"), [("sft", [2, 2]), ("classify", [2, 1])])
def test_a_stop_adds_nothing_to_the_metrics(tmp_path, stage, ranks):
    """The steps before it count in the means that are logged after it, on the same ranks to the bit."""
    ours, theirs = (
        write_recipe(stage, tmp_path / name, save_steps=None, logging_steps=4, max_steps=5) for name in "ab"
    )
    run(ours, ranks[0], stop=3)
    run(ours, ranks[1])
    run(theirs, ranks[1])
    assert_close(tmp_path / "a", tmp_path / "b", tolerance=2e-6)
    if ranks[0] == ranks[1]:
        assert_same(tmp_path / "a" / "out", tmp_path / "b" / "out")


def test_a_rank_sums_and_syncs_its_own_files_alone(tmp_path, monkeypatch):
    """The others may still be writing: their files come and go meanwhile."""
    for name in ("config.json", "state/rank-00000.safetensors", "random/.1-of-2.json.77"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    synced = []
    monkeypatch.setattr("align.runs.files.sync", synced.append)
    assert synced_sums(tmp_path, apart=("state", "random")) == {"config.json": [11, zlib.crc32(b"config.json")]}
    assert synced == [tmp_path / "config.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("[]", r"expected a mapping, got \[\]"),
        ("{}", "`global_step` is missing"),
        ('{"global_step": 3}', "`log_history` is missing"),
        ('{"global_step": 3, "log_history": [], "best_global_step": null, "stateful_callbacks": {}}', "checkpoint-4, got 3"),
        ('{"global_step": 4, "log_history": [], "best_global_step": "4/..", "stateful_callbacks": {}}', "a whole number"),
    ],
)  # fmt: skip
def test_an_odd_trainer_state_is_one_error(tmp_path, text, said):
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    if text is not None:
        (checkpoint / "trainer_state.json").write_text(text)
    with pytest.raises(UserError, match=f"checkpoint-4/trainer_state.json: .*{said}"):
        check_trainer_state(checkpoint)


@pytest.mark.parametrize("text", ["{}", "[]", '{"python": [3, [1], null]}', '{"python": 0}'])
def test_odd_random_generators_are_one_error(tmp_path, text):
    (tmp_path / "0-of-1.json").write_text(text)
    with pytest.raises(UserError, match=r"0-of-1\.json: expected the state of random generators"):
        read_generators(tmp_path / "0-of-1.json")


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), float(torch.randn(1))]

    draw()  # an odd number of Gaussians: Python and numpy keep the second of each pair
    write_generators(tmp_path / "random.json")
    expected = [draw(), draw()]
    read_generators(tmp_path / "random.json")
    assert [draw(), draw()] == expected


PICKLES = [
    "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "rng_state_1.pth",
    "pytorch_model.bin", "adapter_model.bin", "training_args.bin", "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt",
]  # fmt: skip


def plant_pickles(folder: Path, marker: Path) -> None:
    """Files of the names that transformers, PEFT and DeepSpeed unpickle; each creates `marker` when it is."""

    class Touch:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    for name in PICKLES:
        torch.save({"state": Touch()}, folder / name)


@pytest.mark.parametrize(
    ("stage", "ranks", "zero", "changes"),
    [
        ("sft", 1, None, {}),
        ("sft", 1, None, {"method": "lora", "lora_r": 2, "load_best_model_at_end": True, "eval_steps": 2}),
        ("sft", 2, 2, {"load_best_model_at_end": True, "eval_steps": 2}),
        ("reward", 2, 3, {}),
        ("classify", 2, None, {}),
    ],
)
def test_a_checkpoint_is_data_and_pickles_in_it_are_never_opened(whole, tmp_path, stage, ranks, zero, changes):
    recipe = write_recipe(stage, tmp_path, zero, **changes)
    run(recipe, ranks, last=4)
    checkpoints = complete_checkpoints(tmp_path / "out")
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4"]
    for checkpoint in checkpoints:
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".safetensors", ".json"}, files
        for path in [*checkpoint.glob("model.*"), *checkpoint.glob("adapter_model.*")]:
            path.unlink()  # or the pickle of that name would not be looked for
        plant_pickles(checkpoint, tmp_path / "ran")
        (checkpoint / "latest").write_text("global_step4")
        (checkpoint / "global_step4").mkdir()
        plant_pickles(checkpoint / "global_step4", tmp_path / "ran")
        state = {name: value for name, value in read_state(checkpoint).items() if name not in ("files", "digest")}
        (checkpoint / "complete.json").unlink()
        mark_complete(checkpoint, state, 9, ONE, synced_sums(checkpoint))  # whoever writes files writes their sums
    records = (tmp_path / "out" / "metrics.jsonl").read_text()
    finished = run(recipe, ranks)
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "metrics.jsonl").read_text().startswith(records), (
        finished.stderr
    )  # it went on from there
    if not changes:
        assert_close(tmp_path, whole(stage), tolerance=2e-5 if ranks > 1 else 0)


def test_those_pickles_run_when_they_are_opened(tmp_path):
    plant_pickles(tmp_path, tmp_path / "ran")
    torch.load(tmp_path / PICKLES[0], weights_only=False)
    assert (tmp_path / "ran").exists()
