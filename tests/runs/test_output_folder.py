"""Which folders a run takes, what in them it overwrites and deletes, and that two runs never share one."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from align.errors import OtherRun, UserError
from align.runs import heartbeat, lock, lock_record, output_folder
from align.runs.checkpoint import clear_partial, complete_checkpoints, cut_records, delete_checkpoint, rotate, set_aside
from align.runs.files import digest
from align.runs.launch import end_on_signals
from align.runs.output_folder import claim, clear_finished, find_mark, one_run_per_folder, release
from align.runs.own_files import delete, new_files, new_folder, own, owned
from tests.ranks import server
from tests.worlds import save_tiny_policy, write_jsonl

IDENTITY: dict[str, Any] = {"stage": "sft", "recipe": {"seed": 1}, "inputs": {}}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)


@pytest.fixture
def out(tmp_path):
    """A folder that this process has claimed."""
    folder = tmp_path / "out"
    claim(folder, IDENTITY, resuming=False)
    yield folder
    release(folder)


def snapshot(folder: Path) -> dict[str, Any]:
    """All below a folder, by path: bytes, where a link points, or None for a folder."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


FOREIGN = {
    "one note": {"notes.txt": "mine"},
    "a hidden file": {".gitkeep": ""},
    "a checkpoint": {"checkpoint-500/model.safetensors": "mine"},
    "a model": {"config.json": "{}", "model.safetensors": "mine"},
    "names of ours": {"metrics.jsonl": "mine", "README.md": "mine"},
    "a manifest of another program": {"stage.json": '{"stage": 1}', "run.json": "[]"},
    "a record that is damaged": {"run.json": '{"stage": "sft", "rec'},
    "a lock of another program": {"run.lock": "mine"},
    "a deeper folder": {"wandb/run/log": "mine"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path, files):
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(UserError) as error:
        claim(tmp_path / "out", IDENTITY, resuming=False)
    assert str(error.value).startswith("output_dir: ")
    assert sorted(name.split("/")[0] for name in files)[0] in str(error.value)
    assert snapshot(tmp_path) == before


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loose").symlink_to("nowhere")
    (tmp_path / "shut").mkdir(mode=0o500)
    before = snapshot(tmp_path)
    for name in ("file", "loose", "file/below"):
        with pytest.raises(UserError, match="output_dir: cannot write to"):
            claim(tmp_path / name, IDENTITY, resuming=False)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["absent", "deep", "empty", "link to an empty one", "of a run killed at once"])
def test_a_folder_that_is_free_is_taken(tmp_path, kind):
    folder = tmp_path / ("a/b/out" if kind == "deep" else "out")
    if kind in ("empty", "of a run killed at once"):
        folder.mkdir()
    if kind == "link to an empty one":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to("elsewhere")
    if kind == "of a run killed at once":
        write(folder, run_DOT_lock="")
        (folder / ".run.json.align-0123456789ab").write_text('{"sta')
    claim(folder, IDENTITY, resuming=False)
    release(folder)
    name, content = find_mark(folder) or ("", {})
    assert (name, content["stage"], content["files"]) == ("run.json", "sft", [])
    assert not (folder / "run.lock").exists()
    claim(folder, IDENTITY, resuming=True)
    release(folder)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"run.json": {"stage": "ppo", "recipe": {}}}, "an unfinished run of the ppo stage"),
        ({"stage.json": {"stage": "sft", "recipe": {}}}, "a finished run of the sft stage"),
        ({"results.json": {"stage": "evaluate", "recipe": {}}}, "a finished run of the evaluate stage"),
    ],
)
def test_the_output_of_another_run_is_refused(tmp_path, record, what):
    ((name, content),) = record.items()
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(OtherRun, match=f"holds {what}"):
        claim(tmp_path, IDENTITY, resuming=False)
    assert set(snapshot(tmp_path)) == {name}


