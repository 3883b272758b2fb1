"""Faults of the machine, of other programs and of a user's functions, and folders that are not ours."""

# fmt: off
from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.campaign.cases import Case, Content, Place, link_to
from tests.campaign.judge import changed, different, ended_badly, last_line, refused
from tests.campaign.process import CHANGES, WRITES, Ended, Stop
from tests.campaign.runs import OUT, prepare, resumes, start, take, unfinished, whole

Check = Callable[[Place], list[str]]


def refusing(stage: str = "sft", *, keys: Mapping[str, Any] = {}, files: Mapping[str, Content] = {}, says: tuple[str, ...] = ("output_dir", OUT), later: str | None = None) -> Check:
    """The stage is refused, and nothing in the folder changes; then another stage can start.

    Args:
        later: an output folder for a run afterwards, which has to succeed.
    """
    def check(place: Place) -> list[str]:
        place.write(files)
        prepare(place, stage, keys=keys)
        before = place.snapshot()
        problems = refused(start(place, stage), says) + changed(before, place.snapshot())
        if later is not None:
            prepare(place, "sft", keys={"output_dir": later})
            ended = start(place, "sft")
            problems += [] if ended.code == 0 else [f"no later start: {last_line(ended.err)}"]
        return problems
    return check


def model_at(name: str) -> Callable[[Path], None]:
    """A copy of the model `base`."""
    return lambda path: shutil.copytree(path.parents[name.count("/")] / "base", path)


def ends(stage: str, says: tuple[str, ...], keys: Mapping[str, Any] = {}, files: Mapping[str, Content] = {}, **settings: Any) -> Check:
    """A run that cannot finish ends with one error; what it leaves behind lets the right recipe start over or go on."""
    def check(place: Place) -> list[str]:
        place.write(files)
        prepare(place, stage, keys=keys)
        before = place.snapshot()
        ended = place.run(stage, f"{stage}.yaml", **settings)
        return refused(ended, says) + changed(before, place.snapshot(), [OUT])
    return check


def reward(name: str, *says: str, **more: Any) -> Check:
    return ends("ppo", says or (name,), {"reward_funcs": [f"functions:{name}"]}, **more)


def empties(place: Place) -> list[str]:
    """A function that empties the lists it is given: an error, or the run of a function that does not."""
    ends_of = []
    for name in ("constant", "empties"):
        shutil.rmtree(place.folder / OUT, ignore_errors=True)
        prepare(place, "ppo", keys={"reward_funcs": [f"functions:{name}"]})
        ended = start(place, "ppo")
        if ended.code != 0:
            return refused(ended, ("empties",))
        ends_of.append((place.folder / OUT / "model.safetensors").read_bytes())
    return ended_badly(ended) + ([] if ends_of[0] == ends_of[1] else ["wrong result: model.safetensors differs"])


# The machine
def failing(number: int, error: int) -> Callable[[], None]:
    """From the n-th write on, writes in the output folder fail."""
    def before() -> None:
        count = 0
        inside = os.path.join(os.getcwd(), OUT)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
            if (writes or event in CHANGES - {"os.remove", "os.rmdir"}) and isinstance(args[0], str | os.PathLike) and os.path.abspath(args[0]).startswith(inside):
                count += 1
                if count >= number:
                    raise OSError(error, os.strerror(error), os.fspath(args[0]))

        sys.addaudithook(hook)
    return before


def full(stage: str, error: int, *says: str) -> Check:
    """The disk fills up, or goes away, at a write that the seed chooses; then there is room again."""
    def check(place: Place) -> list[str]:
        number = place.random.randrange(1, len(whole(place, stage).writes[0]))
        prepare(place, stage)
        ended = start(place, stage, before=failing(number, error))
        problems = [] if ended.code == 0 else refused(ended, says)
        return [f"{problem} (write {number})" for problem in [*problems, *resumes(place, stage, may_refuse=False)]]
    return check


def too_large(stage: str) -> Check:
    """No file may be larger than 8 kB: the weights of a checkpoint are not written."""
    def check(place: Place) -> list[str]:
        prepare(place, stage)
        ended = start(place, stage, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)))
        return refused(ended, (OUT, "output_dir")) + resumes(place, stage, may_refuse=False)
    return check


