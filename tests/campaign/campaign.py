"""Draw cases by seed and run them, one after another, in one process that forks for each command."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from tests.campaign import world
from tests.campaign.cases import Case, Place
from tests.campaign.judge import severity


def all_cases() -> list[Case]:
    from tests.campaign import damage, faults, keys, kills, measured, models, recipes, reports, rows, templates

    tables = (recipes, keys, rows, models, templates, kills, damage, faults, measured, reports)
    cases = [case for table in tables for case in table.cases()]
    names = [(case.kind, case.name) for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return cases


def draw(cases: Iterable[Case], seed: int, fraction: float) -> list[Case]:
    """A share of the cases of each kind, at least one, in the order of the tables."""
    by_kind: dict[str, list[Case]] = {}
    for case in cases:
        by_kind.setdefault(case.kind, []).append(case)
    drawn = []
    for kind, found in by_kind.items():
        chosen = random.Random(f"{seed} {kind}").sample(range(len(found)), math.ceil(fraction * len(found)))
        drawn += [found[index] for index in sorted(chosen)]
    return drawn


def work(root: str, folder: str, names: list[tuple[str, str]], seed: int, minutes: float, results: str) -> None:
    """Run the named cases on the tree in `root`; writes a JSON line of each to the file `results`."""
    sys.path.insert(0, root)
    import align

    assert Path(align.__file__).parents[1] == Path(root), align.__file__
    from align.config.stages import STAGES

    for stage in STAGES.values():
        importlib.import_module(stage.module)
        importlib.import_module(stage.check_module)
    place = Path(folder)
    deadline = time.monotonic() + 60 * minutes
    known = {(case.kind, case.name): case for case in all_cases()}
    template = make_template(place / "template")
    for key in names:
        if time.monotonic() > deadline:
            break
        case, began, cpu = known[key], time.monotonic(), _cpu()
        try:
            problems = case.check(Place(place / "case", template, f"{seed} {case.name}"))
        except Exception:
            problems = [f"campaign broken: {traceback.format_exc()}"]
        spent = {"seconds": round(time.monotonic() - began, 2), "cpu": round(_cpu() - cpu, 2)}
        line = {"kind": case.kind, "name": case.name, "problems": sorted(problems, key=severity), **spent}
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(
        each.ru_utime + each.ru_stime
        for each in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def make_template(folder: Path) -> Path:
    """Have a fork make the world, so that no thread of a library starts in this process."""
    if not folder.exists():
        folder.mkdir(parents=True)
        if (pid := os.fork()) == 0:
            try:
                world.make(folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
    return folder