class TestOwnFiles:
    def test_foreign_files_of_names_that_the_run_needs_stop_it_before_it_writes(self, out):
        release(out)
        for name in (
            "metrics.jsonl",
            "checkpoint-500",
            "best",
            "model-00001-of-00002.safetensors",
            "damaged-checkpoint-2",
        ):
            (out / name).write_text("mine")
            before = snapshot(out)
            with pytest.raises(UserError, match=rf"{name} was not written by this run"):
                claim(out, IDENTITY, resuming=True)
            assert snapshot(out) == before
            (out / name).unlink()
        others = ("README.md", "best", "checkpoint-1", "checkpoint-2", "metrics.jsonl", "samples.jsonl")
        for name in others:
            (out / name).write_text("mine")
        said = r"README.md was not written by this run, .* \(so have best, checkpoint-1, checkpoint-2 and 2 more\); move them"
        with pytest.raises(UserError, match=said):
            claim(out, IDENTITY, resuming=True)
        for name in others:
            (out / name).unlink()
        (out / "notes.md").write_text("mine")  # no such name
        claim(out, IDENTITY, resuming=True)

    def test_no_link_is_written_through(self, out, tmp_path):
        (tmp_path / "mine").write_text("mine")
        own(out / "metrics.jsonl").symlink_to("../mine")
        with pytest.raises(UserError, match=r"metrics\.jsonl is a symbolic link"):
            own(out / "metrics.jsonl")
        release(out)
        with pytest.raises(UserError, match=r"metrics\.jsonl is a symbolic link"):
            claim(out, IDENTITY, resuming=True)
        delete(out / "metrics.jsonl")
        assert (out / "metrics.jsonl").is_symlink()
        assert (tmp_path / "mine").read_text() == "mine"

    def test_a_linked_record_is_none(self, out, tmp_path):
        release(out)
        (out / "run.json").rename(tmp_path / "theirs")
        (out / "run.json").symlink_to("../theirs")
        with pytest.raises(UserError, match=r"holds run\.json, and no"):
            claim(out, IDENTITY, resuming=True)
        (out / "run.json").unlink()

    def test_the_record_survives_and_is_believed_only_about_the_folder(self, out):
        own(out / "metrics.jsonl", out / "samples.jsonl")
        assert owned(out) == {"metrics.jsonl", "samples.jsonl"}
        record = json.loads((out / "run.json").read_text())
        for name in ("../mine", "/etc/passwd", "a/../../b", "", "."):
            (out / "run.json").write_text(json.dumps({**record, "files": [name]}))
            with pytest.raises(UserError, match=r"`files` in its .* is damaged"):
                delete(out / "mine")

    def test_a_link_within_a_folder_that_it_lists_is_not_followed(self, out, tmp_path):
        write(tmp_path, theirs__notes="mine")
        own(out / "untrained").mkdir()
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**record, "files": ["untrained/inner/notes"]}))
        (out / "untrained" / "inner").symlink_to(tmp_path / "theirs")
        delete(out / "untrained")
        assert (tmp_path / "theirs" / "notes").read_text() == "mine"

    def test_only_what_it_lists_is_deleted(self, out):
        own(out / "untrained").mkdir()
        write(out, untrained__weights="ours", best__weights="mine", notes="mine")
        (out / "empty").mkdir()
        for name in ("untrained", "best", "notes", "empty", "nothing"):
            delete(out / name)
        assert snapshot(out).keys() - {"run.json", "run.lock"} == {"best", "best/weights", "notes", "empty"}

    def test_a_new_folder_replaces_what_was_its_own_there(self, out):
        for text in ("first", "second"):
            with new_folder(out / "best") as folder:
                write(folder, weights=text, inner__part=text)
            assert {name: text for name, text in snapshot(out / "best").items() if text} == {
                "weights": text.encode(),
                "inner/part": text.encode(),
            }
        write(out, best__mine="mine", best__inner__mine="mine")
        with new_folder(out / "best") as folder:
            write(folder, weights="third")
        assert snapshot(out / "best") == {
            "weights": b"third", "mine": b"mine", "inner": None, "inner/mine": b"mine"
        }  # fmt: skip
        assert owned(out) == {"best/weights"}
        write(out, best__readme="mine")
        with (
            pytest.raises(UserError, match="best/readme was not written by this run"),
            new_folder(out / "best") as folder,
        ):
            write(folder, readme="ours")
        assert (out / "best" / "readme").read_text() == "mine"

    def test_a_folder_of_somebody_else_is_not_replaced(self, out):
        write(out, best__weights="mine")
        with pytest.raises(UserError, match="best was not written"), new_folder(out / "best"):
            pytest.fail("it is filled before it is refused")
        assert (out / "best" / "weights").read_text() == "mine"

    def test_a_folder_half_replaced_by_a_killed_run_keeps_files_of_others(self, out):
        with new_folder(out / "best") as folder:
            write(folder, weights="first")
        (out / ".best.retired").mkdir()
        (out / ".best.retired" / "notes").write_text("mine")
        with pytest.raises(UserError, match=r"\.best\.retired was not written"), new_folder(out / "best") as folder:
            write(folder, weights="second")
        assert (out / ".best.retired" / "notes").read_text() == "mine"
        assert (out / "best" / "weights").read_text() == "first"

    def test_temporary_files_of_its_own_go(self, out, tmp_path):
        own(out / "metrics.jsonl")
        release(out)
        (tmp_path / "theirs").write_text("mine")
        theirs = (
            ".metrics.jsonl.5",
            ".metrics.jsonl.align-5",
            ".notes.align-0123456789ab",
            "metrics.jsonl.align-0123456789ab",
        )
        for name in (*theirs, ".metrics.jsonl.align-0123456789ab", ".run.json.align-0123456789ab"):
            (out / name).write_text("{")
        (out / ".metrics.jsonl.align-ba9876543210").symlink_to("../theirs")
        claim(out, IDENTITY, resuming=True)
        assert snapshot(out).keys() == {*theirs, ".metrics.jsonl.align-ba9876543210", "run.json", "run.lock"}

    def test_nothing_is_recorded_once_the_record_is_gone(self, out):
        (out / "run.json").unlink()
        with pytest.raises(UserError, match=r"run\.json: was removed or damaged while the stage ran"):
            own(out / "metrics.jsonl")
        assert not (out / "run.json").exists()

    def test_new_files_come_all_or_none(self, out, tmp_path):
        (tmp_path / "mine").write_text("mine")
        for text in ("first", "second"):
            with new_files(out) as folder:
                write(folder, weights=text, adapter__weights=text)
            assert (out / "weights").read_text() == (out / "adapter" / "weights").read_text() == text
        os.link(out / "weights", tmp_path / "copy")  # a second name, as `cp -l` makes
        with new_files(out) as folder:
            write(folder, weights="third")
        assert (tmp_path / "copy").read_text() == "second"
        (out / "config").symlink_to("../mine")
        with pytest.raises(UserError, match="config is a symbolic link"), new_files(out) as folder:
            write(folder, config="ours", weights="fourth")
        assert (tmp_path / "mine").read_text() == "mine"
        assert (out / "weights").read_text() == "third"
        write(out, theirs__notes="mine")
        with pytest.raises(UserError, match="theirs was not written by this run"), new_files(out) as folder:
            write(folder, theirs__weights="ours")
        assert snapshot(out / "theirs") == {"notes": b"mine"}