def removed(stage: str, what: str = OUT) -> Check:
    """The output folder is deleted while the stage runs; the command given again starts over."""
    def check(place: Place) -> list[str]:
        prepare(place, stage)

        def remove(pid: int) -> None:
            if (place.folder / OUT / BEGUN.get(stage, "checkpoint-1/complete.json")).exists():
                os.kill(pid, signal.SIGSTOP)
                shutil.rmtree(place.folder / what, ignore_errors=True)
                os.kill(pid, signal.SIGCONT)

        ended = start(place, stage, meanwhile=_once(remove, lambda: not (place.folder / what).exists()))
        problems = [] if ended.code == 0 else refused(ended, (OUT, "output_dir"))
        if ended.code == 0:
            problems += ended_badly(ended) + different(place.folder / OUT, whole(place, stage).out)
        if what == OUT:
            problems += [f"{problem} (again)" for problem in resumes(place, stage, may_refuse=False)]
        return problems
    return check


def _once(action: Callable[[int], object], done: Callable[[], bool]) -> Callable[[int], object]:
    state = {"done": False}

    def run(pid: int) -> None:
        if not state["done"]:
            there_before = not done()
            action(pid)
            state["done"] = there_before and done()
    return run


def out_of_memory(place: Place) -> list[str]:
    """A batch that does not fit: which phase, and what to lower."""
    place.write({"data/answers.jsonl": [{"prompt": "ab" * 50, "completion": "cde" * 50}] * 3000})
    prepare(place, "sft", keys={"train_batch_size": 3000, "per_device_train_batch_size": 3000, "eval_dataset": [], "eval_fraction": 0, "attn_implementation": "eager", "eval_steps": None})
    return refused(start(place, "sft"), ("per_device_train_batch_size",))


# Other programs
def weights_and_biases(place: Place) -> list[str]:
    """The process of W&B dies in the middle of a run: training goes on, and metrics.jsonl has every line."""
    prepare(place, "sft", keys={"report_to": "wandb"})

    def kill(pid: int) -> None:
        if (place.folder / OUT / "checkpoint-1").exists():
            for child in psutil.Process(pid).children(recursive=True):
                child.kill()

    ended = start(place, "sft", meanwhile=kill, env={"WANDB_DIR": str(place.root)})
    problems = ended_badly(ended)
    if ended.code != 0:
        return [*problems, f"exit code: {ended.code}, {last_line(ended.err)}"]
    return problems + [each for each in different(place.folder / OUT, whole(place, "sft").out) if "wandb" not in each]


def wandb_is_a_file(place: Place) -> list[str]:
    """A file has the name of W&B's folder."""
    prepare(place, "sft", keys={"report_to": "wandb"})
    (place.root / "track").mkdir()
    (place.root / "track" / "wandb").write_text("mine")
    ended = start(place, "sft", env={"WANDB_DIR": str(place.root / "track")})
    problems = ended_badly(ended) if ended.code == 0 else refused(ended, ("wandb", "report_to"))
    return problems + ([] if (place.root / "track" / "wandb").read_text() == "mine" else ["changed file: wandb"])


def hiding(name: str, *words: str) -> Check:
    """A file in the current folder has the name of a module of Python or of a library."""
    def check(place: Place) -> list[str]:
        prepare(place, "sft")
        place.write({name: "open('canary_module', 'w').close()\nraise RuntimeError('not the module you wanted')\n", "r/1_sft.yaml": (place.folder / "sft.yaml").read_bytes()})
        before = place.snapshot()
        done = subprocess.run([Path(sys.executable).with_name("align"), *words], cwd=place.folder, capture_output=True, text=True, timeout=200, check=False)
        ended = Ended([done.returncode], done.stdout, done.stderr, 0)
        problems = [f"exit code: {done.returncode}, {last_line(done.stderr)}"] if done.returncode else different(place.folder / OUT, whole(place, "sft").out)
        problems = [each for each in problems if each != "leftover: report.html"]  # which `align run` writes there
        return [*ended_badly(ended), *problems, *changed(before, place.snapshot(), [OUT])]
    return check


BEGUN = {"bon": "parts/samples.jsonl", "judge-reward": "run.json", "evaluate": "parts"}  # a file that a run makes early


def two_at_once(stage: str, killed: bool = False) -> Check:
    """A second run in the same folder is refused while the first is there, and possible once that is dead."""
    def check(place: Place) -> list[str]:
        prepare(place, stage)
        seen: list[Ended] = []

        def second(pid: int) -> None:
            if seen or not (place.folder / OUT / BEGUN.get(stage, "metrics.jsonl")).exists():
                return
            os.kill(pid, signal.SIGSTOP)
            seen.append(place.__class__.run(_Beside(place), stage, f"{stage}.yaml"))
            os.kill(pid, signal.SIGKILL if killed else signal.SIGCONT)

        first = start(place, stage, meanwhile=second)
        if not seen:
            return ["campaign broken: the first run was over before the second began"]
        problems = refused(seen[0], (OUT,))
        if killed:
            return problems + resumes(place, stage, may_refuse=False)
        return [*problems, *ended_badly(first), *different(place.folder / OUT, whole(place, stage).out)]
    return check


