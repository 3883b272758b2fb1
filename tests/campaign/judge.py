"""What counts as a failure: a message that helps nobody, a file that is not ours changed, another result without a word."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.campaign.process import Ended

CANARY = "canary"  # a file that appears when code ran that came with data
LONGEST = 4000  # characters of an error
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")
_CLOCK = re.compile(r"^(time|memory/)")

WORST_FIRST = (
    "campaign broken",
    "code ran",
    "lost file",
    "changed file",
    "wrong result",
    "half-written",
    "accepted",
    "hang",
    "traceback",
)


def severity(problem: str) -> int:
    kind = problem.partition(":")[0]
    return WORST_FIRST.index(kind) if kind in WORST_FIRST else len(WORST_FIRST)


def snapshot(folder: Path) -> dict[str, str]:
    """Kind and digest of everything in a folder, by path; links are not followed."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            found[os.path.relpath(path, folder)] = _describe(path)
    return found


def _describe(path: str) -> str:
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        return f"link to {os.readlink(path)}"
    if stat.S_ISREG(mode):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return "folder" if stat.S_ISDIR(mode) else "special"


def changed(before: dict[str, str], after: dict[str, str], ours: Iterable[str] = ()) -> list[str]:
    """What was lost, changed or added, apart from the folders that are ours; of what was added, the uppermost."""
    problems = []
    for path in sorted({*before, *after}):
        if any(path == each or path.startswith(f"{each}/") for each in ours) or path.endswith("__pycache__"):
            continue
        if path not in after:
            problems.append(f"lost file: {path!r}")
        elif path not in before:
            if Path(path).name.startswith(CANARY):
                problems.insert(0, f"code ran: {path}")
            elif os.path.dirname(path) in before or not os.path.dirname(path):
                problems.append(f"trace left: {path!r}")
        elif before[path] != after[path]:
            problems.append(f"changed file: {path!r}")
    return problems


def ended_badly(ended: Ended) -> list[str]:
    """Problems that no command may have, however it ends."""
    if None in ended.codes:
        return [f"hang: not done after {ended.seconds:.0f} s"]
    if -24 in ended.codes:
        return ["hang: used up its CPU time"]
    problems = []
    if "Traceback (most recent call last)" in ended.err:
        problems.append(f"traceback: {last_line(ended.err)}")
    if (control := _CONTROL.search(ended.err.replace("\r", "") + ended.out)) is not None:
        problems.append(f"control characters: {control[0]!r} on the terminal")
    return problems


def refused(ended: Ended, says: Sequence[str]) -> list[str]:
    """Problems of a command that should have ended with one clear error, which has one of the words in `says`."""
    problems = ended_badly(ended)
    if problems and problems[0].startswith("hang"):
        return problems
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if ended.code == 0:
        return [*problems, "accepted: exit code 0"]
    if ended.code != 2:
        problems.append(f"exit code: {ended.code}, {last_line(ended.err)}")
    elif not errors:
        problems.append(f"no error line: {last_line(ended.err)}")
    elif says and not any(word in errors[0] for word in says):
        problems.append(f"unnamed: none of {', '.join(says)} in: {errors[0][:300]}")
    elif len(errors[0]) > LONGEST:
        problems.append(f"flood: an error of {len(errors[0])} characters")
    return problems


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return ascii(lines[-1][:300]) if lines else "(silent)"


def different(ours: Path, theirs: Path) -> list[str]:
    """How an output folder differs from that of an undisturbed run, apart from what the clock says."""
    if not ours.is_dir():
        return ["wrong result: no output folder"]
    mine, whole = (_contents(folder) for folder in (ours, theirs))
    problems = [f"half-written: no {name}" for name in sorted(whole.keys() - mine.keys())]
    problems += [f"leftover: {name}" for name in sorted(mine.keys() - whole.keys())]
    problems += [
        f"wrong result: {name} differs" for name in sorted(whole.keys() & mine.keys()) if mine[name] != whole[name]
    ]
    return problems


def _contents(folder: Path) -> dict[str, Any]:
    """Contents by path; of files in checkpoints, whose records hold times, those of tensors alone."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (checkpoint := re.match(r"(.*?checkpoint-[^/]*)", name)) and path.suffix != ".safetensors":
            found[checkpoint[1]] = "checkpoint"
        elif path.is_file():
            found[name] = _content(path)
    return found


def _content(path: Path) -> Any:
    if path.name in ("metrics.jsonl", "samples.jsonl"):
        return [
            {k: v for k, v in json.loads(line).items() if not _CLOCK.match(k)} for line in path.read_text().splitlines()
        ]
    if path.name in ("stage.json", "results.json"):
        found = json.loads(path.read_text())
        key = {"bon": "frontier", "judge-reward": "card"}.get(found.get("stage"), "results")
        return found.get(key, found)  # the card of a reward stage is numbers alone
    return hashlib.sha256(path.read_bytes()).hexdigest()
