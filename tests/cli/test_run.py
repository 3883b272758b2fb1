"""`align run`: order, skipping, resuming, failing, ending, and the closing tables. The stages here are a small script."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from align.cli import processes
from align.cli import run as pipeline
from align.config.stages import STAGES
from align.errors import UserError

STAGE = """
import os, sys, time
from pathlib import Path
from align.runs import manifest
from align.runs.manifest import write_manifest, open_stage
from align.config.load import load_recipe

class Tokenizer:
    bos_token_id, eos_token_id, chat_template = 1, 2, None
    def get_vocab(self): return {"a": 0}

manifest.inspect_inputs = lambda recipe: None  # no stage here leaves a model
stage, path, *words = sys.argv[1:]
recipe = load_recipe(stage, path, words)
assert not open_stage(recipe)
with open("calls.txt", "a") as calls:
    calls.write(f"{Path(path).name} {recipe.seed} {os.getpid()}\\n")
if Path("log").exists():
    Path(recipe.output_dir, "metrics.jsonl").touch()
if Path(f"fail_{stage}").exists():
    sys.exit(int(Path(f"fail_{stage}").read_text()))
if Path(f"end_{stage}").exists():
    os._exit(0)
if Path(f"kill_{stage}").exists():
    os.kill(os.getpid(), 9)
