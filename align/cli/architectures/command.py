"""Run the cases of the matrix, each in a process of its own, and print the table."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from align.cli.architectures.cases import Case, make_cases
from align.cli.architectures.examine import FAILED, PARTS, REFUSED, Examination, examine
from align.cli.architectures.stages import RECIPES
from align.cli.processes import describe_exit_code
from align.cli.report_file import json_report_path, write_json_report
from align.cli.steps import known_overrides
from align.runs.quiet import quiet
from align.runs.tables import make_console, make_table
from align.terminal import say

SECONDS = 15  # that a small model takes on one core, about
# Columns of the table: the parts of a row that each covers, and the gaps of which it shows the largest.
COLUMNS = {
    "sft": (("sft",), ("loss", "padded")),
    "packed": (("packing",), ("packed",)),
    "reward": (("reward",), ("scores",)),
    "ppo": (("exact", "ppo", "scores"), ("sampling", "training", "values")),
    "saved model generates": (("saved",), ()),
}


def run(
    names: Sequence[str] | None, folder: str | None, json_path: str | None = None, overrides: Sequence[str] = ()
) -> int:
    """Examine architectures, and the model in `folder`; returns 1 when one failed, else 0.

    Args:
        names: model types; all of the matrix if empty, none if None.
        json_path: also write the results there; "-" prints them instead of the table.
        overrides: `--key value` for the recipes of the three stages.

    Raises:
        UserError: an unknown type, no model in `folder`, a wrong override, or a file at `json_path` that is no report.
    """
    quiet()
    json_path = json_report_path(json_path)
    cases = make_cases(names, folder)
    known_overrides("sft", overrides, set(RECIPES))  # a key that no stage has is an error now
    began = time.monotonic()
    found = examine_all(cases, overrides)
    verdicts = Counter(each.verdict for each in found)
    report = {
        "passed": FAILED not in verdicts,
        "seconds": round(time.monotonic() - began, 1),
        "cases": [each.as_dict() for each in found],
    }
    if write_json_report(report, json_path):
        make_console().print(matrix_table(found))
        for each in found:
            for part, note in each.notes.items():
                say(f"{each.name}, {part}: {' '.join(note.split())}", sys.stdout)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
        limits = " and ".join(f"{limit:g}" for limit in sorted({each.limit for each in found}))
        say(f"{counts}, in {report['seconds']:.0f} s. No gap may be above {limits}.", sys.stdout)
    return int(FAILED in verdicts)


def examine_all(cases: Sequence[Case], overrides: Sequence[str]) -> list[Examination]:
    """Examine all cases, several at a time, each in a fork of this process; a process that dies is a row that failed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, len(cases))
    about = f", about {SECONDS * len(cases) / workers / 60:.0f} min" if len(cases) > 1 else ""
    say(f"{len(cases)} to examine, {workers} at a time{about}", sys.stderr)
    waiting = list(cases)[::-1]
    running: dict[Any, tuple[Case, BaseProcess]] = {}  # by the connection that brings the result
    found: dict[Case, Examination] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="align-architectures-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    case = waiting.pop()
                    process, receiver = _start(case, Path(folder) / str(len(waiting)), overrides, cores // workers)
                    running[receiver] = (case, process)
                for results in wait(list(running)):
                    case, process = running.pop(results)
                    result = _result(case, process, results)
                    if isinstance(result, str):
                        running[results] = case, process
                        if len(cases) == 1:
                            say(_progress(case, result, time.monotonic() - began), sys.stderr)
                        continue
                    found[case] = result
                    left = (time.monotonic() - began) / len(found) * (len(cases) - len(found))
                    say(
                        f"{len(found)}/{len(cases)} {case.name}: {found[case].verdict}; about {left:.0f} s left",
                        sys.stderr,
                    )
        finally:
            for _, process in running.values():
                process.kill()
                process.join()
    return [found[case] for case in cases]


def _start(case: Case, folder: Path, overrides: Sequence[str], threads: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")  # which has imported everything already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(case, folder, overrides, threads, sender))
    process.start()
    sender.close()
    return process, receiver


def _work(case: Case, folder: Path, overrides: Sequence[str], threads: int, sender: Connection) -> None:
    """The target of one case's process; its output goes to a file."""
    folder.mkdir()
    with open(folder / "log", "wb") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    torch.set_num_threads(max(threads, 1))
    Examination.tell = sender.send
    sender.send(examine(case, folder, overrides))
    shutil.rmtree(folder)


def _progress(case: Case, part: str, seconds: float) -> str:
    """Print that a part begins, and the estimated time left."""
    done = PARTS.index(part)
    left = f", about {seconds / done * (len(PARTS) - done):.0f} s left" if done else ""
    return f"{case.name}: {done + 1}/{len(PARTS)} {part}, after {seconds:.0f} s{left}"


def _result(case: Case, process: BaseProcess, results: Any) -> Examination | str:
    """The message of a process: the name of the part that it begins, or its results at the end."""
    try:
        found: Examination | str = results.recv()
    except EOFError:
        process.join()
        how = describe_exit_code(process.exitcode or 0)
        return Examination(case.name, stages={"process": FAILED}, notes={"process": f"the process of this row {how}"})
    if isinstance(found, str):
        return found
    process.join()
    return found


def matrix_table(found: Sequence[Examination]) -> Table:
    """A row for each case: by stage the largest gap, or what became of it."""
    table = make_table(
        "largest gap from plain transformers, float32, nats (reward: of the score)", "model", *COLUMNS, ""
    )
    for each in found:
        table.add_row(each.name, *(_cell(each, *of) for of in COLUMNS.values()), each.verdict)
    return table


def _cell(found: Examination, parts: Sequence[str], gaps: Sequence[str]) -> str:
    states = [found.stages[part] for part in parts if part in found.stages]
    for state in (FAILED, REFUSED):
        if state in states:
            return state
    measured = [found.gaps[gap] for gap in gaps if gap in found.gaps]
    return f"{max(measured):.0e}" if measured else "yes" if states else ""
