"""What a run writes and shows: files, resume, W&B read back from its own log, progress, TRL's logs, silence."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import align.engine.timer
import align.runs.progress
from align.config.ppo import PPORecipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.report.page import report_html
from align.runs.checkpoint import complete_checkpoints, synced_sums
from align.runs.tracker import Tracker
from align.trainer.callback import StageCallback, trainer_metrics
from tests import ranks
from tests.documented_metrics import METRICS, documented_metrics, undocumented
from tests.worlds import claimed


def ppo_recipe(folder: Path, **keys: Any) -> PPORecipe:
    return claimed(PPORecipe(output_dir=str(folder), sft_model_path="sft", **keys))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- files


def test_metrics_file(tmp_path: Path) -> None:
    with Tracker(ppo_recipe(tmp_path / "new" / "ppo"), "ppo", 2) as tracker:
        tracker.log(1, {"objective/score": 1.25, "episode": 64})
        tracker.log(2, {"objective/score": float("nan"), "objective/kl": float("inf")})
    first, second = lines(tmp_path / "new" / "ppo" / "metrics.jsonl")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
    assert first == {"step": 1, "objective/score": 1.25, "episode": 64.0}
    assert isinstance(first["episode"], float)
    assert second["objective/score"] is None
    assert second["objective/kl"] is None


def test_samples_file(tmp_path: Path) -> None:
    with Tracker(ppo_recipe(tmp_path), "ppo", 2) as tracker:
        tracker.table(2, "samples", ["prompt", "score"], [["a\u2028é\n", 1.5], ["b", None]])
        with pytest.raises(ValueError, match="argument 2"):
            tracker.table(2, "samples", ["prompt", "score"], [["short row"]])
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert "é" in text
    assert [json.loads(line) for line in text.split("\n")[:-1]] == [
        {"step": 2, "name": "samples", "prompt": "a\u2028é\n", "score": 1.5},
        {"step": 2, "name": "samples", "prompt": "b", "score": None},
    ]


def test_the_first_warning_of_a_kind_is_kept_also_over_a_resume(tmp_path: Path) -> None:
    for step, kinds in ((0, ["kl", "kl"]), (2, ["kl", "length"])):
        with Tracker(ppo_recipe(tmp_path), "ppo", 4, resume_step=step) as tracker:
            for kind in kinds:
                tracker.warn(step, kind, f"{kind} at {step}")
    kept = [(line["step"], line["kind"], line["text"]) for line in lines(tmp_path / "samples.jsonl")]
    assert kept == [(0, "kl", "kl at 0"), (2, "length", "length at 2")]


def test_resume_drops_what_is_done_again(tmp_path: Path) -> None:
    recipe = ppo_recipe(tmp_path)
    with Tracker(recipe, "ppo", 4) as tracker:
        for step in (0, 1, 2, 3):
            tracker.log(step, {"episode": step})
            tracker.table(step, "samples", ["prompt"], [["line\u2028separator"]])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "epis')  # killed while writing
    with Tracker(recipe, "ppo", 4, resume_step=2) as tracker:
        tracker.log(3, {"episode": 30})
    assert [(line["step"], line["episode"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 30),
    ]
    samples = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["step"] for line in samples] == [0, 1, 2]


def test_a_fresh_start_keeps_nothing(tmp_path: Path) -> None:
    # A run killed before its first checkpoint has logged step 0, and will again.
    for _ in range(2):
        with Tracker(ppo_recipe(tmp_path), "ppo", 4) as tracker:
            tracker.log(0, {"eval/score": 1.0})
            tracker.log(1, {"episode": 1.0})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1]


def test_other_ranks_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with Tracker(ppo_recipe(tmp_path / "ppo", report_to="wandb"), "ppo", 1) as tracker:
        tracker.log(1, {"episode": 1.0})
        tracker.table(1, "samples", ["prompt"], [["a"]])
        tracker.progress(1, score=1.0)
        tracker.say("hello")
    assert not (tmp_path / "ppo").exists()
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_removed_ends_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "ppo"
    with Tracker(ppo_recipe(folder), "ppo", 2) as tracker:
        tracker.log(1, {"episode": 64})
        tracker.progress(1)
        folder.rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=r"metrics\.jsonl: error .*: its folder was removed while the stage ran"):
            tracker.log(2, {"episode": 128})
        (folder / "checkpoint-2").mkdir(parents=True)  # as a checkpoint does
        with pytest.raises(UserError, match="ppo: the output folder was removed or renamed while the stage ran"):
            tracker.progress(2)


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    align.runs.progress.Display("ppo", 2).say("hello")


# --- Weights & Biases


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of an offline run: a LevelDB log of protobuf messages after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("run-*.wandb")
    data = path.read_bytes()[7:]
    position, message, block = 0, b"", 32768
    # The header counts towards the first block.
    while position + 7 <= len(data):
        room = block - (position + 7) % block
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                target = row.setdefault(outer[0], {}) if outer else row
                target[name] = json.loads(item.value_json, parse_constant=lambda constant: None)  # NaN
            rows.append(row)
    return rows


WANDB_RUN = """
import contextlib, sys
from align.config.ppo import PPORecipe; from align.errors import UserError
from align.runs.tracker import Tracker; from tests.worlds import claimed
folder, resume_step = sys.argv[1], int(sys.argv[2])
recipe = PPORecipe(output_dir=folder, sft_model_path="sft", report_to="wandb", project="stories", seed=resume_step)
if resume_step == 0:
    claimed(recipe)
