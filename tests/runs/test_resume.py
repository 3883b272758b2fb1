"""Every stage, stopped and run again, ends like a run that was not: to the bit, alone and with two ranks.

Ranks are forked (`tests/ranks.py`), and what they run is in `tests/runs/resume_worker.py`; one test goes through the
`deepspeed` launcher.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

import align.runs.files
from align.config.load import load_recipe
from align.config.sft import SFTRecipe
from align.engine.distributed import World
from align.errors import OtherRun, UserError
from align.reward import train as reward
from align.runs.checkpoint import complete_checkpoints, find_corruption, mark_complete, synced_sums
from align.runs.files import digest
from align.runs.output_folder import claim
from align.runs.own_files import own
from align.runs.run_record import recipe_dict
from align.runs.stage import last_checkpoint, layout
from reward_models.heads import init_head
from tests import ranks as ranks_of
from tests.ranks import Ranks, launched
from tests.runs.resume_worker import work
from tests.worlds import (
    LETTERS,
    claimed,
    deepspeed_file,
    letter_tokenizer,
    save_tiny_policy,
    tiny_llama,
    write_jsonl,
)

RULES = '''
def count_a(prompts, completions, **columns):
    """The share of a's."""
    return [text.count("a") / max(len(text), 4) for text in completions]
