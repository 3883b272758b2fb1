"""`align report` and `align diagnose` on folders with odd, damaged, endless and huge files, and outputs that cannot be written."""

# fmt: off
from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.campaign.cases import Case, Content, Place, cut, fifo, folder, link_to
from tests.campaign.faults import Check
from tests.campaign.judge import changed, ended_badly, last_line, refused
from tests.campaign.process import WRITES
from tests.campaign.runs import OUT, prepare, whole

STAGES = ("reward", "ppo", "bon", "judge-reward")  # each a run in the folder `p`
REPORT = "p/report.html"


def runs(place: Place) -> None:
    """Finished runs in `p`, without their weights."""
    for stage in STAGES:
        prepare(place, stage)
        shutil.copytree(whole(place, stage).out, place.folder / "p" / stage, ignore=shutil.ignore_patterns("*.safetensors", "checkpoint-*", "tokenizer*"))
    shutil.rmtree(place.folder / OUT, ignore_errors=True)


def shown(*files: tuple[str, Content], words: Sequence[str] = ("report", "p"), ours: Sequence[str] = (REPORT,), codes: Sequence[int] = (0,)) -> Check:
    """Files of the runs are odd: the command still shows the rest, and writes nothing but its report."""
    def check(place: Place) -> list[str]:
        runs(place)
        place.write(dict(files))
        before = place.snapshot()
        ended = place.run(*words)
        problems = [] if ended.code in codes else [f"exit code: {ended.code}, {last_line(ended.err)}"]
        page = place.folder / REPORT
        problems += ["unescaped: control characters in the page"] if page.exists() and "\x1b" in page.read_text() else []
        return [*ended_badly(ended), *problems, *changed(before, place.snapshot(), ours)]
    return check


def not_shown(*words: str, says: Sequence[str], files: Mapping[str, Content] = {}, before: Callable[[], object] | None = None) -> Check:
    """One error, and nothing is written."""
    def check(place: Place) -> list[str]:
        runs(place)
        place.write(files)
        there = place.snapshot()
        return refused(place.run(*words, before=before), says) + changed(there, place.snapshot())
    return check


def disk(error: int) -> Callable[[], None]:
    """Writes of a report fail."""
    def before() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" and isinstance(args[2], int) and args[2] & WRITES and "report" in os.fsdecode(args[0]):
                raise OSError(error, os.strerror(error), args[0])
        sys.addaudithook(hook)
    return before


