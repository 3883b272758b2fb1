"""The `align` command: what it hands to a stage, its exit codes, and what it prints."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest

from align import __main__ as cli
from align.config.data_source import DataSource
from align.config.stages import STAGES
from align.errors import UserError
from align.runs import command_line, launch

RECIPE = "stage: sft\noutput_dir: out\ntrain_dataset: rows.jsonl\nmodel_name_or_path: base\n"


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A recipe in the current folder, and a stage module that keeps what it is given (set `.does` to change it)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    module = types.ModuleType("align.sft.train")
    module.recipes = []
    module.does = lambda: None
    module.run = lambda recipe: (module.recipes.append(recipe), module.does())
    monkeypatch.setitem(sys.modules, "align.sft.train", module)
    yield module
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def exit_code(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        launch.run_stage_cli("sft", argv)
    return ended.value.code


def test_a_stage_gets_its_recipe_with_overrides(stage):
    assert cli.main(["sft", "r.yaml", "--seed", "7"]) == 0
    assert exit_code(["r.yaml", "--seed", "8"]) == 0
    assert [recipe.seed for recipe in stage.recipes] == [7, 8]


def test_the_rank_that_the_launcher_puts_first_is_dropped(stage, monkeypatch):
    watched = []
    monkeypatch.setattr(launch, "end_with_parents", watched.append)
    assert exit_code(["--local_rank=1", "r.yaml"]) == 0
    monkeypatch.setenv("ALIGN_PIPELINE", "1")
    assert exit_code(["--local_rank=1", "r.yaml"]) == 0
    assert exit_code(["r.yaml"]) == 0
    monkeypatch.delenv("ALIGN_PIPELINE")
    assert exit_code(["r.yaml"]) == 0
    assert len(stage.recipes) == 4
    assert watched == [2, 3, 1, 0]  # the launcher, the `deepspeed` command, `align run`


def test_a_mistake_is_one_line_and_code_2(stage, capsys):
    assert cli.main(["sft", "r.yaml", "--seed", "x"]) == 2
    assert capsys.readouterr().err == 'error: --seed: expected a whole number, got "x" (text)\n'

    def fail():
        raise UserError("rows.jsonl:3: bad\n  row")

    stage.does = fail
    assert exit_code(["r.yaml"]) == 2
    assert capsys.readouterr().err == "error: rows.jsonl:3: bad row\n"


def test_other_errors_keep_their_traceback(stage):
    stage.does = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli.main(["sft", "r.yaml"])


def test_interrupted(stage, capsys):
    def interrupt():
        raise KeyboardInterrupt

    stage.does = interrupt
    assert cli.main(["sft", "r.yaml"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_other_ranks_tell_only_what_rank_0_did_not(stage, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(command_line.time, "sleep", waits.append)
    launched = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["sft", "r.yaml", "--seed", "x"]) == 2
    assert waits == [5]  # in which the launcher, told by rank 0, ends this rank
    assert "--seed" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["sft", "r.yaml", "--seed", "x"]) == 2
    assert waits == [5]


def test_one_process_uses_one_gpu(stage, monkeypatch):
    seen = []
    stage.does = lambda: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    cli.main(["sft", "r.yaml"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    cli.main(["sft", "r.yaml"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    cli.main(["sft", "r.yaml"])
    assert seen == ["0", "3", "3,5"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no command given"),
        (["rum"], "unknown command 'rum'; did you mean 'run'?"),
        (["sft"], "align sft: expected a recipe file first"),
        (["sft", "--seed", "1"], "align sft: expected a recipe file first"),
        (["sft", "gone.yaml"], "gone.yaml: no such recipe"),
        (["run"], "align run: expected a folder of numbered recipes first"),
        (["check"], "align check: expected a recipe or a folder of them first"),
        (["run", ".", "--num_gpus", "two"], "--num_gpus: expected a number of processes from 1, got two"),
        (["run", ".", "--num_gpus=0"], "--num_gpus: expected a number of processes from 1, got 0"),
        (["run", ".", "--num_gpus"], "--num_gpus: expected a number of processes from 1, got nothing"),
        (["merge", "adapter"], "align merge: expected an adapter's folder and a new folder"),
        (["merge", "adapter", "out", "--seed", "1"], "align merge: expected an adapter's folder and a new folder"),
        (["sft", "r.yaml", "--num", "1"], "r.yaml: no such recipe"),
        (["run", ".", "--num", "1"], ".: expected recipes named like 1_sft.yaml"),
    ],
)
def test_wrong_commands(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_the_number_of_processes_may_stand_anywhere(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "run_folder", lambda *args: calls.append(args) or 0)
    for words in (
        ["--num_gpus", "2", "--seed", "1"],
        ["--seed", "1", "--num_gpus=2"],
        ["--seed", "1", "--num-accelerators", "2"],
        ["--num_accelerators=2", "--seed", "1"],
        ["--seed", "1", "--num-gpus", "2"],
    ):
        assert cli.main(["run", "folder", *words]) == 0
    assert cli.main(["run", "folder"]) == 0
    assert cli.main(["run", "folder", "--seed", "1", "--hostfile", "nodes"]) == 0
    assert calls == [
        *[("folder", 2, ["--seed", "1"], None)] * 5,
        ("folder", None, [], None),
        ("folder", None, ["--seed", "1"], "nodes"),
    ]


def test_verify_takes_a_number_of_processes_a_file_and_keys(monkeypatch, capsys):
    calls = []
    module = types.ModuleType("align.cli.verify")
    module.run = lambda *args: calls.append(args) or 1
    monkeypatch.setitem(sys.modules, "align.cli.verify", module)
    for words, wanted in (
        ([], (None, None, [])),
        (["--json"], (None, "-", [])),
        (["--json", "--seed", "1"], (None, "-", ["--seed", "1"])),
        (["--seed", "1", "--json", "out.json", "--num_gpus", "2"], (2, "out.json", ["--seed", "1"])),
    ):
        assert cli.main(["verify", *words]) == 1  # what `run` says
        assert calls.pop() == wanted
    monkeypatch.setitem(sys.modules, "align.cli.architectures.command", module)
    for words, wanted in (
        (["--architectures"], ([], None, None, [])),
        (["--architectures", "opt", "gpt2", "--json"], (["opt", "gpt2"], None, "-", [])),
        (["--model", "folder", "--seed", "1"], (None, "folder", None, ["--seed", "1"])),
    ):
        assert cli.main(["verify", *words]) == 1
        assert calls.pop() == wanted
    monkeypatch.setitem(sys.modules, "align.cli.verify_episodes", module)
    for words, wanted in (
        (["--episodes"], ([], None, None, [])),
        (["--episodes", "512", "2560", "--json", "--seed", "1"], ([512, 2560], None, "-", ["--seed", "1"])),
    ):
        assert cli.main(["verify", *words]) == 1
        assert calls.pop() == wanted
    assert cli.main(["verify", "--model", "folder", "--episodes"]) == 2
    assert "--episodes: expected no --architectures and no --model beside it" in capsys.readouterr().err
    assert cli.main(["verify", "--episodes", "many"]) == 2
    assert "--episodes: expected whole numbers, got many" in capsys.readouterr().err
    assert cli.main(["verify", "--model", "folder", "--num_gpus", "2"]) == 2
    assert "--num_gpus: --architectures and --model take no number" in capsys.readouterr().err
    assert cli.main(["verify", "--help"]) == 0
    assert "align verify" in capsys.readouterr().out
    assert not calls


@pytest.mark.parametrize("name", [stage.name for stage in STAGES.values() if stage.methods])
def test_help_lists_every_key_with_type_meaning_and_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for cls, prefix in ((STAGES[name].recipe, "--"), (DataSource, "")):
        for field in dataclasses.fields(cls):
            assert f" {prefix}{field.name} <" in flat
            assert " ".join(field.metadata["help"].split()) in flat
    assert "--output_dir <text> required" in flat
    assert (
        f"--learning_rate <a number> default {STAGES[name].recipe.__dataclass_fields__['learning_rate'].default}"
        in flat
    )
    assert '--report_to <none | wandb> default "none"' in flat
    assert "--train_dataset <data source or list of them> default empty" in flat


def test_help_reads_as_prose(capsys):
    """Docstrings without their indentation, plurals in lists, and the launcher's module where there is one."""
    said = {name: (cli.main([name, "--help"]), capsys.readouterr().out)[1] for name in STAGES}
    for name, text in said.items():
        head = text[: text.index("keys:")]
        assert not any(line.startswith(" ") or "  " in line for line in head.splitlines()[2:])
        module = f"align.{name}" if name in ("sft", "reward", "ppo", "evaluate") else f"align {name}"
        assert f"--module {module} RECIPE" in head
    assert "--models  <list of texts or mapping>  required" in said["evaluate"]
    assert "--num_shots  <list of whole numbers>" in said["evaluate"]
    assert " templates  <list of mappings>" in said["sft"]