class _Beside:
    """The same folder with logs of its own."""

    def __init__(self, place: Place) -> None:
        self.folder, self.root = place.folder, place.root / "beside"
        self.root.mkdir(exist_ok=True)


# Folders that are not ours
def expands(given: str, expected: str) -> Check:
    """`~` and variables in paths."""
    def check(place: Place) -> list[str]:
        prepare(place, "sft", keys={"output_dir": given})
        ended = start(place, "sft", env={"HOME": str(place.folder / "home"), "PLACE": "named"})
        if ended.code != 0:
            return [f"exit code: {ended.code}, {last_line(ended.err)}"]
        # The card names the folder.
        return [each for each in different(place.folder / expected, whole(place, "sft").out) if "README.md" not in each]
    return check


def linked_output(place: Place) -> list[str]:
    """The output folder is a link to a folder of the user's that holds something."""
    place.write({"elsewhere/mine.txt": "mine", OUT: link_to("elsewhere")})
    prepare(place, "sft")
    before = place.snapshot()
    return refused(start(place, "sft"), (OUT, "output_dir")) + changed(before, place.snapshot())


def links_inside(*names: str) -> Check:
    """In the folder of a killed run, names that it is going to write are links to the user's notes."""
    def check(place: Place) -> list[str]:
        prepare(place, "sft")
        out = take(place, unfinished(place, "sft"))
        for name in names:
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            path.symlink_to("../notes.txt")
        return [each for each in resumes(place, "sft", says=names) if not each.startswith(("leftover", "wrong", "half"))]
    return check


def older_manifest(place: Place) -> list[str]:
    """A manifest that has fewer keys, as one of an earlier version: the run counts as finished."""
    prepare(place, "sft")
    out = take(place, whole(place, "sft"))
    content = json.loads((out / "stage.json").read_text())
    for name in ("padding_free", "neftune_noise_alpha", "max_forgetting", "early_stopping_patience"):
        content["recipe"].pop(name)
    content = {name: value for name, value in content.items() if name in ("stage", "recipe", "inputs", "seed", "versions", "tokenizer", "data", "results")}
    (out / "stage.json").write_text(json.dumps(content))
    before = place.snapshot()
    ended = start(place, "sft")
    problems = [] if ended.code == 0 else [f"no resume: {last_line(ended.err)}"]
    return [*ended_badly(ended), *problems, *changed(before, place.snapshot())]


def other_layout(stage: str, first: str, then: str) -> Check:
    """Resumed by another number of ranks or at another ZeRO stage: it goes on, and every step is logged once."""
    def check(place: Place) -> list[str]:
        made = whole(place, stage, first).writes[0]
        saved = [index for index, line in enumerate(made) if f"{OUT}/checkpoint-2/" in line or "checkpoint-2/.complete" in line][-1]
        prepare(place, stage, first)
        start(place, stage, first, stop=Stop(saved + 4))
        prepare(place, stage, then)
        ended = start(place, stage, then)
        if ended.code != 0:
            return [*ended_badly(ended), f"no resume: {last_line(ended.err)}"]
        steps = [json.loads(line)["step"] for line in (place.folder / OUT / "metrics.jsonl").read_text().splitlines() if "/loss" in line]
        expected = [json.loads(line)["step"] for line in (whole(place, stage, first).out / "metrics.jsonl").read_text().splitlines() if "/loss" in line]
        return ended_badly(ended) + ([] if steps == expected else [f"wrong result: steps {steps}, not {expected}"])
    return check


def printed(stage: str, *, keys: Mapping[str, Any], files: Mapping[str, Content], words: tuple[str, ...] = (), forbidden: str = "<img") -> Check:
    """Odd but usable names and texts: they come through, escaped on the terminal and in what is rendered."""
    def check(place: Place) -> list[str]:
        place.write(files)
        prepare(place, stage, keys=keys)
        ended = place.run(*(words or (stage, f"{stage}.yaml")))
        problems = [] if ended.code == 0 else [f"exit code: {ended.code}, {last_line(ended.err)}"]
        pages = [path for path in place.folder.rglob("*") if path.suffix in (".md", ".svg", ".html") and "checkpoint" not in str(path)]
        problems += [f"unescaped: {forbidden} in {path.name}" for path in pages if forbidden in path.read_text()]
        return ended_badly(ended) + problems
    return check