def replaced(make: Callable[[Path], object]) -> Content:
    def write(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        make(path)
    return write


def sparse(path: Path) -> None:
    """Larger than the limit, and no byte of it on the disk."""
    path.touch()
    os.truncate(path, 400 << 20)


def more_lines(count: int, entry: Callable[[int], dict[str, Any]]) -> Content:
    def write(path: Path) -> None:
        with open(path, "a") as file:
            file.writelines(json.dumps(entry(index)) + "\n" for index in range(count))
    return write


def copies(path: Path) -> None:
    """More runs than one report shows."""
    for index in range(60):
        shutil.copytree(path.parent / "reward", path.parent / f"run{index}")
    path.touch()


SPECIAL: dict[str, Content] = {
    "a pipe": replaced(fifo), "a folder": replaced(folder), "a link to itself": lambda path: replaced(link_to(path.name))(path),
    "a link to a device": replaced(link_to("/dev/zero")), "a link to notes": replaced(link_to("../../notes.txt")), "sparse": replaced(sparse),
}
CONTENTS: dict[str, Content] = {
    "empty": b"", "a list": b"[]", "nothing": b"{}", "deep": b"[" * 100_000, "zeros": b"\0" * 99, "bytes": bytes(range(256)) * 9,
    "a number of 5000 digits": b'{"step": ' + b"9" * 5000 + b"}\n",
}
FILES = ("ppo/metrics.jsonl", "ppo/samples.jsonl", "reward/card/results.json", "reward/card/confident_errors.jsonl")
RECORDS = ("ppo/stage.json", "bon/results.json", "judge-reward/results.json")
SAMPLE = {"step": 4, "name": "responses", "prompt": "<script>" * 2000, "sft": "\x1b" * 2000, "response": "x" * 20_000, "score": 1.0, "score_sft": 0.0}

TABLE: dict[str, Check] = {
    "the runs as they are": shown(),
    "diagnose: the runs as they are": shown(words=("diagnose", "p"), ours=(), codes=(0, 3, 4)),
    **{f"{file} is {name}": shown((f"p/{file}", content)) for file in FILES for name, content in (SPECIAL | CONTENTS).items()},
    **{f"diagnose: metrics.jsonl is {name}": shown(("p/ppo/metrics.jsonl", content), words=("diagnose", "p"), ours=(), codes=(0, 3, 4)) for name, content in (SPECIAL | CONTENTS).items()},
    **{f"{command}: {file} is {name}": not_shown(command, f"p/{file.split('/')[0]}", says=(file, file.split("/")[0]), files={f"p/{file}": content})
       for command in ("report", "diagnose") for file in RECORDS for name, content in {**{each: SPECIAL[each] for each in ("a pipe", "a folder", "a link to a device", "sparse")}, **{each: CONTENTS[each] for each in ("empty", "deep", "zeros")}, "cut": cut}.items()},
    "60,000 lines of metrics": shown(("p/ppo/metrics.jsonl", more_lines(60_000, lambda i: {"step": 5 + i, "time": "2026-01-01T00:00:00", "objective/kl": 1.0}))),
    "5,000 metrics": shown(("p/ppo/metrics.jsonl", more_lines(3, lambda i: {"step": 5 + i, "time": "x", **{f"x/{j}": 1.0 * j for j in range(5_000)}}))),
    "large samples": shown(("p/ppo/samples.jsonl", more_lines(300, lambda i: SAMPLE))),
    "an escape in a name": shown(("p/a\x1b[31m/stage.json", lambda path: shutil.copy(path.parents[1] / "ppo" / "stage.json", path))),
    "HTML in a name": shown(("p/<img src=x onerror=alert(1)>/stage.json", lambda path: shutil.copy(path.parents[1] / "ppo" / "stage.json", path))),
    "bytes in a name": shown(("p/\udcff\udcfe/stage.json", lambda path: shutil.copy(path.parents[1] / "ppo" / "stage.json", path))),
    "a link to the folder above": shown(("p/x", link_to(".."))),
    **{f"no runs: {' '.join(words)[:40]}": not_shown(*words, says=says) for words, says in {
        ("report",): ("report",), ("report", "no"): ("no",), ("report", ""): ("report",), ("report", "p", "no"): ("no",), ("report", "data"): ("data",), ("report", "notes.txt"): ("notes.txt",),
        ("report", "p", "--nosuch", "1"): ("nosuch",), ("report", "n" * 300): ("report",), ("report", "--output", "x"): ("report",), ("diagnose",): ("diagnose",), ("diagnose", "no"): ("no",),
        ("diagnose", "data"): ("data",), ("diagnose", "p", "p"): ("p",), ("diagnose", "p", "--x", "1"): ("--x",), ("diagnose", ""): ("diagnose",), ("diagnose", "n" * 300): ("diagnose",)}.items()},
    **{f"the output {name[:40]}": not_shown("report", "p", "--output", name, says=says) for name, says in {
        "": ("--output",), "notes.txt": ("notes",), "data": ("data",), "n" * 300: ("--output",), "/dev/null": ("null",), "/proc/x.html": ("proc",), "notes.txt/x.html": ("notes",), "/dev/full": ("full",),
        ".": (".",), "$NO_SUCH/x": ("NO_SUCH",), "~nobody_here/x": ("nobody_here",), "a\x1b[31m/../notes.txt": ("notes",)}.items()},
    **{f"the output is {name}": not_shown("report", "p", "--output", "o", says=("o",), files={"o": make}) for name, make in {
        "a link to notes": link_to("notes.txt"), "a link to nothing": link_to("nothing"), "a link to itself": link_to("o"), "a pipe": fifo}.items()},
    "somebody's report.html": not_shown("report", "p", says=("report.html",), files={REPORT: "<html>mine"}),
    "a folder report.html": not_shown("report", "p", says=("report.html",), files={f"{REPORT}/mine": "mine"}),
    "a link report.html": not_shown("report", "p", says=("report.html",), files={REPORT: link_to("../notes.txt")}),
    "61 runs": not_shown("report", "p", says=("60",), files={"p/copies": copies}),
    **{f"the disk: {os.strerror(error)}": not_shown("report", "p", says=("report.html",), before=disk(error)) for error in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)},
}


def cases() -> Iterator[Case]:
    yield from (Case("reports", name, check) for name, check in TABLE.items())