'''
WORDS = [("ab", "c"), ("a", "bcdef"), ("xyz", "zy"), ("k", "l"), ("mn", "opq"), ("q", "rs"), ("cc", "d"), ("b", "a")]
WORDS += [("st", "uv"), ("w", "xyzab"), ("efg", "h"), ("ij", "kl")]
COMMON = {"eval_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 1}
TRAINER = {**COMMON, "train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "warmup_steps": 2}
LAYOUTS = {"alone": (1, None), "zero0": (2, 0), "zero2": (2, 2), "zero3": (2, 3)}
EVERY_TIME = {("sft", "zero3"), ("reward", "alone"), ("ppo", "alone"), ("ppo", "zero3")}  # the others are slow


def write_recipe(stage: str, folder: Path, zero: int | None = None, **changes: Any) -> Path:
    """A recipe of six steps (where TRL trains, two epochs), with a checkpoint after every second one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resume_rules.py").write_text(RULES)
    if not (folder / "base").exists():
        save_tiny_policy(folder / "base")
    if stage == "ppo":
        rows = [{"prompt": LETTERS[i : i + 1 + i % 3]} for i in range(10)]
        keys = {
            **COMMON, "per_device_train_batch_size": 2, "sft_model_path": str(folder / "base"), "reward_funcs": ["resume_rules:count_a"], "kl_coef": 0.02,
            "total_episodes": 48, "rollout_batch_size": 8, "minibatch_size": 4, "num_ppo_epochs": 1,
            "response_length": 5, "learning_rate": 9e-3, "temperature": 0.9, "missing_eos_penalty": 0.1,
            "ema_decay": 0.8, "kl_target": 0.05, "kl_horizon": 100, "normalize_scores": True,  # each has a state
            "judge_reward_model_path": save_judge(folder / "judge"), "early_stopping_patience": 9,  # they count the falls
            "eval_steps": 2, "max_kl": 2.7,  # KL is 2.3 at update 2 and above 3 later, so the best one is before every stop
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


def save_judge(folder: Path) -> str:
    """A reward model for PPO to be judged by, which knows nothing."""
    config = tiny_llama().config
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(type(config)(**{**config.to_dict(), "num_labels": 1}))
    init_head(model, 5)
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def start(recipe: Path, ranks: int, stall: str | None = None) -> Ranks:
    stage = yaml.safe_load(recipe.read_text())["stage"]
    return ranks_of.start(work, stage, str(recipe), stall, ranks=ranks, log=recipe.with_name("rank"))


def complete(recipe: Path, ranks: int) -> Ranks:
    started = start(recipe, ranks)
    assert started.wait() == [0] * ranks, started.stderr[-3000:]
    return started


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def metrics(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines without what the clock says."""
    lines = (out / name).read_text().splitlines() if (out / name).exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time", "memory/"))} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    """Weights of every model to the bit, all lines but for the clock's, and the closing numbers."""
    models = [path.relative_to(theirs) for path in theirs.rglob("*model.safetensors")]
    models = [path for path in models if "checkpoint" not in str(path)]
    assert models
    for model in models:
        a, b = load_file(ours / model), load_file(theirs / model)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == [], model
    assert metrics(ours) == metrics(theirs)
    assert metrics(ours, "samples.jsonl") == metrics(theirs, "samples.jsonl")
    results = [json.loads((out / "stage.json").read_text())["results"] for out in (ours, theirs)]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def whole(shared_folder) -> Callable[[str, str], Path]:
    """The output folder of an uninterrupted run of a stage in a layout; each is run once."""

    def run_once(stage: str, layout: str) -> Path:
        ranks, zero = LAYOUTS[layout]
        folder = shared_folder(f"{stage}-{layout}", lambda folder: complete(write_recipe(stage, folder, zero), ranks))
        return folder / "out"

    return run_once


def unfinished(out: Path, recipe: Path) -> Path:
    """The folder of a finished run as a SIGKILL just before its last line leaves it, for `recipe` to go on from."""
    copy = recipe.with_name("out")
    shutil.copytree(out, copy)
    record = json.loads((copy / "stage.json").read_text())
    (copy / "stage.json").unlink()
    mine = recipe_dict(load_recipe(record["stage"], str(recipe)))
    (copy / "run.json").write_text(
        json.dumps({**record, "recipe": mine, "fingerprint": digest([record["stage"], mine, record["inputs"]])})
    )
    return copy


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        pytest.param(stage, layout, marks=() if (stage, layout) in EVERY_TIME else pytest.mark.slow)
        for stage in ("sft", "reward", "ppo")
        for layout in LAYOUTS
    ],
)
def test_killed_while_a_checkpoint_is_written(whole, tmp_path, stage, layout):
    ranks, zero = LAYOUTS[layout]
    recipe = write_recipe(stage, tmp_path, zero)
    started = start(recipe, ranks, stall="checkpoint-4")
    started.wait_for((tmp_path / "stalled").exists)
    time.sleep(0.2)  # for rank 0 to declare it complete, if it did not wait for the others
    started.stop()
    out = tmp_path / "out"
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]
    assert not (out / "checkpoint-4" / "complete.json").exists()
    assert metrics(out)[-1]["step"] == 4  # these lines are dropped, and written again
    complete(recipe, ranks)
    assert_same(out, whole(stage, layout))
    assert checkpoints(out) == checkpoints(whole(stage, layout))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_at_sigterm_it_finishes_its_step_and_saves_a_checkpoint(whole, tmp_path, stage):
    """Though `save_steps` asks for none. Both ranks, one of which alone gets the signal, end after the same step."""
    recipe = write_recipe(stage, tmp_path, 0, save_steps=None)
    started, out = start(recipe, 2), tmp_path / "out"
    started.wait_for(lambda: any(line["step"] == 1 for line in metrics(out)))
    started.processes[1].terminate()
    assert started.wait(90) == [143, 143], started.stderr[-3000:]
    (saved,) = checkpoints(out)
    said = f"{out}/{saved}: saved at SIGTERM; the same command continues from there"
    assert [line for line in started.stderr.splitlines() if "checkpoint" in line or "error" in line] == [said]
    assert saved != "checkpoint-6"
    complete(recipe, 2)
    assert_same(tmp_path / "out", whole(stage, "zero0"))


def test_changed_rows_are_named_where_they_leave_nothing_to_evaluate_on(whole, tmp_path):
    recipe = write_recipe("reward", tmp_path, eval_dataset=None, eval_fraction=1e-9)
    unfinished(whole("reward", "alone"), recipe)
    with pytest.raises(OtherRun, match=r"an unfinished run that differs.* train_dataset"):
        reward.run(load_recipe("reward", str(recipe)))


def size_of(folder: Path) -> int:
    """Bytes that a folder takes on a file system with pages of 4096."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A disk of a given size at `tmp_path / "out"`; asked again, it has another size."""
    place = tmp_path / "out"

    def mount(size: int) -> Path:
        again = "remount," if place.is_mount() else ""
        place.mkdir(exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", str(place)]
        if (done := subprocess.run(words, capture_output=True, text=True, check=False)).returncode:
            pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_on_a_full_disk_it_ends_with_one_error_and_goes_on_when_there_is_room(whole, tmp_path, disk, stage):
    done = whole(stage, "alone")
    rest = sum(size_of(done / name) for name in ("best",)) + 64 * 1024
    out = disk(
        rest + int(1.5 * size_of(done / "checkpoint-4"))
    )  # for the first of its checkpoints and half of the next
    recipe = write_recipe(stage, tmp_path)
    started = start(recipe, 1)
    assert started.wait() == [1]
    error = started.stderr.splitlines()[-1]
    assert error.startswith(f"align.errors.UserError: {out}/checkpoint-4"), error
    assert "error while writing a checkpoint: No space left on device, " in error
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-2"]
    disk(2**30)
    complete(recipe, 1)
    assert_same(out, done)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_killed_before_its_last_line_it_measures_nothing_twice(tmp_path, stage):
    """The closing evaluation comes after the last checkpoint, at the same step."""
    changes = {"eval_steps": None} | ({"early_stopping_patience": None} if stage == "ppo" else {})
    recipe, again = (write_recipe(stage, tmp_path / name, **changes) for name in ("whole", "again"))
    complete(recipe, 1)
    out = unfinished(recipe.with_name("out"), again)
    complete(again, 1)
    assert_same(out, recipe.with_name("out"))


@pytest.mark.parametrize(("stage", "method"), [("sft", "bottleneck"), ("reward", "lora")])
def test_adapters_resume_too(tmp_path, stage, method):
    recipes = [write_recipe(stage, tmp_path / name, method=method) for name in ("whole", "killed")]
    complete(recipes[0], 1)
    started = start(recipes[1], 1, stall="checkpoint-4")
    started.wait_for((tmp_path / "killed" / "stalled").exists)
    started.stop()
    complete(recipes[1], 1)
    assert_same(tmp_path / "killed" / "out", tmp_path / "whole" / "out")


@pytest.mark.slow
def test_a_run_whose_sequences_are_split_resumes_too(tmp_path):
    recipes = [write_recipe("sft", tmp_path / name, 2, sequence_parallel_size=2) for name in ("whole", "killed")]
    complete(recipes[0], 2)
    started = start(recipes[1], 2, stall="checkpoint-4")
    started.wait_for((tmp_path / "killed" / "stalled").exists)
    started.stop()
    complete(recipes[1], 2)
    assert_same(tmp_path / "killed" / "out", tmp_path / "whole" / "out")


@pytest.mark.slow
def test_the_whole_process_group_of_the_launcher_killed(whole, tmp_path):
    recipe = write_recipe("ppo", tmp_path, 2)
    process = subprocess.Popen(**launched("align.ppo", str(recipe)), stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "out" / "checkpoint-2" / "complete.json").exists():
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "stage.json").exists()
    complete(recipe, 2)
    assert_same(tmp_path / "out", whole("ppo", "zero2"))


def truncate(checkpoint: Path) -> None:
    largest = max(files(checkpoint), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def flip(checkpoint: Path) -> None:
    largest = max(files(checkpoint), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def lose(checkpoint: Path) -> None:
    files(checkpoint)[0].unlink()


def garble(checkpoint: Path) -> None:
    (checkpoint / "complete.json").write_bytes(b"\0\xff" * 99)


def reword(checkpoint: Path) -> None:
    told = (checkpoint / "complete.json").read_text()
    (checkpoint / "complete.json").write_text(told.replace('"step": ', '"step": 1'))


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "complete.json")


@pytest.mark.parametrize(
    ("stage", "layout", "harm"),
    [("sft", "alone", truncate), ("reward", "zero0", lose), ("ppo", "alone", reword), ("ppo", "zero2", flip)],
)
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(whole, tmp_path, stage, layout, harm):
    ranks, zero = LAYOUTS[layout]
    recipe = write_recipe(stage, tmp_path, zero)
    out = unfinished(whole(stage, layout), recipe)
    newest, before = sorted(out.glob("checkpoint-*"), reverse=True)[:2]
    harm(newest)
    finished = complete(recipe, ranks)
    line = next(line for line in finished.stderr.splitlines() if "damaged" in line)
    assert line.startswith(f"{newest}: damaged, ")
    assert line.endswith(f"; set aside as damaged-{newest.name}, going on from {before.name}")
    assert_same(out, whole(stage, layout))
    assert sorted(path.name for path in out.glob("*checkpoint-*")) == checkpoints(whole(stage, layout))


@dataclass
class Folder:
    """An output folder with checkpoints 2, 4 and 6, as the stages write them."""

    recipe: SFTRecipe

    @property
    def path(self) -> Path:
        return Path(self.recipe.output_dir)

    def save(self, step: int, **state: Any) -> Path:
        checkpoint = own(self.path / f"checkpoint-{step}")
        (checkpoint / "policy").mkdir(parents=True)
        (checkpoint / "policy" / "rank-00000.safetensors").write_bytes(bytes(range(256)) * 40 * step)
        (checkpoint / "trainer_state.json").write_text(f"step {step}")
        told = {"step": step, "best": 2, "layout": layout(self.recipe, 1), **state}
        mark_complete(checkpoint, told, self.recipe.save_total_limit, ALONE, synced_sums(checkpoint))
        return checkpoint

    def last(self) -> Path | None:
        return last_checkpoint(self.recipe, ALONE, {})


ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path) -> Folder:
    made = Folder(claimed(SFTRecipe(output_dir=str(tmp_path), save_total_limit=3)))
    for step in (2, 4, 6):
        made.save(step)
    return made


class TestDamage:
    def test_an_undamaged_checkpoint_is_used_and_nothing_said(self, folder, capsys):
        assert folder.last() == folder.path / "checkpoint-6"
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("harm", "what"),
        [
            (truncate, "policy/rank-00000.safetensors has 30720 bytes, not 61440"),
            (flip, "policy/rank-00000.safetensors has other bytes than were written"),
            (lose, "policy/rank-00000.safetensors is missing"),
            (garble, "complete.json: not valid JSON: byte 1 is not UTF-8"),
            (reword, "complete.json does not match its checksum"),
        ],
    )
    def test_each_kind_is_recognised_and_said_in_one_line(self, folder, capsys, harm, what):
        harm(folder.path / "checkpoint-6")
        assert folder.last() == folder.path / "checkpoint-4"
        assert capsys.readouterr().err == (
            f"{folder.path}/checkpoint-6: damaged, {what}; set aside as damaged-checkpoint-6, going on from checkpoint-4\n"
        )
        assert checkpoints(folder.path) == ["checkpoint-2", "checkpoint-4"]

    def test_a_file_that_cannot_be_read(self, folder, capsys, monkeypatch):
        def broken(path: Path) -> list[int]:
            if path == folder.path / "checkpoint-6" / "trainer_state.json":
                raise OSError(5, "Input/output error", str(path))
            return plain(path)

        plain = align.runs.files.fingerprint
        monkeypatch.setattr("align.runs.files.fingerprint", broken)
        assert folder.last() == folder.path / "checkpoint-4"
        assert "checkpoint-6/trainer_state.json: Input/output error;" in capsys.readouterr().err

    def test_ranks_read_each_file_once(self, folder, monkeypatch):
        checkpoint = folder.path / "checkpoint-6"
        read: list[Path] = []
        plain = align.runs.files.fingerprint
        monkeypatch.setattr("align.runs.files.fingerprint", lambda path, *_: read.append(path) or plain(path))
        flip(checkpoint)
        found = [find_corruption(checkpoint, rank, 3) for rank in range(3)]
        assert found == ["policy/rank-00000.safetensors has other bytes than were written", None, None]
        assert sorted(read) == files(checkpoint)

    def test_a_half_written_one_goes_without_a_word(self, folder, capsys):
        (folder.path / "checkpoint-6" / "complete.json").unlink()
        assert folder.last() == folder.path / "checkpoint-4"
        assert capsys.readouterr().err == ""
        assert checkpoints(folder.path) == ["checkpoint-2", "checkpoint-4"]

    def test_several(self, folder, capsys):
        truncate(folder.path / "checkpoint-6")
        flip(folder.path / "checkpoint-4")
        assert folder.last() == folder.path / "checkpoint-2"
        said = capsys.readouterr().err.splitlines()
        assert [line.split(":")[0] for line in said] == [f"{folder.path}/checkpoint-{step}" for step in (6, 4)]
        assert all(line.endswith("going on from checkpoint-2") for line in said)

    def test_all_of_them(self, folder, capsys):
        for step in (2, 4, 6):
            truncate(folder.path / f"checkpoint-{step}")
        assert folder.last() is None
        assert all(line.endswith("starting from the beginning") for line in capsys.readouterr().err.splitlines())
        assert checkpoints(folder.path) == []

    def test_the_step_can_be_saved_again_and_damaged_again(self, folder, capsys):
        for _ in range(2):
            flip(folder.path / "checkpoint-6")
            assert folder.last() == folder.path / "checkpoint-4"
            assert folder.save(6) == folder.last()
        assert checkpoints(folder.path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]

    def test_what_comes_to_a_checkpoint_later_is_no_damage(self, folder):
        (folder.path / "checkpoint-6" / "notes.txt").write_text("mine")
        assert folder.last() == folder.path / "checkpoint-6"

    def test_a_checkpoint_is_on_the_disk_before_it_is_declared_whole(self, folder, monkeypatch):
        events: list[str] = []

        def fsync(descriptor: int) -> None:
            place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            events.append(str(place.relative_to(folder.path)))

        def replace(source: Any, target: Any, plain: Any = os.replace) -> None:
            events.append("declared")
            plain(source, target)

        own(folder.path / "metrics.jsonl", folder.path / "checkpoint-8").write_text("{}\n")
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        folder.save(8)
        before, after = events[: events.index("declared")], events[events.index("declared") + 1 :]
        inside = [
            "checkpoint-8",
            *(f"checkpoint-8/{name}" for name in ("policy", "policy/rank-00000.safetensors", "trainer_state.json")),
        ]
        assert {*inside, "metrics.jsonl"} <= set(before)
        assert after[:2] == ["checkpoint-8", "."]


class TestLimit:
    def test_the_oldest_go(self, folder):
        folder.save(8)
        assert checkpoints(folder.path) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]

    def test_a_resume_keeps_it_though_it_saves_nothing(self, folder):
        """Killed between declaring a checkpoint whole and deleting the oldest, or with a smaller limit since."""
        fewer = Folder(dataclasses.replace(folder.recipe, save_total_limit=1))
        assert fewer.last() == folder.path / "checkpoint-6"
        assert checkpoints(folder.path) == ["checkpoint-6"]

    def test_damaged_ones_count_for_nothing(self, folder):
        two = Folder(dataclasses.replace(folder.recipe, save_total_limit=2))
        truncate(folder.path / "checkpoint-6")
        assert two.last() == folder.path / "checkpoint-4"
        assert checkpoints(folder.path) == ["checkpoint-2", "checkpoint-4"]
        two.save(6)
        assert checkpoints(folder.path) == ["checkpoint-4", "checkpoint-6"]


class TestLayout:
    def test_a_run_that_an_earlier_version_began_is_refused(self, tmp_path):
        """Its record lists no files, and its checkpoints are DeepSpeed's pickles."""
        (tmp_path / "run.json").write_text('{"stage": "ppo", "recipe": {}, "inputs": {}}')
        checkpoint = tmp_path / "checkpoint-4"
        (checkpoint / "policy").mkdir(parents=True)
        (checkpoint / "policy" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(0))
        (checkpoint / "complete.json").write_text('{"step": 4, "layout": "1 process at ZeRO 0"}')
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        with pytest.raises(UserError) as error:
            claim(tmp_path, {"stage": "ppo", "recipe": {}}, resuming=True)
        assert str(error.value) == (
            f"output_dir: {tmp_path} holds a run that an earlier version of align began, whose checkpoints are pickles, which "
            "this one does not load; finish it with that version, or delete the folder to start over."
        )
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_in_words(self, tmp_path):
        def words(processes: int, zero: int | None) -> str:
            file = None if zero is None else deepspeed_file(tmp_path / "ds.json", zero)
            return layout(SFTRecipe(output_dir="out", deepspeed=file), processes)

        assert words(1, None) == "1 process at ZeRO 0"
        assert words(2, 3) == "2 processes at ZeRO 3"
        assert words(1, 0) != words(1, None)  # written by DeepSpeed, and not

    @pytest.mark.parametrize(
        ("stage", "loader"), [("sft", "load_policy"), ("reward", "new_reward_model"), ("ppo", "set_up")]
    )
    def test_files_of_an_earlier_version_are_refused_before_a_model_is_loaded(
        self, tmp_path, monkeypatch, stage, loader
    ):
        module = importlib.import_module(f"align.{stage}.train")
        monkeypatch.setattr(module, loader, lambda *_, **__: pytest.fail("weights were loaded"))
        monkeypatch.setattr("align.runs.checkpoint.VERSION", 1)
        recipe = load_recipe(stage, str(write_recipe(stage, tmp_path)))
        Folder(claimed(recipe)).save(3, layout="1 process at ZeRO 0")
        with pytest.raises(UserError) as error:
            module.run(recipe)
        assert str(error.value) == (
            f"{tmp_path}/out/checkpoint-3: was saved by another version of align, with files that this one does not load; "
            f"finish the run with that version, or delete {tmp_path}/out to start over."
        )
        assert checkpoints(tmp_path / "out") == ["checkpoint-3"]

    @pytest.mark.parametrize(("before", "after"), [("alone", "zero3"), ("zero2", "alone"), ("zero3", "zero0")])
    def test_a_ppo_run_goes_on_in_another(self, whole, tmp_path, before, after):
        """Weights, averages, every metric of every step and what adapts, as if it had been that of the start."""
        ranks, zero = LAYOUTS[after]
        recipe = write_recipe("ppo", tmp_path, zero)
        out = unfinished(whole("ppo", before), recipe)
        assert {file.suffix for file in (out / "checkpoint-4").rglob("*.*")} == {".safetensors", ".json"}
        assert "it continues, and equals a run without the change up to rounding" in complete(recipe, ranks).stderr
        theirs = whole("ppo", before)
        for model in ("model.safetensors", "ema/model.safetensors", "best/model.safetensors"):
            a, b = load_file(out / model), load_file(theirs / model)
            assert max(float((a[name] - b[name]).abs().max()) for name in b) < 2e-5, model
        of_layout = "policy/padding"  # a process has other passes than two have
        ours, expected = (  # a correlation of equal scores is None
            [
                {name: value for name, value in line.items() if value is not None and name != of_layout}
                for line in metrics(each)
            ]
            for each in (out, theirs)
        )
        assert [line.keys() for line in ours] == [line.keys() for line in expected]
        for line, other in zip(ours, expected, strict=True):
            assert line == pytest.approx(other, abs=1e-3, rel=1e-3), line["step"]
