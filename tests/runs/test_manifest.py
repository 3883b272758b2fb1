"""A resumed run is the same run, and so is a finished one that is not done again: what has changed is named and refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align.cli.check import check
from align.config.keys import key
from align.config.load import load_recipe
from align.data.load import DataSettings, load_rows
from align.data.rows import Prompt
from align.data.split import EmptySplit
from align.engine.distributed import World
from align.errors import BadFile, OtherRun, UserError
from align.runs.checkpoint import mark_complete, synced_sums
from align.runs.fingerprints import FileSums, module_files
from align.runs.manifest import is_finished, open_stage, read_manifest, write_manifest
from align.runs.output_folder import one_run_per_folder, release
from align.runs.own_files import own
from align.runs.run_record import identity
from align.runs.same_run import changes, with_defaults
from align.runs.stage import last_checkpoint
from tests.worlds import LETTERS, letter_tokenizer, write_jsonl

ALONE = World(0, 1, torch.device("cpu"))
RULES = "import helper\n\ndef score(prompts, completions, **columns):\n    return [0.0 for _ in prompts]\n"
REPORT: dict[str, Any] = {
    "sources": [{"used_for": "training", "fingerprint": "a" * 64}, {"used_for": "evaluation", "fingerprint": "b" * 64}],
    "fingerprints": {"train": "c" * 64, "evaluation": "d" * 64},
}


@pytest.fixture(scope="module")
def model(shared_folder) -> Path:
    return shared_folder("plain", _write_model)


def _write_model(folder: Path) -> None:
    from tests.worlds import save_tiny_policy

    save_tiny_policy(folder / "model")


class Folder:
    """A PPO recipe, and its output folder as a run leaves it: unfinished with a checkpoint, or finished."""

    def __init__(self, folder: Path, model: Path):
        self.folder = folder
        shutil.copytree(model / "model", folder / "policy")
        (folder / "rules.py").write_text(RULES)
        (folder / "helper.py").write_text("SCALE = 1\n")
        (folder / "chat.jinja").write_text("{{ messages }}")
        (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
        write_jsonl(folder / "train.jsonl", [{"prompt": letter} for letter in LETTERS])
        write_jsonl(folder / "eval.jsonl", [{"prompt": "z" + letter} for letter in LETTERS[:3]])
        self.out = folder / "out"
        self.keys: dict[str, Any] = {
            "stage": "ppo",
            "output_dir": str(self.out),
            "sft_model_path": str(folder / "policy"),
            "train_dataset": str(folder / "train.jsonl"),
            "eval_dataset": str(folder / "eval.jsonl"),
            "reward_funcs": ["rules:score"],
            "chat_template_path": str(folder / "chat.jinja"),
            "deepspeed": str(folder / "ds.json"),
            "total_episodes": 128,
        }

    def recipe(self, **changes: Any) -> Any:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**self.keys, **changes}))
        return load_recipe("ppo", str(path))

    def begin(self, report: Any = REPORT, **changes: Any) -> Any:
        """A run that was killed after its first checkpoint."""
        recipe = self.recipe(**changes)
        assert not open_stage(recipe)
        assert last_checkpoint(recipe, ALONE, report) is None
        own(self.out / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        checkpoint = own(self.out / "checkpoint-2")
        checkpoint.mkdir()
        (checkpoint / "weights").write_bytes(b"w" * 99)
        told = {"step": 2, "layout": "1 process at ZeRO 2"}
        mark_complete(checkpoint, told, 2, ALONE, synced_sums(checkpoint))
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write('{"step": 3}\n')
        release(self.out)
        return recipe

    def finish(self) -> None:
        write_manifest(self.begin(), letter_tokenizer(), REPORT, {"table": []})

    def resume(self, report: Any = REPORT, **changes: Any) -> Path | None:
        recipe = self.recipe(**changes)
        try:
            assert not open_stage(recipe)
            return last_checkpoint(recipe, ALONE, report)
        finally:
            release(self.out)

    def record(self, name: str = "run.json") -> dict[str, Any]:
        return json.loads((self.out / name).read_text())


@pytest.fixture
def run(tmp_path, model, monkeypatch) -> Folder:
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    return Folder(tmp_path, model)


def test_the_date_that_a_chat_template_writes_is_recorded(run):
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}"
    write_manifest(run.begin(), tokenizer, REPORT, {"table": []})
    assert run.record("stage.json")["chat_template_date"] == "2024-07-26"
    assert read_manifest(run.out)


def swap(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def flip_weights(folder: Path) -> None:
    """Other weights in a file of the same size and times, as a copy that keeps them leaves it."""
    path = folder / "policy" / "model.safetensors"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "sft_model_path": (flip_weights, "sft_model_path (model.safetensors has other content: SHA-256 "),
    "sft_model_path new": (
        lambda f: (f / "policy" / "chat_template.jinja").write_text("x"),
        "sft_model_path (chat_template.jinja is new)",
    ),
    "reward_funcs": (
        lambda f: swap(f / "rules.py", b"0.0", b"1.0"),
        "reward_funcs[0] (rules.py has other content: SHA-256 ",
    ),
    "reward_funcs imported": (
        lambda f: (f / "helper.py").write_text("SCALE = 2\n"),
        "reward_funcs[0] (helper.py has other content: SHA-256 ",
    ),
    "chat_template_path": (
        lambda f: (f / "chat.jinja").write_text("{{ 1 }}"),
        "chat.jinja has other content: SHA-256 ",
    ),
    "deepspeed": (
        lambda f: (f / "ds.json").write_text(json.dumps({"communication_data_type": "fp16"})),
        "deepspeed (other settings that change the result: fingerprint ",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_input_is_named_refused_and_accepted_on_purpose(run, what, finished):
    run.finish() if finished else run.begin()
    change, words = CHANGES[what]
    change(run.folder)
    with pytest.raises(OtherRun) as error:
        is_finished(run.recipe())
    assert f"holds {'a finished' if finished else 'an unfinished'} run that differs in " in str(error.value)
    assert words in str(error.value)
    name = what.split()[0]
    assert str(error.value).endswith(f"If the change is meant, add `accept_changes: [{name}]`.")
    assert is_finished(run.recipe(accept_changes=[name])) is finished
    with pytest.raises(OtherRun):
        is_finished(run.recipe(accept_changes=["train_dataset"]))


def test_nothing_has_changed(run):
    run.begin()
    (run.folder / "policy" / "README.md").write_text("not of the model")
    (run.folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 0}, "steps_per_print": 5}))
    (run.folder / "unrelated.py").write_text("")
    assert run.resume() == run.out / "checkpoint-2"
    assert (run.out / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "accepted" not in run.record() or run.record()["accepted"] == []


def test_rows_are_compared_once_they_are_loaded(run):
    run.begin()
    sources = [{**REPORT["sources"][0], "fingerprint": "e" * 64}, REPORT["sources"][1]]
    other = {"sources": sources, "fingerprints": {"train": "f" * 64, "evaluation": "d" * 64}}
    with pytest.raises(OtherRun) as error:
        run.resume(other)
    place = (
        f"train_dataset[0] ({run.folder}/train.jsonl has other rows: fingerprint aaaaaaaaaaaa then, eeeeeeeeeeee now)"
    )
    assert f"run that differs in {place}; delete the folder" in str(error.value)
    assert run.resume(other, accept_changes=["train_dataset"]) == run.out / "checkpoint-2"
    accepted = run.record()["accepted"]
    assert [each["at"] for each in accepted] == ["checkpoint-2"]
    assert place in accepted[0]["changes"]
    assert run.resume(other) == run.out / "checkpoint-2"  # it was accepted once
    with pytest.raises(OtherRun):
        run.resume()
    write_manifest(run.recipe(), letter_tokenizer(), other, {"table": []})
    assert run.record("stage.json")["accepted"] == accepted


def test_changed_rows_of_which_none_is_left_are_named_as_changed(run, capsys):
    """That the split is empty now is what came of it."""

    @one_run_per_folder
    def begin_again(recipe):
        assert not open_stage(recipe)
        load_rows(DataSettings.from_recipe(recipe), Prompt)

    recipe = run.begin(load_rows(DataSettings.from_recipe(run.recipe()), Prompt).report)
    write_jsonl(run.folder / "train.jsonl", [{"prompt": "z" + letter} for letter in LETTERS[:3]])  # all evaluated on
    with pytest.raises(OtherRun, match=r"differs in train_dataset\[0\] \(.*/train.jsonl has other rows"):
        begin_again(recipe)
    assert check.run(str(run.folder / "recipe.yaml")) == 2
    assert "train.jsonl has other rows" in capsys.readouterr().out
    assert (run.out / "checkpoint-2" / "weights").exists()
    with pytest.raises(EmptySplit, match="no training row is left"):
        begin_again(run.recipe(output_dir=str(run.folder / "new")))


def test_other_rows_of_the_same_sources(run):
    run.begin()
    with pytest.raises(OtherRun, match="other rows are used of the same sources: fingerprint dddddddddddd then, 0000"):
        run.resume({**REPORT, "fingerprints": {"train": "c" * 64, "evaluation": "0" * 64}})


def test_a_finished_stage_whose_data_changed_is_not_passed_over(run):
    run.finish()
    assert is_finished(run.recipe())
    os.utime(run.folder / "train.jsonl")
    assert is_finished(run.recipe()), "another time is no change"
    swap(run.folder / "train.jsonl", b'"b"', b'"B"')
    with pytest.raises(OtherRun, match=r"differs in train_dataset\[0\] \(.*/train.jsonl has other content: SHA-256"):
        is_finished(run.recipe())
    (run.folder / "train.jsonl").unlink()
    assert is_finished(run.recipe()), "what is gone cannot be compared"


def test_keys_that_change_the_result_are_never_accepted(run):
    run.begin()
    with pytest.raises(
        OtherRun, match=r"differs in kl_coef; delete the folder to start over, or set another output_dir.$"
    ):
        is_finished(run.recipe(kl_coef=0.5))
    with pytest.raises(UserError, match=r"accept_changes: expected some of .*train_dataset.*, got 'kl_coef'"):
        run.recipe(accept_changes=["kl_coef"])


# --- lost and damaged records


HARM: dict[str, Callable[[Path], object]] = {
    "is missing": lambda path: path.unlink(),
    "is empty": lambda path: path.write_text(""),
    "not valid JSON": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "`inputs` is missing": lambda path: swap(path, b'"inputs"', b'"inptus"'),
    "recipe: expected a mapping": lambda path: path.write_text(
        json.dumps({**json.loads(path.read_text()), "recipe": 3})
    ),
    "its fingerprint does not match": lambda path: swap(path, b'"kl_coef": 0.05', b'"kl_coef": 0.06'),
}


@pytest.mark.parametrize("what", HARM)
def test_a_lost_or_damaged_run_json_is_refused_and_written_anew_on_purpose(run, what):
    run.begin()
    HARM[what](run.out / "run.json")
    before = sorted(run.out.rglob("*"))
    with pytest.raises(OtherRun) as error:
        run.resume()
    assert str(error.value).startswith(f"{run.out}/run.json: ")
    assert what in str(error.value)
    assert "put it back from a copy" in str(error.value)
    assert sorted(run.out.rglob("*")) == before
    assert run.resume(accept_changes=["run.json"]) == run.out / "checkpoint-2"
    assert run.record()["accepted"] == [{"at": "checkpoint-2", "changes": ["run.json was lost or damaged"]}]


LINES: dict[str, Callable[[Path], object]] = {
    "is missing": lambda path: path.unlink(),
    "has 12 bytes, fewer than the 24 that it had at checkpoint-2": lambda path: path.write_text('{"step": 1}\n'),
    "has other lines than it had at checkpoint-2": lambda path: swap(path, b'"step": 2', b'"step": 7'),
}


@pytest.mark.parametrize("what", LINES)
def test_lost_metrics_are_one_clear_word(run, what):
    run.begin()
    LINES[what](run.out / "metrics.jsonl")
    with pytest.raises(UserError) as error:
        run.resume()
    assert str(error.value).startswith(f"{run.out}/metrics.jsonl: {what}; put it back, or add ")
    assert (run.out / "checkpoint-2" / "weights").exists()
    assert run.resume(accept_changes=["metrics.jsonl"]) == run.out / "checkpoint-2"


def test_a_checkpoint_of_another_step_is_damaged(run, capsys):
    run.begin()
    record = run.record()
    (run.out / "checkpoint-2").rename(run.out / "checkpoint-4")
    (run.out / "run.json").write_text(json.dumps({**record, "files": ["checkpoint-4", "metrics.jsonl"]}))
    assert run.resume() is None
    assert "checkpoint-4: damaged, complete.json is of step 2; set aside" in capsys.readouterr().err


# --- versions


def test_a_manifest_of_an_older_version_lacks_keys(run):
    """The first version knew fewer recipe keys, and of inputs the digests of manifests alone."""
    run.finish()
    told = run.record("stage.json")
    for name in ("schema_version", "fingerprint", "sums", "accepted"):
        told.pop(name, None)
    told["inputs"] = {}
    for name in ("accept_changes", "ema_decay", "dual_clip"):
        del told["recipe"][name]
    for source in told["recipe"]["train_dataset"]:
        del source["templates"], source["weight"]
    (run.out / "stage.json").write_text(json.dumps(told))
    assert is_finished(run.recipe())
    with pytest.raises(OtherRun, match=r"differs in dual_clip, ema_decay; delete"):
        is_finished(run.recipe(ema_decay=0.9, dual_clip=3.0))


def test_a_key_may_name_what_it_was_before_it_existed():
    import dataclasses

    @dataclasses.dataclass
    class Recipe:
        old: int = key(1, "was always there")
        new: str = key("better", "came later", before="as ever")

    assert with_defaults(Recipe, {"old": 5}) == {"old": 5, "new": "as ever"}
    assert with_defaults(Recipe, {"new": "x"}) == {"old": 1, "new": "x"}


def test_a_manifest_of_a_newer_version_is_refused_by_both_names(run):
    run.finish()
    told = run.record("stage.json") | {"schema_version": 7, "inputs": ["another form"]}
    told["versions"]["align"] = "9.9.9"
    (run.out / "stage.json").write_text(json.dumps(told))
    for read in (lambda: is_finished(run.recipe()), lambda: read_manifest(run.out)):
        with pytest.raises(
            UserError, match=r"has schema_version 7, of align 9.9.9, and this is align .*, which reads up to 1;"
        ):
            read()


def test_numbers_that_are_not_finite(run):
    """They were written as NaN once; now they are null."""
    run.finish()
    told = run.record("stage.json")
    results = {"table": [["a", float("nan"), 1.0]], "agreement": float("nan")}
    write_manifest(run.recipe(), letter_tokenizer(), REPORT, results)
    assert read_manifest(run.out)["results"] == {"table": [["a", None, 1.0]], "agreement": None}
    (run.out / "stage.json").write_text(json.dumps({**told, "results": results}))
    with pytest.raises(BadFile, match="NaN is not a number of JSON"):
        read_manifest(run.out)
    del told["schema_version"]
    (run.out / "stage.json").write_text(json.dumps({**told, "results": results}))
    assert read_manifest(run.out)["results"]["agreement"] is None


# --- fingerprints


def test_files_are_read_again_only_when_they_may_have_changed(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    monkeypatch.setattr("align.runs.fingerprints.SETTLED_SECONDS", -1.0)
    sums = FileSums()
    first = sums.of({"weights": path})
    assert first == {"weights": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    place = os.path.realpath(path)
    sums.known[place][4] = "remembered"
    assert sums.of({"weights": path}) == {"weights": "remembered"}
    before = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sums.of({"weights": path}) != first
    monkeypatch.setattr("align.runs.fingerprints.SETTLED_SECONDS", 60.0)
    path.write_bytes(b"abe")
    sums.of({"weights": path})
    assert place not in sums.known, "too young to be told from a change in the same instant"


def test_the_modules_of_a_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pkg").mkdir()
    for name, text in {
        "top.py": "import os, pkg.inner\ndef f():\n    from near import g\n",
        "near.py": "import top",
        "far.py": "",
        "pkg/__init__.py": "",
        "pkg/inner.py": "from . import beside\nfrom .below import x",
        "pkg/beside.py": "broken(",
        "pkg/below.py": "",
        "pkg/other.py": "",
    }.items():
        (tmp_path / name).write_text(text)
    expected = ["near.py", "pkg/__init__.py", "pkg/below.py", "pkg/beside.py", "pkg/inner.py", "top.py"]
    assert list(module_files("top")) == expected
    assert list(module_files("pkg.beside")) == ["pkg/__init__.py", "pkg/beside.py"]
    assert module_files("no_such_module_at_all") == {}
    assert module_files("sys") == {}
    assert set(module_files("yaml.loader")) > {"yaml/__init__.py", "yaml/loader.py"}
    assert all(name.startswith("yaml/") for name in module_files("yaml.loader"))


def test_an_adapter_stands_for_its_base_too(run):
    adapter = run.folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(run.folder / "policy")}))
    recipe = run.recipe()
    import dataclasses

    recipe = dataclasses.replace(recipe, sft_model_path=str(adapter))
    before = identity(recipe)
    files = before["inputs"]["sft_model_path"]["files"]
    assert {"adapter_config.json", f"{run.folder}/policy/model.safetensors"} <= files.keys()
    flip_weights(run.folder)
    assert [change.key for change in changes(before, identity(recipe), recipe)] == ["sft_model_path"]