if Path(f"hang_{stage}").exists():
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import pathlib, signal, time; signal.signal(15, signal.SIG_IGN); pathlib.Path('up').touch(); time.sleep(60)"])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    child.wait()
table = [["loss", 2.0, 1.23456], ["held-out rows", None, 7]]
samples = [{"prompt": f"p{i}", "SFT": "[b]s", "PPO": "r", "score": 0.5} for i in range(5)]
results = {"table": table, **({"samples": samples} if stage == "ppo" else {})}
write_manifest(recipe, Tokenizer(), {}, results)
"""


def write(path: Path, **keys) -> None:
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three recipes in `r`, and the script in place of the stages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "stage.py").write_text(STAGE, encoding="utf-8")
    recipes = tmp_path / "r"
    recipes.mkdir()
    write(
        recipes / "2_reward.yaml",
        stage="reward",
        output_dir="out/2",
        train_dataset="x.jsonl",
        model_name_or_path="out/1",
    )
    write(recipes / "1_sft.yaml", stage="sft", output_dir="out/1", train_dataset="x.jsonl", model_name_or_path="base")
    write(
        recipes / "10_ppo.yaml",
        stage="ppo",
        output_dir="out/10",
        train_dataset="x.jsonl",
        sft_model_path="out/1",
        reward_model_path="out/2",
    )
    write(recipes / "notes.yaml", stage="sft")
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def scripted(folder, monkeypatch):
    monkeypatch.setattr(pipeline, "command", script_command)
    return folder


def script_command(step: pipeline.Step) -> list[str]:
    return [sys.executable, "stage.py", step.stage, step.path, *step.overrides]


def calls() -> list[str]:
    return [line.split()[0] for line in Path("calls.txt").read_text(encoding="utf-8").splitlines()]


def test_recipes_run_in_the_order_of_their_numbers_and_once(scripted, capfd):
    assert pipeline.run("r") == 0
    assert calls() == ["1_sft.yaml", "2_reward.yaml", "10_ppo.yaml"]
    said = capfd.readouterr().out
    assert "1_sft.yaml: sft, one process, into out/1" in said
    assert pipeline.run("r") == 0
    assert calls() == ["1_sft.yaml", "2_reward.yaml", "10_ppo.yaml"]
    said = capfd.readouterr().out
    assert said.count("finished already") == 3
    assert "Before and after" in said  # also when nothing was left to do


def test_what_fails_is_said_and_the_same_command_goes_on(scripted, capfd):
    Path("fail_reward").write_text("3", encoding="utf-8")
    with pytest.raises(UserError) as error:
        pipeline.run("r")
    message = str(error.value)
    assert message.startswith("r/2_reward.yaml: the reward stage failed with exit code 3 after ")
    assert message.endswith(" s. The same command continues from there.")
    assert calls() == ["1_sft.yaml", "2_reward.yaml"]
    Path("fail_reward").unlink()
    assert pipeline.run("r") == 0
    assert calls() == ["1_sft.yaml", "2_reward.yaml", "2_reward.yaml", "10_ppo.yaml"]


def test_a_stage_is_finished_by_its_manifest_alone(scripted):
    Path("end_reward").touch()
    with pytest.raises(
        UserError, match=r"r/2_reward.yaml: the reward stage ended without an error, but left no finished run in"
    ):
        pipeline.run("r")
    assert calls() == ["1_sft.yaml", "2_reward.yaml"]


def test_a_killed_stage_is_named_so(scripted):
    Path("kill_sft").touch()
    Path("log").touch()
    Path("out/1").mkdir(parents=True)
    Path("out/1/run.lock").touch()  # as of a process that was killed
    with pytest.raises(
        UserError,
        match=r"the sft stage was killed by SIGKILL after \d+ s; its metrics are in out/1/metrics\.jsonl\..*memory ran out",
    ):
        pipeline.run("r")
    assert not Path("out/1/run.lock").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (2, "failed with exit code 2"),
        (-9, "was killed by SIGKILL"),
        (247, "was killed by SIGKILL"),
        (241, "was killed by SIGTERM"),
        (143, "was killed by SIGTERM"),
        (255, "was killed by SIGHUP"),
    ],
)
def test_exit_codes_in_words(code, said):
    """The launcher exits with -9, which the shell makes 247, when a rank was killed by signal 9."""
    assert processes.describe_exit_code(code) == said


def test_a_stage_is_not_passed_over_when_what_it_starts_from_was_made_anew(scripted):
    pipeline.run("r")
    shutil.rmtree("out/1")
    write(
        Path("r/1_sft.yaml"),
        stage="sft",
        output_dir="out/1",
        train_dataset="x.jsonl",
        model_name_or_path="base",
        seed=7,
    )
    with pytest.raises(
        UserError, match="out/2 holds a finished run that differs in the stage it starts from, which was run again"
    ) as error:
        pipeline.run("r")
    assert str(error.value).endswith("To redo this step and those after it, delete out/2, out/10.")
    assert calls()[3:] == ["1_sft.yaml"]


def test_overrides_go_to_the_stages_that_know_them(scripted):
    steps = pipeline.read_steps(
        "r", None, ["--seed", "5", "--kl_coef=0.5", "--max-length", "9", "--reward_funcs", "a:b", "c:d"]
    )
    assert [step.overrides for step in steps] == [
        ["--seed", "5", "--max-length", "9"],
        ["--seed", "5", "--max-length", "9"],
        ["--seed", "5", "--kl_coef=0.5", "--reward_funcs", "a:b", "c:d"],
    ]
    pipeline.run("r", overrides=["--seed", "5"])
    assert [line.split()[1] for line in Path("calls.txt").read_text(encoding="utf-8").splitlines()] == ["5", "5", "5"]


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (None, ["--kl_coeff", "1"], "--kl_coeff: no stage here has this key; did you mean 'kl_coef'?"),
        (None, ["--output_dir", "same"], "r/2_reward.yaml: output_dir: same is also the output_dir of r/1_sft.yaml; give each recipe its own"),
        (("2_rm.yaml", "stage: sft"), [], "has the number 2 too"),
        (("3_x.yaml", "seed: 1"), [], f"r/3_x.yaml: stage: expected one of {', '.join(STAGES)}, got nothing"),
        (("11_x.yaml", "stage: sft\nlearning_rat: 1"), [], "r/11_x.yaml:2: learning_rat: unknown key; did you mean 'learning_rate'?"),
        (None, ["--train_batch_size", "6"], "r/1_sft.yaml: train_batch_size: expected a multiple of the 4 processes, got 6; use 4 or 8"),
    ],
)  # fmt: skip
def test_nothing_starts_before_every_recipe_is_right(scripted, change, words, said):
    if change:
        Path("r", change[0]).write_text(change[1], encoding="utf-8")
    with pytest.raises(UserError) as error:
        pipeline.run("r", 4, words)
    assert said in str(error.value)
    assert not Path("calls.txt").exists()


def test_a_folder_that_is_not_there(folder):
    Path("recipes").mkdir()
    with pytest.raises(UserError, match=r"recipez: no such folder of recipes; did you mean 'recipes'\?"):
        pipeline.run("recipez")
    with pytest.raises(UserError, match=r"recipes: expected recipes named like 1_sft\.yaml, found none"):
        pipeline.run("recipes")


def test_a_recipe_in_place_of_a_folder(folder):
    Path("a.yaml").write_text("stage: ppo\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.yaml: expected a folder of recipes, got a file; .* `align ppo a\.yaml`"):
        pipeline.run("a.yaml")


# --- how a stage is started


def with_deepspeed(path: str) -> None:
    Path("d.json").write_text("{}", encoding="utf-8")
    with Path(path).open("a", encoding="utf-8") as file:
        file.write("deepspeed: d.json\n")


def test_alone_unless_the_recipe_or_the_number_asks_for_the_launcher(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with_deepspeed("r/2_reward.yaml")
    alone, launched, _ = (pipeline.command(step) for step in pipeline.read_steps("r", None, ["--seed", "1"]))
    assert alone == [sys.executable, "-m", "align", "sft", "r/1_sft.yaml", "--seed", "1"]
    port = launched[launched.index("--master_port") + 1]
    assert launched == [
        sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", "--num_accelerators", "1",
        "--master_port", port, "--module", "align", "reward", "r/2_reward.yaml", "--seed", "1",
    ]  # fmt: skip
    assert 1024 <= int(port) < 65536
    for step in pipeline.read_steps("r", 2, []):
        words = pipeline.command(step)
        assert words[words.index("--num_accelerators") + 1] == "2"


def test_gpus_that_are_visible(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with_deepspeed("r/2_reward.yaml")
    assert [step.processes for step in pipeline.read_steps("r", None, [])] == [1, 4, 1]
    assert [step.processes for step in pipeline.read_steps("r", 2, [])] == [2, 2, 2]
    with pytest.raises(UserError, match="--num_gpus: expected at most the 4 visible GPUs, got 8"):
        pipeline.read_steps("r", 8, [])
    # The launcher would take GPUs 0 and 1 of the machine, whatever CUDA_VISIBLE_DEVICES says.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    words = pipeline.command(pipeline.read_steps("r", 2, [])[0])
    assert words[words.index("--include") + 1] == "localhost:4,5"
    assert "--num_accelerators" not in words


# --- no process is left behind


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ending_the_run_ends_everything_that_it_started(folder, signum, code):
    """Also a grandchild that ignores SIGTERM."""
    Path("hang_sft").touch()
    runner = (
        "import signal, sys; from align.cli import processes, run; from align.__main__ import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job is born ignoring it
        "processes.GRACE = 1.0; run.command = lambda step: [sys.executable, 'stage.py', step.stage, step.path]\n"
        "sys.exit(main(['run', 'r']))"
    )
    process = subprocess.Popen([sys.executable, "-c", runner], start_new_session=True)
    family: list[psutil.Process] = []
    try:
        wait_for(Path("up").exists)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 3
        process.send_signal(signum)
        assert process.wait(timeout=30) == code
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    finally:
        for left in [*family, process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                left.kill()


def test_what_a_finished_stage_left_running_is_ended(tmp_path):
    """It has a moment to end by itself, and is ended then."""
    parent = (
        "import pathlib, subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(left.pid))"
    )
    assert pipeline.run_process([sys.executable, "-c", parent], {}) == 0
    left = int((tmp_path / "pid").read_text(encoding="utf-8"))
    wait_for(lambda: not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE, seconds=1)


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the closing tables


def test_the_table_of_before_and_after(scripted, capfd):
    pipeline.run("r")
    lines = [" ".join(line.replace("|", " ").split()) for line in capfd.readouterr().out.splitlines()]
    assert "1_sft.yaml loss 2 1.235" in lines
    assert "2_reward.yaml held-out rows 7" in lines
    samples = [line for line in lines if line.startswith("p")]
    assert samples == ["prompt SFT PPO score", *(f"p{i} [b]s r 0.5" for i in range(3))]


def test_stages_without_results_have_no_table():
    assert pipeline.closing_tables([("1_sft.yaml", {}), ("2_reward.yaml", {"results": {"steps": 3}})]) == []