def test_version_and_usage(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("align ")
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for command in (*STAGES, "run", "check", "merge", "verify"):
        assert re.search(rf"\n    {command}\s", said)


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("run", "usage: align run DIR [--num_gpus N | --hostfile FILE] [--key value ...]"),
        ("check", "usage: align check RECIPE|DIR [--num_gpus N] [--key value ...]"),
        ("merge", "usage: align merge ADAPTER OUTPUT"),
        (
            "verify",
            "usage: align verify [--num_gpus N] [--episodes [N ...]] [--architectures [TYPE ...]] [--model FOLDER] [--json [FILE]] "
            "[--key value ...]",
        ),
        ("sft", "usage: align sft RECIPE [--key value ...]"),
        ("evaluate", "usage: align evaluate RECIPE [--key value ...]"),
    ],
)
def test_each_command_has_its_own_usage(capsys, command, usage):
    for flag in ("--help", "-h"):
        assert cli.main([command, flag]) == 0
        assert capsys.readouterr().out.startswith(usage + "\n")


def test_a_stage_alone_has_the_same_help(capsys):
    with pytest.raises(SystemExit) as ended:
        launch.run_stage_cli("ppo", ["--help"])
    assert ended.value.code == 0
    alone = capsys.readouterr().out
    assert cli.main(["ppo", "--help"]) == 0
    assert capsys.readouterr().out == alone