class TestCheckpoints:
    def save(self, out: Path, step: int, **told: Any) -> Path:
        checkpoint = own(out / f"checkpoint-{step}")
        write(checkpoint, weights="ours")
        sums = {"files": {"weights": [4, 0]}, "records": {"metrics.jsonl": [4, 0]}, **told}
        state = {"step": step, "layout": "1 process at ZeRO 0", **sums}
        (checkpoint / "complete.json").write_text(json.dumps({**state, "digest": digest(state)}))
        return checkpoint

    def test_those_of_others_do_not_count_and_stay(self, out):
        for step in (1, 2, 3):
            self.save(out, step)
        write(out, **{"checkpoint-9__complete_DOT_json": "{}", "checkpoint-mine__complete_DOT_json": "{}"})
        assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
        rotate(out, 1)
        assert sorted(path.name for path in out.glob("checkpoint-*")) == [
            "checkpoint-3",
            "checkpoint-9",
            "checkpoint-mine",
        ]
        assert owned(out) == {"checkpoint-3"}

    def test_what_others_put_into_one_is_kept(self, out, capsys):
        write(self.save(out, 1), inner__model_DOT_gguf="mine")
        self.save(out, 2)
        rotate(out, 1)
        assert (out / "checkpoint-2" / "weights").exists()
        assert snapshot(out / "kept-checkpoint-1").keys() == {"inner", "inner/model.gguf"}
        assert not (out / "checkpoint-1").exists()
        assert "moved to" in capsys.readouterr().err

    def test_also_into_one_that_is_damaged_or_written_in_part(self, out):
        damaged, partial = self.save(out, 1), own(out / "checkpoint-2")
        (damaged / "complete.json").write_text("{")
        parts = ("state", "policy", "value", "ema", "replay")
        ours = {f"{part}__rank-0000{rank}_DOT_safetensors": "" for part in parts for rank in (0, 1)} | {
            "random__0-of-2_DOT_json": "",
            "random___DOT_0-of-2_DOT_json_DOT_align-0123456789ab": "",
            "tokenizer_DOT_json": "",
        }
        for checkpoint in (set_aside(damaged), partial):
            write(checkpoint, **ours, notes="mine", state__model_DOT_gguf="mine")
        (partial / "link").symlink_to(out)
        clear_partial(out)
        assert owned(out) == {"damaged-checkpoint-1"}
        delete_checkpoint(out / "damaged-checkpoint-1")
        left = {name for name, content in snapshot(out).items() if content is not None} - {"run.json", "run.lock"}
        assert left == {
            *("kept-checkpoint-2/link", "kept-checkpoint-2/notes", "kept-checkpoint-2/state/model.gguf"),
            # The first stands for what else a tokenizer may write.
            *(
                "kept-damaged-checkpoint-1/weights",
                "kept-damaged-checkpoint-1/notes",
                "kept-damaged-checkpoint-1/state/model.gguf",
            ),
        }

    def test_a_linked_one_is_not_emptied(self, out, tmp_path):
        write(tmp_path, **{"theirs__complete_DOT_json": "mine", "theirs__config_DOT_json": "mine"})
        own(out / "damaged-checkpoint-1").symlink_to(tmp_path / "theirs")
        delete_checkpoint(out / "damaged-checkpoint-1")
        assert snapshot(tmp_path / "theirs") == {"complete.json": b"mine", "config.json": b"mine"}

    def test_one_is_set_aside_only_under_a_free_name(self, out):
        checkpoint = self.save(out, 1)
        write(out, **{"damaged-checkpoint-1": "mine"})
        with pytest.raises(UserError, match="damaged-checkpoint-1 was not written by this run"):
            set_aside(checkpoint)
        assert (out / "damaged-checkpoint-1").read_text() == "mine"
        (out / "damaged-checkpoint-1").unlink()
        assert set_aside(checkpoint).name == "damaged-checkpoint-1"
        assert owned(out) == {"damaged-checkpoint-1"}

    def test_records_are_cut_only_if_they_are_its_own_and_by_no_second_name(self, out, tmp_path):
        checkpoint = self.save(out, 1, records={"metrics.jsonl": [4, 0], "mine.jsonl": [0, 0]})
        own(out / "metrics.jsonl").write_text("one\ntwo\n")
        write(out, mine_DOT_jsonl="mine")
        os.link(out / "metrics.jsonl", tmp_path / "copy")
        cut_records(checkpoint)
        assert (out / "metrics.jsonl").read_text() == "one\n"
        assert (out / "mine.jsonl").read_text() == "mine"
        assert (tmp_path / "copy").read_text() == "one\ntwo\n"