tracker = Tracker(recipe, "ppo", 4, resume_step)
with contextlib.suppress(ZeroDivisionError), tracker:
    for step in range(resume_step + 1, resume_step + 4):
        tracker.log(step, {"objective/score": step / 3, "objective/kl": 1e-7 * step})
        tracker.log(step, {"eval/score": step / 7, "eval/win_rate": float("nan") if step == 1 else 0.5})
    tracker.table(step, "samples", ["prompt", "response", "score"], [["a", "b", 1.5], ["c", "d", 2.5]])
    tracker.progress(step)
    1 / resume_step
"""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Variables that lead to no W&B account."""
    return {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), **more}


def wandb_variables() -> list[str]:
    return [name for name in os.environ if name.startswith("WANDB")]


def run_python(code: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in wandb_variables()}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**kept, **env}, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def run_fork(code: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`run_python`, but in a process that has imported the libraries already."""
    log = Path(env["HOME"], "fork")
    return ranks.run(ranks.execute, code, *arguments, ranks=1, log=log, env=env, without=wandb_variables())


def run_on_terminal(code: str, *arguments: str, env: dict[str, str]) -> tuple[int, str, str]:
    """`run_fork` with stdin and stderr on a terminal; returns exit code, stdout and what the terminal showed."""
    log = Path(env["HOME"], "fork")
    words = (str(log.with_name("shown")), code, *arguments)
    done = ranks.run(
        ranks.execute_on_terminal, *words, ranks=1, log=log, env=env, without=wandb_variables(), timeout=60
    )
    shown = log.with_name("shown").read_text(encoding="utf-8")
    return done.returncode, done.stdout, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


@pytest.mark.slow
def test_wandb_holds_the_same_numbers_offline_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline" / "3_ppo"
    for resume_step, group in ((0, {}), (2, {"WANDB_RUN_GROUP": "mine"})):
        # The first process dies after step 3, when its last checkpoint is of step 2.
        time.sleep(1.0 if resume_step else 0.0)  # W&B names its folders by the second
        done = run_fork(
            WANDB_RUN, str(folder), str(resume_step), env=environment(tmp_path, WANDB_MODE="offline", **group)
        )
        assert (done.returncode, done.stdout) == (0, "")
        told, shown = done.stderr.splitlines()
        assert told.startswith(f"W&B offline; later: wandb sync --append {folder}/wandb/offline-run-")
        assert shown.startswith(f"ppo {resume_step + 3}/4")

    pieces = sorted(folder.glob("wandb/offline-run-*"))
    assert len(pieces) == 2
    first, second = (list(wandb_records(piece)) for piece in pieces)
    runs = [
        next(record.run for record in records if record.WhichOneof("record_type") == "run")
        for records in (first, second)
    ]
    assert runs[0].run_id == runs[1].run_id == json.loads((folder / "wandb_run.json").read_text())["id"]
    assert [run.run_group for run in runs] == ["pipeline", "mine"]
    for run in runs:
        assert (run.project, run.job_type, run.display_name) == ("stories", "ppo", "3_ppo")
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert (config["stage"], config["kl_coef"], config["train_dataset"]) == ("ppo", 0.05, [])

    # Rows of both processes, the later one's in the place of steps done again, against the file.
    rows = [row for row in history(first) if row["step"] <= 2] + history(second)
    plain = [row for row in rows if not {"samples", "report"} & row.keys()]
    numbers = [{name: value for name, value in row.items() if name[0] != "_"} for row in plain]
    written = [
        {name: value for name, value in line.items() if name != "time"} for line in lines(folder / "metrics.jsonl")
    ]
    assert len(written) == 10
    assert numbers == written

    kinds = [[record.WhichOneof("record_type") for record in records] for records in (first, second)]
    assert not {"output", "output_raw"} & {*kinds[0], *kinds[1]}  # what we print is ours
    exits = [records[kind.index("exit")].exit.exit_code for records, kind in zip((first, second), kinds, strict=True)]
    assert exits == [1, 0]  # the first process ended by an error

    # Row numbers of the processes never meet, and every chart is drawn over our step.
    assert max(row["_step"] for row in history(first)) < min(row["_step"] for row in history(second))
    metrics = [record.metric for record in first if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)

    (sample,) = [row for row in history(first) if "samples" in row]
    assert (sample["step"], sample["samples"]["_type"], sample["samples"]["nrows"]) == (3, "table-file", 2)
    table = json.loads((pieces[0] / "files" / sample["samples"]["path"]).read_text())
    assert table == {"columns": ["prompt", "response", "score"], "data": [["a", "b", 1.5], ["c", "d", 2.5]]} | {
        key: table[key] for key in table.keys() - {"columns", "data"}
    }

    # The run's report, charts and all; the process that died has none.
    assert not any("report" in row for row in history(first))
    (report,) = [row for row in history(second) if "report" in row]
    assert (report["step"], report["report"]["_type"]) == (5, "html-file")
    page = (pieces[1] / "files" / report["report"]["path"]).read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", page)
    assert len(charts) >= 3
    assert charts == re.findall(r"<svg.*?</svg>", report_html(folder))
    assert "app.wandb.ai" not in page  # W&B would add a style sheet from the network


def test_wandb_without_an_account_is_the_users_to_mend(tmp_path: Path) -> None:
    # On a terminal W&B would ask for a key, and wait.
    code, _, shown = run_on_terminal(WANDB_RUN, str(tmp_path / "ppo"), "0", env=environment(tmp_path))
    assert code == 1
    message = shown.splitlines()[-1]
    assert message.startswith("align.errors.UserError: report_to: ")
    assert "WANDB_MODE=offline" in message
    assert "wandb login" in message


WANDB_LOST = """
import os, signal, sys, time
import align.runs.wandb_run; import psutil
from align.config.ppo import PPORecipe
from align.runs.tracker import Tracker
from tests.worlds import claimed
align.runs.wandb_run.FINISH = 1.0
for folder, how in (("dies", signal.SIGKILL), ("hangs", signal.SIGSTOP)):
    recipe = claimed(PPORecipe(output_dir=f"{sys.argv[1]}/{folder}", sft_model_path="sft", report_to="wandb"))
    with Tracker(recipe, "ppo", 100) as tracker:
        for step in range(1, 101):
            tracker.log(step, {"objective/score": 1.0 * step})
            if step == 10:
                for child in psutil.Process().children(recursive=True):
                    os.kill(child.pid, how)
                time.sleep(0.2)
        tracker.table(100, "samples", ["prompt"], [["a"]])
"""


def test_wandb_may_die_or_hang(tmp_path: Path) -> None:
    done = run_fork(WANDB_LOST, str(tmp_path), env=environment(tmp_path, WANDB_MODE="offline"))
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith(("W&B offline", "ppo "))]
    assert len(told) == 2, done.stderr
    assert re.fullmatch(r"W&B has stopped \(.*\)\. Training goes on; all numbers are in metrics\.jsonl\.", told[0])
    assert re.fullmatch(
        r"W&B is not done after 1 s and was stopped; later: wandb sync .*/hangs/wandb/offline-run-.*", told[1]
    )
    for folder in ("dies", "hangs"):
        assert [line["step"] for line in lines(tmp_path / folder / "metrics.jsonl")] == [*range(1, 101)]
        assert len(lines(tmp_path / folder / "samples.jsonl")) == 1


def test_a_file_in_the_place_of_wandbs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ppo_recipe(tmp_path / "out", report_to="wandb")
    (tmp_path / "wandb").write_text("mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"report_to: .* cannot write to .*/wandb \(File exists\).*set WANDB_DIR"):
        Tracker(recipe, "ppo", 1).__enter__()
    assert (tmp_path / "wandb").read_text() == "mine"


# --- progress


class Clock:
    """Stands in for the `time` module of align.runs.progress."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(align.runs.progress, "time", clock)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return clock


def test_plain_progress(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(ppo_recipe(tmp_path), "ppo", 80) as tracker:
        clock.now += 50  # loading models is no step
        tracker.progress(0)
        for step in range(1, 81):
            clock.now += 4
            tracker.progress(step, score=step / 3, kl=3.14159, note="ok")
        tracker.progress(80)
    shown = capsys.readouterr()
    assert shown.out == ""
    printed = shown.err.splitlines()
    assert printed[0] == "ppo 0/80  -:--:-- left"
    assert printed[1] == "ppo 3/80  0:05:08 left  score 1  kl 3.142  note ok"  # 12 s later; 77 * 4 = 308 s
    assert printed[2] == "ppo 6/80  0:04:56 left  score 2  kl 3.142  note ok"
    assert printed[-1] == "ppo 80/80  0:00:00 left  score 26.67  kl 3.142  note ok"
    assert len(printed) == 1 + 26 + 1  # steps 0, 3, ..., 78 and 80: once


def test_time_left_is_the_pace_of_this_process(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(ppo_recipe(tmp_path), "ppo", 100, resume_step=90) as tracker:
        clock.now += 30
        tracker.progress(91)
        clock.now += 30
        tracker.progress(92)
    assert capsys.readouterr().err.splitlines() == ["ppo 91/100  0:04:30 left", "ppo 92/100  0:04:00 left"]


def test_time_left_runs_down_during_a_step(clock: Clock) -> None:
    display = align.runs.progress.Display("ppo", 3)
    display.start(0)
    clock.now += 60
    display.update(1, {})
    assert display.time_left() == "0:02:00"
    clock.now += 45
    assert display.time_left() == "0:01:15"
    clock.now += 1000
    assert display.time_left() == "0:00:00"


def test_progress_on_a_terminal(tmp_path: Path) -> None:
    code = f"""
import time
from align.config.ppo import PPORecipe
from align.runs.tracker import Tracker
from tests.worlds import claimed
with Tracker(claimed(PPORecipe(output_dir={str(tmp_path / "ppo")!r}, sft_model_path="sft")), "ppo", 4) as tracker:
    tracker.progress(1, score=1.25)
    time.sleep(0.2)
    tracker.say("[a]word")
    print("result")
    tracker.progress(4, score=2.5)
"""
    returncode, stdout, text = run_on_terminal(code, env=environment(tmp_path))
    assert (returncode, stdout) == (0, "result\n")  # stdout is a pipe here, and stays clean
    assert "[a]word" in text
    last = re.split(r"[\r\n]+", text.strip())[-1]
    assert re.fullmatch(r"ppo ━+ +4/4 0:00:0\d 0:00:00 left score 2.5 *", last)


# --- TRL's trainers


def test_trainer_metrics_take_documented_names() -> None:
    logs = {
        "loss": 2.0,
        "grad_norm": 0.5,
        "learning_rate": 1e-5,
        "epoch": 0.5,
        "mean_token_accuracy": 0.4,
        "num_tokens": 9,
    }
    assert trainer_metrics(logs, with_perplexity=True) == {
        "train/loss": 2.0, "train/grad_norm": 0.5, "train/learning_rate": 1e-5, "train/epoch": 0.5,
        "train/mean_token_accuracy": 0.4, "train/num_tokens": 9.0,
    }  # fmt: skip
    logs = {"eval_loss": 2.0, "eval_runtime": 1.0, "eval_samples_per_second": 3.0, "eval_num_tokens": 9.0, "epoch": 1.0}
    assert trainer_metrics(logs, with_perplexity=True) == {
        "eval/loss": 2.0, "eval/perplexity": pytest.approx(7.389056), "train/epoch": 1.0
    }  # fmt: skip
    assert trainer_metrics(logs, with_perplexity=False) == {"eval/loss": 2.0, "train/epoch": 1.0}
    assert trainer_metrics({"eval_loss": 1e9}, with_perplexity=True)["eval/perplexity"] > 1e300
    assert (
        trainer_metrics(
            {"train_runtime": 1.0, "train_loss": 2.0, "epoch": 1.0, "total_flos": 1.0}, with_perplexity=True
        )
        == {}
    )


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_config(**more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, **more,
    )  # fmt: skip


ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
    "gradient_checkpointing": False,
}  # fmt: skip


def sft_trainer(tracker: Tracker, recipe: SFTRecipe, **arguments: Any) -> Any:
    from datasets import Dataset
    from transformers import LlamaForCausalLM, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 1], "labels": [-100, 4, 5, 1]}] * 8)
    trainer = SFTTrainer(
        LlamaForCausalLM(tiny_config()),
        args=SFTConfig(recipe.output_dir, **ARGUMENTS, **arguments),
        train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer(),
        callbacks=[StageCallback(tracker, recipe, synced_sums, align.engine.timer.Clock())],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def test_sft_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = claimed(SFTRecipe(output_dir=str(tmp_path), save_total_limit=1))
    with Tracker(recipe, "sft", 5) as tracker:
        trainer = sft_trainer(
            tracker, recipe, max_steps=5, logging_steps=3, save_steps=2, eval_strategy="steps", eval_steps=4
        )
        capsys.readouterr()
        trainer.train()
    shown = capsys.readouterr()
    assert shown.out == ""
    first, *_, last = shown.err.splitlines()
    assert first == "sft 0/5  -:--:-- left"
    assert re.fullmatch(r"sft 5/5  0:00:00 left  loss [\d.]+  eval/loss [\d.]+", last)

    logged = lines(tmp_path / "metrics.jsonl")
    # Steps 2, 4 and 5 are logged because they are saved, 3 because of logging_steps; the second 4 and 5 are evaluations.
    assert [line["step"] for line in logged] == [2, 3, 4, 4, 5, 5]
    assert undocumented(name for line in logged for name in line if name not in ("step", "time")) == []
    assert {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/mean_token_accuracy",
        "train/entropy",
    } <= logged[0].keys()
    assert {"eval/loss", "eval/perplexity", "eval/mean_token_accuracy", "eval/entropy"} <= logged[3].keys()
    assert logged[4]["train/loss"] == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]

    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert not (tmp_path / "checkpoint-4").exists()
    state = json.loads((tmp_path / "checkpoint-5" / "complete.json").read_text())
    assert (state["step"], state["layout"]) == (5, "1 process at ZeRO 0")