def test_keys_reach_the_recipe_as_they_are(stage):
    """argparse reads none of them: negative numbers, lists, mappings and abbreviations of its own options."""
    words = [
        "--max_steps",
        "-1",
        "--method",
        "lora",
        "--lora_target_modules",
        "a",
        "b",
        "--train_dataset.columns.prompt",
        "q",
        "--seed=3",
    ]
    assert cli.main(["sft", "r.yaml", *words]) == 0
    (recipe,) = stage.recipes
    assert (recipe.max_steps, recipe.lora_target_modules, recipe.seed) == (-1, ["a", "b"], 3)
    assert recipe.train_dataset == [DataSource(path="rows.jsonl", columns={"prompt": "q"})]


def test_as_a_program(tmp_path):
    """Light, quick, and no traceback."""
    (tmp_path / "r.yaml").write_text(RECIPE + "learning_rat: 1\n", encoding="utf-8")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "align", "sft", str(tmp_path / "r.yaml")], capture_output=True, text=True
    )
    assert time.monotonic() - began < 5
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'r.yaml'}:5: learning_rat: unknown key; did you mean 'learning_rate'?\n"


def test_a_launched_stage_ends_with_its_launcher(tmp_path):
    """SIGKILL on an ancestor cannot be passed on; the stage notices."""
    child = "from align.runs.launch import end_with_parents; import time; end_with_parents(2); print('up', flush=True); time.sleep(60)"
    middle = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {middle!r}]).wait()"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
    finally:
        for left in [process, *family]:
            if left.is_running() if isinstance(left, psutil.Process) else left.poll() is None:
                left.kill()


def test_two_dashes_alone_are_refused(stage, capsys):
    for words in (["sft", "r.yaml", "--", "--seed", "1"], ["run", "r", "--"], ["merge", "--", "a", "b"]):
        assert cli.main(words) == 2
        assert "--: expected `--key value`, got these two dashes alone" in capsys.readouterr().err
    assert not stage.recipes