def tasks(**names: str) -> Check:
    """Two processes as another launcher than DeepSpeed's starts them: one run of two ranks, not two runs.

    Args:
        names: of the variables for rank, local rank and size.
    """
    def check(place: Place) -> list[str]:
        prepare(place, "sft")
        ended = place.run("sft", "sft.yaml", ranks=2, names=names)
        if ended.code != 0:
            return [*ended_badly(ended), f"exit code: {ended.code}, {last_line(ended.err)}"]
        return ended_badly(ended) + different(place.folder / OUT, whole(place, "sft", "two").out)
    return check


LONG = [{"prompt": "ab", "completion": "cd"}] * 8
MINE = {f"{OUT}/model.safetensors": b"mine", f"{OUT}/README.md": "mine", f"{OUT}/metrics.jsonl": "mine\n", f"{OUT}/checkpoint-7/weights.bin": b"mine", f"{OUT}/data.csv": "mine"}
ODD_NAME = "data/<img src=x>|`a`.jsonl"
RED = "data/\x1b[31mred.jsonl"
ONE_RANK = {"ranks": 2, "together": False}

FOLDERS: dict[str, Check] = {
    "the model in a subfolder of the output": refusing(keys={"model_name_or_path": f"{OUT}/checkpoint-500"}, files={f"{OUT}/checkpoint-500": model_at(f"{OUT}/checkpoint-500")}),
    "the model in a folder of the output": refusing(keys={"model_name_or_path": f"{OUT}/untrained"}, files={f"{OUT}/untrained": model_at(f"{OUT}/untrained")}),
    "the rows in the output": refusing(keys={"train_dataset": f"{OUT}/rows.jsonl"}, files={f"{OUT}/rows.jsonl": LONG}),
    "the reference in the output of ppo": refusing("ppo", keys={"sft_model_path": f"{OUT}/policy"}, files={f"{OUT}/policy": model_at(f"{OUT}/policy")}),
    "a model in the output of an evaluation": refusing("evaluate", keys={"models": [f"{OUT}/parts"]}, files={f"{OUT}/parts": model_at(f"{OUT}/parts")}),
    "a folder with files of the user": refusing(files=MINE),
    "a folder with a checkpoint of another program": refusing(files={f"{OUT}/checkpoint-500": model_at(f"{OUT}/checkpoint-500")}),
    "a folder with one note": refusing(files={f"{OUT}/notes.md": "mine"}),
    "a folder with hidden files": refusing(files={f"{OUT}/.git/config": "mine"}),
    "reward: a folder of the user": refusing("reward", files=MINE),
    "ppo: a folder of the user": refusing("ppo", files=MINE),
    "evaluate: a folder of the user": refusing("evaluate", files={**MINE, f"{OUT}/parts/0.json": "mine", f"{OUT}/results.md": "mine"}),
    "classify: a folder of the user": refusing("classify", files=MINE),
    "the model's own folder": refusing(keys={"output_dir": "base"}, says=("base", "output_dir"), later="elsewhere"),
    "the model's own folder by another name": refusing(keys={"output_dir": "data/../base/."}, says=("base", "output_dir"), later="elsewhere"),
    "the model's own folder by a link": refusing(keys={"output_dir": "link"}, files={"link": link_to("base")}, says=("link", "base", "output_dir"), later="elsewhere"),
    "the folder that holds everything": refusing(keys={"output_dir": "."}, says=("output_dir", "model_name_or_path", "data")),
    "the folder of the rows": refusing(keys={"output_dir": "data"}, says=("output_dir", "data")),
    "the folder of a reward model": refusing("ppo", keys={"output_dir": "scorer", "reward_model_path": "scorer"}, says=("output_dir", "scorer")),
    "an output that is a link to a folder of the user": linked_output,
    "~": expands("~/x", "home/x"),
    "$VARIABLE": expands("$PLACE/x", "named/x"),
    "links in place of records": links_inside("metrics.jsonl", "README.md"),
    "a link in place of the weights": links_inside("model.safetensors", "config.json"),
    "a link in place of the manifest": links_inside("stage.json"),
    "a link in place of run.json": links_inside("run.json"),
    "two runs at once: sft": two_at_once("sft"),
    "two runs at once: ppo": two_at_once("ppo"),
    "two runs at once, the first dies": two_at_once("reward", killed=True),
    "a manifest of an earlier version": older_manifest,
    "2 ranks, then 1": other_layout("sft", "zero2", "alone"),
    "1 rank, then 2": other_layout("ppo", "alone", "zero2"),
    "ZeRO 3, then ZeRO 2": other_layout("ppo", "zero3", "zero2"),
    "ZeRO 2, then ZeRO 3": other_layout("sft", "zero2", "zero3"),
}
MACHINE: dict[str, Check] = {
    **{f"no space left: {stage}, {number}": full(stage, errno.ENOSPC, "No space", "space") for stage in ("sft", "reward", "ppo", "mlm", "evaluate") for number in (1, 2)},
    "a disk that became read-only": full("sft", errno.EROFS, "Read-only", "read-only", "cannot"),
    "a disk that fails": full("ppo", errno.EIO, "Input/output", "cannot"),
    "a quota": full("classify", errno.EDQUOT, "quota", "space"),
    "files of 8 kB at most: sft": too_large("sft"),
    "files of 8 kB at most: ppo": too_large("ppo"),
    "the output is removed: sft": removed("sft"),
    "the output is removed: ppo": removed("ppo"),
    "the output is removed: evaluate": removed("evaluate"),
    "out of memory": out_of_memory,
    "Slurm": tasks(rank="SLURM_PROCID", local="SLURM_LOCALID", size="SLURM_STEP_NUM_TASKS"),
    "Open MPI": tasks(rank="OMPI_COMM_WORLD_RANK", local="OMPI_COMM_WORLD_LOCAL_RANK", size="OMPI_COMM_WORLD_SIZE"),
    "PMI": tasks(rank="PMI_RANK", local="MPI_LOCALRANKID", size="PMI_SIZE"),
}
PROGRAMS: dict[str, Check] = {
    "W&B's process dies": weights_and_biases,
    "wandb is a file": wandb_is_a_file,
    "queue.py, align run": hiding("queue.py", "run", "r"),
    "queue.py, a stage": hiding("queue.py", "sft", "sft.yaml"),
    "numpy.py, align run": hiding("numpy.py", "run", "r"),
}
FUNCTIONS: dict[str, Check] = {
    **{f"a reward that {name}": reward(name, *says) for name, *says in (
        ("raises", "raises", "stumbled"), ("raises_later", "raises_later", "stumbled later"), ("exits",), ("too_few",), ("nan",), ("text",), ("nothing",), ("huge",), ("shouts",))},
    "a reward that empties its inputs": empties,
    "a reward that hangs": ends("ppo", ("functions:hangs",), {"reward_funcs": ["functions:hangs"], "reward_timeout": 2}),
    "a reward that raises on rank 1 alone": reward("raises_on_rank_1", "stumbled on rank 1", **ONE_RANK),
    "a reward that hangs on rank 1 alone": ends("ppo", ("functions:hangs_on_rank_1",), {"reward_funcs": ["functions:hangs_on_rank_1"], "reward_timeout": 2}, **ONE_RANK),
    "a grader that exits": ends("evaluate", ("exits",), {"grader": "functions:exits"}),
    "a grader that raises": ends("evaluate", ("raises", "stumbled"), {"grader": "functions:raises"}),
    "a metric script that exits": ends("evaluate", ("mine.py",), {"metrics": ["mine.py"]}, files={"mine.py": "import sys\nsys.exit(0)\n"}),
    "a file name with HTML": printed("sft", keys={"train_dataset": ODD_NAME}, files={ODD_NAME: LONG}),
    "HTML in rows that are shown": printed("evaluate", keys={"eval_dataset": ODD_NAME}, files={ODD_NAME: [{"prompt": "ab<img src=x>", "completion": "<img src=y>|cd", "task": "<img>"}] * 3}),
    "an escape in a file name": printed("sft", keys={"train_dataset": RED}, files={RED: LONG}, forbidden="\x1b"),
    "an escape in rows that are shown": printed("ppo", keys={"train_dataset": "data/red.jsonl", "num_sample_rows": 4}, files={"data/red.jsonl": [{"prompt": "ab\x1b[31m\x07"}] * 6}, forbidden="\x1b"),
    "an escape in rows that are checked": printed("ppo", keys={"train_dataset": "data/red.jsonl"}, files={"data/red.jsonl": [{"prompt": "ab\x1b[31m\x07"}] * 6}, words=("check", "ppo.yaml"), forbidden="\x1b"),
}


def cases() -> Iterator[Case]:
    yield from (Case("folders", name, check) for name, check in FOLDERS.items())
    yield from (Case("machine", name, check) for name, check in MACHINE.items())
    yield from (Case("programs", name, check) for name, check in PROGRAMS.items())
    yield from (Case("functions", name, check) for name, check in FUNCTIONS.items())