def test_nan_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    import torch
    from transformers import TrainerCallback

    class BreakInStepThree(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                torch.nn.init.constant_(model.lm_head.weight, float("nan"))

    recipe = claimed(SFTRecipe(output_dir=str(tmp_path), learning_rate=0.25))
    with Tracker(recipe, "sft", 6) as tracker:
        trainer = sft_trainer(tracker, recipe, max_steps=6, logging_steps=100, save_strategy="steps", save_steps=2)
        trainer.add_callback(BreakInStepThree())
        with pytest.raises(UserError, match=r"loss is nan at step 4.*learning_rate \(now 0\.25\)"):
            trainer.train()
    assert [folder.name for folder in complete_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_reward_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification, PrinterCallback
    from trl import RewardConfig, RewardTrainer

    recipe = claimed(RewardRecipe(output_dir=str(tmp_path), model_name_or_path="sft"))
    rows = Dataset.from_list([{"chosen_ids": [3, 4, 1], "rejected_ids": [3, 5, 1]}] * 4)
    with Tracker(recipe, "reward", 3) as tracker:
        trainer = RewardTrainer(
            LlamaForSequenceClassification(tiny_config(num_labels=1)),
            args=RewardConfig(
                recipe.output_dir, **ARGUMENTS, max_steps=3, logging_steps=2, eval_strategy="steps",
                eval_steps=3, save_strategy="no",
            ),
            train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer(),
            callbacks=[StageCallback(tracker, recipe, synced_sums, align.engine.timer.Clock())],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in logged] == [2, 3, 3]  # the last step is logged even when nothing is saved
    assert undocumented(name for line in logged for name in line if name not in ("step", "time")) == []
    names = {
        "train/loss",
        "train/accuracy",
        "train/margin",
        "train/min_reward",
        "train/mean_reward",
        "train/max_reward",
    }
    assert names <= logged[0].keys()
    assert {"eval/loss", "eval/accuracy", "eval/margin"} <= logged[-1].keys()
    assert "eval/perplexity" not in logged[-1]


# --- silence


CHATTY = """
import os, sys
from align.runs.quiet import quiet
quiet()
import deepspeed, torch, transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
import logging, warnings
folder = sys.argv[1]
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
transformers.LlamaForCausalLM(config).save_pretrained(folder)
transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)  # its head is missing
Dataset.from_list([{"a": 1}]).map(lambda row: row)
SFTConfig(folder, use_cpu=True, bf16=False, report_to="none")  # a FutureWarning
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
net = torch.nn.Linear(2, 1)
deepspeed.initialize(
    model=net,
    model_parameters=net.parameters(),
    config={"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
)
torch.distributed.destroy_process_group()
warnings.warn("never mind")
for name in ("DeepSpeed", "trl.core", "accelerate.state", "datasets", "peft.mapping", "torch.distributed"):
    logging.getLogger(name).warning("never mind")
logging.getLogger("DeepSpeed").error("a deepspeed error")
transformers.logging.get_logger("transformers.trainer").error("a transformers error")
raise RuntimeError("an exception")
"""


def test_only_errors_of_others_come_through(tmp_path: Path) -> None:
    done = run_python(CHATTY, str(tmp_path), env=environment(tmp_path))
    assert re.fullmatch(r".* \[ERROR\] .* a deepspeed error\n", done.stdout)
    first, *_, last = done.stderr.splitlines()
    assert first == "[transformers] a transformers error"
    assert last.endswith("RuntimeError: an exception")
    assert len(done.stderr.splitlines()) == 4, done.stderr  # those and the rest of the traceback


CHATTY_IMPORTED = """
import datasets, sys, transformers
from align.runs.quiet import quiet
quiet()
config = transformers.LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=1)
datasets.Dataset.from_list([{"a": 1}]).map(lambda row: row)
"""


def test_quiet_after_the_imports(tmp_path: Path) -> None:
    done = run_fork(CHATTY_IMPORTED, str(tmp_path), env=environment(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_who_wants_to_hear_does(tmp_path: Path) -> None:
    code = "import warnings; from align.runs.quiet import quiet; quiet(); import os; print(os.environ['DATASETS_VERBOSITY']); warnings.warn('hear')"
    env = environment(tmp_path, DATASETS_VERBOSITY="info", PYTHONWARNINGS="default")
    done = run_python(code, env=env)
    assert done.stdout == "info\n"
    assert "hear" in done.stderr


# --- documentation


def test_every_row_of_the_documentation_is_filled() -> None:
    rows = [line for line in METRICS.read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 60
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4, row
        assert all(cells), row


def test_documented_names() -> None:
    names = documented_metrics()
    assert {"train/loss", "train/min_reward", "train/max_reward", "objective/score/<source>", "episode"} <= names
    assert undocumented(["objective/score/reward_model", "eval/true/world:true_reward", "eval/kl"]) == []
    assert undocumented(["objective/scores", "eval/true/", "loss", "xeval/kl", "eval/klx"]) == [
        "objective/scores", "eval/true/", "loss", "xeval/kl", "eval/klx"
    ]  # fmt: skip


def test_every_name_in_the_code_is_documented() -> None:
    code = "".join(path.read_text() for path in Path(align.__file__).parent.rglob("*.py"))
    used = set(re.findall(r'"((?:train|eval|objective|response|policy|value|advantage|time)/[a-z_]+)"', code))
    assert used
    assert undocumented(used) == []
