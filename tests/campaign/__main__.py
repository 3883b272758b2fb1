"""python -m tests.campaign [--seed N] [--fraction F] [--kinds K ...] [--minutes M] [--json PATH] [--root PATH]"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests import ranks
from tests.campaign.campaign import all_cases, draw, work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the cases that are drawn, and of the choices in them")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the cases of each kind")
    parser.add_argument("--kinds", nargs="+", help="only these kinds")
    parser.add_argument("--names", nargs="+", help="only cases whose name contains one of these")
    parser.add_argument("--minutes", type=float, default=60, help="no case is begun later")
    parser.add_argument("--json", type=Path, help="write every case and its problems to this file")
    parser.add_argument("--root", type=Path, default=ranks.ROOT, help="the tree under test, by default this one")
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if not arguments.kinds or case.kind in arguments.kinds]
    if arguments.names:
        cases = [case for case in cases if any(name in case.name for name in arguments.names)]
    drawn = draw(cases, arguments.seed, arguments.fraction)
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        found = run(
            Path(folder),
            arguments.root.resolve(),
            [(case.kind, case.name) for case in drawn],
            arguments.seed,
            arguments.minutes,
        )
    print(table(found, len(drawn)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return int(any(each["problems"] for each in found))


def run(folder: Path, root: Path, names: list[tuple[str, str]], seed: int, minutes: float) -> list[dict[str, Any]]:
    """Run cases in a fork, print the problems as they are found; returns a result for each case that was run."""
    results = folder / "results.jsonl"
    results.touch()
    env = {
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    worker = ranks.start(
        work, str(root), str(folder), names, seed, minutes, str(results), log=folder / "worker", env=env
    )
    printed = 0
    while True:
        running = worker.running()
        lines = results.read_text(encoding="utf-8").splitlines()
        for line in map(json.loads, lines[printed:]):
            for problem in line["problems"][:2]:
                print(f"{line['kind']} / {line['name']}: {problem[:400]}", flush=True)
        printed = len(lines)
        if not running:
            break
        time.sleep(0.2)
    assert worker.wait() == [0], worker.stderr[-3000:]
    return [json.loads(line) for line in lines]


def table(found: list[dict[str, Any]], drawn: int) -> str:
    """Counts by kind of case, and by kind of problem."""
    lines = [f"{'kind':<16}{'cases':>6}{'good':>6}{'bad':>6}{'CPU s':>8}  problems"]
    for kind in dict.fromkeys(each["kind"] for each in found):
        own = [each for each in found if each["kind"] == kind]
        bad = [each for each in own if each["problems"]]
        problems = Counter(each["problems"][0].partition(":")[0] for each in bad)
        words = ", ".join(f"{count} {name}" for name, count in problems.most_common())
        seconds = sum(each["cpu"] for each in own)
        lines.append(f"{kind:<16}{len(own):>6}{len(own) - len(bad):>6}{len(bad):>6}{seconds:>8.1f}  {words}")
    bad = sum(bool(each["problems"]) for each in found)
    total = sum(each["cpu"] for each in found)
    lines.append(f"{'all':<16}{len(found):>6}{len(found) - bad:>6}{bad:>6}{total:>8.1f}")
    if len(found) < drawn:
        lines.append(f"{drawn - len(found)} cases were not run: the time was up")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