class TestNoTrace:
    @pytest.mark.parametrize("before", ["absent", "deep", "empty"])
    def test_of_a_run_that_is_refused_after_it_has_claimed(self, tmp_path, before):
        folder = tmp_path / ("a/b/out" if before == "deep" else "out")
        if before == "empty":
            folder.mkdir()
        was = snapshot(tmp_path)
        with pytest.raises(UserError, match="bad row"):
            Stage(folder, untrained=True).run()
        assert snapshot(tmp_path) == was
        Stage(folder, fails=False).run()

    def test_of_a_claim_for_which_the_disk_has_no_room(self, tmp_path, monkeypatch):
        def full(path: Path, value: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(output_folder, "write_json", full)
        with pytest.raises(UserError, match=r"cannot write to .*out \(No space left on device\)"):
            claim(tmp_path / "a" / "b" / "out", IDENTITY, resuming=False)
        assert snapshot(tmp_path) == {}

    def test_but_what_has_begun_stays(self, tmp_path):
        with pytest.raises(UserError, match="bad row"):
            Stage(tmp_path / "out", metrics="line\n").run()
        assert snapshot(tmp_path / "out").keys() == {"run.json", "metrics.jsonl"}

    def test_nor_is_what_an_earlier_run_left_deleted(self, tmp_path):
        Stage(tmp_path / "out", fails=False).run()
        with pytest.raises(UserError, match="bad row"):
            Stage(tmp_path / "out", untrained=True).run()
        assert snapshot(tmp_path / "out").keys() == {"run.json", "untrained", "untrained/weights", "metrics.jsonl"}


def test_a_stage_is_left_without_trace_by_a_bad_row_and_with_all_its_files_on_record_by_a_run(tmp_path):
    from align.config.load import as_recipe
    from align.config.sft import SFTRecipe
    from align.sft.train import run as sft

    keys = {"output_dir": tmp_path / "new" / "out", "model_name_or_path": save_tiny_policy(tmp_path / "base")}
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    keys |= {"train_dataset": rows, "eval_fraction": 0, "train_batch_size": 4, "save_steps": 1}
    was = snapshot(tmp_path)
    with pytest.raises(UserError, match="longer than 2 tokens"):
        sft(as_recipe(SFTRecipe, keys, max_length=2))
    assert snapshot(tmp_path) == was
    sft(as_recipe(SFTRecipe, keys))
    found = {name for name in snapshot(tmp_path / "new" / "out") if not name.startswith("checkpoint-1/")}
    assert {"README.md", "metrics.jsonl", "model.safetensors", "checkpoint-1"} < found
    assert found - owned(tmp_path / "new" / "out") == set()


class Stage:
    """A stage that claims its folder, writes what stages write before the first step, and fails."""

    def __init__(self, folder: Path, untrained: bool = False, metrics: str = "", fails: bool = True):
        self.output_dir, self.untrained, self.metrics, self.fails = str(folder), untrained, metrics, fails

    def run(self) -> None:
        run(self)


@one_run_per_folder
def run(stage: Stage) -> None:
    folder = Path(stage.output_dir)
    claim(folder, IDENTITY, resuming=False)
    own(folder / "metrics.jsonl").write_text(stage.metrics)
    if stage.untrained:
        with new_folder(folder / "untrained") as fresh:
            write(fresh, weights="random")
    if stage.fails:
        raise UserError("bad row")


# --- one run at a time


def hold(folder: str, ready: Any, go: Any, host: str | None = None) -> None:
    lock.PATIENCE = 0.2
    end_on_signals()
    if host is not None:
        socket.gethostname = lambda: host
        lock_record.BOOT_ID = Path("/dev/null")
    try:
        claim(folder, IDENTITY, resuming=True)
    except UserError as error:
        ready.put(str(error))
        return
    ready.put("")
    go.wait(120)
    release(Path(folder))


def hold_a_share(folder: str, ready: Any, go: Any) -> None:
    """Another rank, with workers that are ended by signals, many of them in their first moment."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it
    end_on_signals()
    output_folder.share(folder)
    codes = [fork_and_end(signal.SIGTERM, 0.0) for _ in range(20)] + [
        fork_and_end(signal.SIGINT, 0.1) for _ in range(2)
    ]
    ready.put(codes)
    go.wait(120)


def fork_and_end(signum: int, after: float) -> int:
    if (pid := os.fork()) == 0:
        try:
            time.sleep(30)
        finally:
            os._exit(77)
    time.sleep(after)
    os.kill(pid, signum)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(folder: Path) -> None:
    """Let go of a folder as a process does that is killed."""
    held = output_folder._claims.pop(output_folder._key(folder)).lock
    held.stop_heartbeat()
    os.close(held.descriptor)


class TestLock:
    def test_two_starts_at_the_same_moment(self, tmp_path):
        """Exactly one wins, and the others say who did."""
        context = multiprocessing.get_context("fork")
        ready, go = context.Queue(), context.Event()
        starts = [context.Process(target=hold, args=(str(tmp_path / "out"), ready, go)) for _ in range(4)]
        for each in starts:
            each.start()
        told = [ready.get(timeout=30) for _ in starts]
        assert told.count("") == 1, told
        said = (f"{tmp_path}/out is in use by process ", f"another run has just started in {tmp_path}/out")
        assert all(any(words in text for words in said) for text in told if text)
        go.set()
        for each in starts:
            each.join(30)
        assert not (tmp_path / "out" / "run.lock").exists()

    def test_a_start_that_has_made_the_file_and_not_written_its_name_is_waited_for(self, tmp_path, monkeypatch):
        """Where flock does not reach from one to the other."""
        monkeypatch.setattr(lock, "_flock", lambda *_: False)
        monkeypatch.setattr(lock, "NO_FLOCK", 0.05)
        monkeypatch.setattr(lock, "PATIENCE", 2.0)
        context = multiprocessing.get_context("fork")
        ready, go = context.Queue(), context.Event()
        myself = lock.myself
        monkeypatch.setattr(lock, "myself", lambda: time.sleep(0.2) or myself())
        first = context.Process(target=hold, args=(str(tmp_path / "out"), ready, go))
        first.start()
        monkeypatch.setattr(lock, "myself", myself)
        while not (tmp_path / "out" / "run.lock").exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match=f"in use by process {first.pid} "):
            claim(tmp_path / "out", IDENTITY, resuming=False)
        assert ready.get(timeout=30) == ""
        go.set()
        first.join()

    @pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
    def test_that_of_a_dead_run_is_taken_over(self, tmp_path, signum, monkeypatch):
        context = multiprocessing.get_context("fork")
        ready, go = context.Queue(), context.Event()
        holder = context.Process(target=hold, args=(str(tmp_path), ready, go))
        holder.start()
        assert ready.get(timeout=60) == ""
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on .* since .*; wait until all its ranks"):
            claim(tmp_path, IDENTITY, resuming=True)
        os.kill(int(holder.pid or 0), signum)
        monkeypatch.setattr(lock, "PATIENCE", 20.0)
        claim(tmp_path, IDENTITY, resuming=True)  # though nobody has waited for the dead process yet
        release(tmp_path)
        holder.join()

    def test_it_lasts_as_long_as_any_rank(self, out, monkeypatch):
        code = "import sys; from pathlib import Path; from align.runs import lock; lock.share(Path(sys.argv[1])); print(); sys.stdin.read()"
        rank = subprocess.Popen([sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert rank.stdout and rank.stdin  # noqa: PT018
        rank.stdout.readline()
        kill(out)
        with pytest.raises(UserError, match="is in use"):
            claim(out, IDENTITY, resuming=True)
        rank.communicate()
        monkeypatch.setattr(lock, "PATIENCE", 20.0)
        claim(out, IDENTITY, resuming=True)

    def test_a_run_within_a_run_and_one_beside_it_leave_the_first_its_lock(self, out):
        stage = Stage(out)
        refused: list[str] = []

        def beside() -> None:
            try:
                stage.run()
            except UserError as error:
                refused.append(str(error))

        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
        beside()
        assert len(refused) == 2
        assert all("is in use by process" in text for text in refused)
        assert (out / "run.lock").exists()
        with pytest.raises(UserError, match="is in use by process"):
            claim(out, IDENTITY, resuming=True)

    def test_that_of_another_machine_says_how_to_remove_it(self, out):
        release(out)
        told = {
            "host": "elsewhere",
            "boot": "x",
            "pid": 1,
            "started": 0.0,
            "since": "then",
            "command": "align sft r.yaml",
        }
        (out / "run.lock").write_text(json.dumps(told))
        with pytest.raises(UserError) as error:
            claim(out, IDENTITY, resuming=True)
        assert str(error.value) == (
            f"output_dir: {out} is in use by process 1 on elsewhere since then (align sft r.yaml), another machine than this "
            f"one; if that run is gone, delete {out}/run.lock and start again."
        )
        assert json.loads((out / "run.lock").read_text()) == told
        (out / "run.lock").write_text(
            json.dumps({**told, "boot": lock_record.boot_id()})
        )  # another container of this machine
        claim(out, IDENTITY, resuming=True)

    def test_that_of_another_machine_that_flock_does_not_reach_lasts_as_long_as_its_heartbeat(
        self, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr(heartbeat, "PERIOD", 0.3)
        context = multiprocessing.get_context("fork")
        ready, go = context.Queue(), context.Event()
        holder = context.Process(target=hold, args=(str(tmp_path), ready, go, "elsewhere"))
        holder.start()
        assert ready.get(timeout=60) == ""
        monkeypatch.setattr(lock, "_flock", lambda *_: True)  # as that of a machine of its own
        with pytest.raises(
            UserError,
            match=f"in use by process {holder.pid} on elsewhere since .*, another machine than this one; wait",
        ):
            claim(tmp_path, IDENTITY, resuming=True)
        os.kill(int(holder.pid or 0), signal.SIGKILL)
        holder.join()
        lock.remove_stale(tmp_path)  # waits for nothing, and cannot know
        owner = json.loads((tmp_path / "run.lock").read_text())
        capsys.readouterr()
        began = time.monotonic()
        claim(tmp_path, IDENTITY, resuming=True)
        assert time.monotonic() - began >= 6 * 0.3
        release(tmp_path)
        assert capsys.readouterr().err.splitlines() == [
            f"{tmp_path}: is in use by process {holder.pid} on elsewhere since {owner['since']} ({owner['command']}); waiting up to 2 s for a sign of life of that run",
            f"{tmp_path}: that run has shown no sign of life for 2 s; its lock is taken over",
        ]

    def test_a_run_whose_lock_was_taken_over_ends(self, tmp_path, monkeypatch, capfd):
        monkeypatch.setattr(heartbeat, "PERIOD", 0.05)
        context = multiprocessing.get_context("fork")
        ready, go = context.Queue(), context.Event()
        holder = context.Process(target=hold, args=(str(tmp_path), ready, go))
        holder.start()
        assert ready.get(timeout=60) == ""
        owner = json.loads((tmp_path / "run.lock").read_text())
        (tmp_path / "run.lock").write_text(json.dumps({**owner, "host": "elsewhere"}))
        holder.join(30)
        assert holder.exitcode == 2
        assert (
            f"error: output_dir: {tmp_path} was taken over by process {holder.pid} on elsewhere"
            in capfd.readouterr().err
        )

    def test_sigterm_deletes_it_with_the_last_rank_and_ends_a_worker_alone(self, tmp_path):
        context = server()  # a fork of this process, after all other tests, takes a second
        ready, go = context.Queue(), context.Event()
        main = context.Process(target=hold, args=(str(tmp_path), ready, go))
        main.start()
        assert ready.get(timeout=60) == ""
        rank = context.Process(target=hold_a_share, args=(str(tmp_path), ready, go))
        rank.start()
        assert ready.get(timeout=120) == [-signal.SIGTERM] * 20 + [77] * 2  # how its workers ended, and it did not
        for process in (main, rank):
            assert (tmp_path / "run.lock").exists()
            os.kill(int(process.pid or 0), signal.SIGTERM)
            process.join(30)
            assert process.exitcode == 128 + signal.SIGTERM
        assert not (tmp_path / "run.lock").exists()

    def test_a_rank_on_another_machine_than_rank_0_leaves_it_there(self, out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "elsewhere")
            lock.release_all()
        assert (out / "run.lock").exists()
        lock.release_all()
        assert not (out / "run.lock").exists()

    def test_another_machine_of_the_same_name_has_a_heartbeat_too(self, out, monkeypatch, capsys):
        told = json.loads((out / "run.lock").read_text())
        release(out)
        (out / "run.lock").write_text(json.dumps({**told, "boot": "another", "heartbeat": 0.05}))
        claim(out, IDENTITY, resuming=True)
        assert "has shown no sign of life for 0 s; its lock is taken over" in capsys.readouterr().err

    def test_of_two_machines_that_take_it_over_at_once_the_last_to_write_starts(self, out, monkeypatch):
        told = json.loads((out / "run.lock").read_text()) | {"boot": "another", "heartbeat": 0.05}
        release(out)
        (out / "run.lock").write_text(json.dumps(told))
        sleep = time.sleep

        def third_machine_writes(seconds: float) -> None:
            if json.loads((out / "run.lock").read_text())["boot"] != "another":
                (out / "run.lock").write_text(json.dumps({**told, "host": "third"}))
            sleep(seconds)

        monkeypatch.setattr(time, "sleep", third_machine_writes)
        with pytest.raises(UserError, match=r"is in use by process .* on third .*; wait until it has ended"):
            claim(out, IDENTITY, resuming=True)
        assert json.loads((out / "run.lock").read_text())["host"] == "third"

    def test_where_there_is_no_flock_the_record_counts(self, out, monkeypatch):
        monkeypatch.setattr(lock, "_flock", lambda *_: False)
        mine = json.loads((out / "run.lock").read_text())
        release(out)
        (out / "run.lock").write_text(json.dumps({**mine, "pid": os.getppid(), "started": started(os.getppid())}))
        with pytest.raises(UserError, match="is in use"):
            claim(out, IDENTITY, resuming=True)
        (out / "run.lock").write_text(
            json.dumps({**mine, "pid": os.getppid(), "started": 1.0})
        )  # started at another time: not it
        claim(out, IDENTITY, resuming=True)


def started(pid: int) -> float:
    import psutil

    return psutil.Process(pid).create_time()


def test_what_a_run_left_that_was_killed_after_it_had_finished(tmp_path):
    for name, stage in (("stage.json", "sft"), ("results.json", "evaluate")):
        folder = tmp_path / stage
        claim(folder, {**IDENTITY, "stage": stage}, resuming=False)
        own(folder / "parts", folder / "README.md").mkdir()
        write(folder, README_DOT_md="ours", mine_DOT_json="mine", parts__0_DOT_json="ours", parts__mine_DOT_json="mine")
        write(folder, **{"_DOT_README_DOT_md_DOT_1": "mine"})
        (folder / name).write_text(json.dumps({**IDENTITY, "stage": stage}))
        (folder / ".run.json.align-0123456789ab").write_text("{")
        clear_finished(folder)  # refused: the run may not have ended yet
        assert (folder / "run.json").exists()
        kill(folder)
        clear_finished(folder)
        kept = {".README.md.1", "kept-parts", "kept-parts/mine.json"}
        assert snapshot(folder).keys() == {name, "README.md", "mine.json", *kept}
