"""Runs killed at a write that the seed chooses, then started again: the end has to be that of an undisturbed run, to the bit."""

# fmt: off
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from tests import ranks
from tests.campaign.cases import Case, Place
from tests.campaign.judge import ended_badly
from tests.campaign.process import Stop
from tests.campaign.runs import LAYOUTS, OUT, prepare, resumes, start, whole

CHECKPOINT = "/checkpoint-"
KILL, TERM, INTERRUPT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def chosen(place: Place, made: list[str], phase: str) -> int:
    """The number of a write of an undisturbed run, from 1."""
    saving = [index for index, line in enumerate(made) if CHECKPOINT in line] or [len(made) // 2]
    numbers = {
        "any": range(len(made)),
        "start": range(saving[0]),
        "checkpoint": saving,
        "between": [index for index in range(saving[0], saving[-1]) if CHECKPOINT not in made[index]],
        "final": range(saving[-1] + 1, len(made)),
        "best": [index for index, line in enumerate(made) if "best" in line],
    }[phase]
    return 1 + place.random.choice(list(numbers) or list(range(len(made))))


@dataclass(frozen=True)
class Kill:
    """A stage killed once or several times, at writes of one phase, in all its processes or in one rank first."""

    stage: str
    layout: str = "alone"
    phase: str = "any"
    rank: int = 0
    signum: int = KILL
    times: int = 1

    def __call__(self, place: Place) -> list[str]:
        made = whole(place, self.stage, self.layout).writes[self.rank]
        prepare(place, self.stage, self.layout)
        for time_ in range(self.times):
            number = chosen(place, made, self.phase) if time_ == 0 else place.random.randint(1, max(2, len(made) // 2))
            ended = start(place, self.stage, self.layout, stop=Stop(number, self.rank, self.signum))
            if None in ended.codes:
                return ended_badly(ended)
            if self.signum == INTERRUPT and "Traceback" in ended.err:
                return ended_badly(ended)
        return [f"{problem} (killed before write {number}: {made[number - 1]})" if self.times == 1 else problem
                for problem in resumes(place, self.stage, self.layout, may_refuse=False)]


def outer(place: Place, words: list[str], layout: str, stage: str, signum: int) -> list[str]:
    """Kill the launcher, or `align run`, alone, and see that the processes it started end too."""
    prepare(place, stage, layout)
    first = place.folder / OUT / "checkpoint-1" / "complete.json"
    with open(place.root / "outer.log", "w") as log:
        process = subprocess.Popen(words, cwd=place.folder, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 300
        while not first.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is not None or not first.exists():
            os.killpg(process.pid, KILL)
            return [f"campaign broken: {words} ended early: {(place.root / 'outer.log').read_text()[-800:]}"]
        time.sleep(place.random.uniform(0, 0.3))
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signum)
        process.wait()
    _, left = psutil.wait_procs(children, timeout=20)
    for each in left:
        each.kill()
    problems = [f"hang: {len(left)} processes went on without {words[1:4]}"] if left else []
    return problems + resumes(place, stage, layout, may_refuse=False)


def launcher(stage: str, signum: int) -> Case:
    def check(place: Place) -> list[str]:
        deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(ranks.free_port())]
        return outer(place, [*deepspeed, "--module", "align", stage, f"{stage}.yaml"], "zero2", stage, signum)
    return Case("kills outside", f"launcher of {stage}, {signal.Signals(signum).name}", check)


def pipeline(stage: str, signum: int) -> Case:
    def check(place: Place) -> list[str]:
        prepare(place, stage)
        place.write({"r/1_first.yaml": (place.folder / f"{stage}.yaml").read_bytes()})
        return outer(place, [sys.executable, "-m", "align", "run", "r"], "alone", stage, signum)
    return Case("kills outside", f"align run of {stage}, {signal.Signals(signum).name}", check)


PHASES = ("start", "checkpoint", "between", "final")
TABLE = {
    **{f"{stage}, {phase}, {number}": Kill(stage, phase=phase) for stage in ("sft", "reward", "ppo") for phase in PHASES for number in (1, 2)},
    **{f"{stage}, {phase}": Kill(stage, phase=phase) for stage in ("classify", "mlm", "token-classification", "question-answering") for phase in PHASES},
    **{f"{stage}, {layout}": Kill(stage, layout) for layout, stages in {
        "balanced": ("classify",), "weights": ("classify",), "pairs of pieces": ("mlm",), "encoder-decoder": ("sft", "classify"), "prefix": ("sft",),
        "bottleneck": ("sft", "classify", "token-classification"), "momentum": ("sft", "ppo", "question-answering"),
    }.items() for stage in stages},
    **{f"{stage}, {number}": Kill(stage) for stage in ("evaluate", "bon", "judge-reward") for number in (1, 2, 3, 4)},
    **{f"{stage}, three times": Kill(stage, times=3) for stage in ("sft", "reward", "ppo", "classify", "mlm")},
    **{f"{stage}, Ctrl-C": Kill(stage, signum=INTERRUPT) for stage in ("sft", "reward", "ppo", "evaluate")},
    **{f"{stage}, SIGTERM": Kill(stage, signum=TERM) for stage in ("sft", "ppo")},
    **{f"ppo, judged, {phase}, {number}": Kill("ppo", "judged", phase) for phase in PHASES for number in (1, 2)},
    **{f"ppo, better and better, {number}": Kill("ppo", "better", "best") for number in (1, 2, 3, 4)},
    "ppo, better and better, three times": Kill("ppo", "better", "best", times=3),
    **{f"ppo at better two, rank {rank} in best": Kill("ppo", "better two", "best", rank) for rank in (0, 1)},
    "ppo, judged, three times": Kill("ppo", "judged", times=3),
    "ppo, judged, SIGTERM": Kill("ppo", "judged", signum=TERM),
    **{f"reward, members, {phase}, {number}": Kill("reward", "members", phase) for phase in PHASES for number in (1, 2)},
    "reward, members, three times": Kill("reward", "members", times=3),
    **{f"reward, halves, {phase}, {number}": Kill("reward", "halves", phase) for phase in PHASES for number in (1, 2)},
    "reward, halves, three times": Kill("reward", "halves", times=3),
    "reward, members, SIGTERM": Kill("reward", "members", signum=TERM),
    **{f"reward of members at zero2, rank {rank} in {phase}": Kill("reward", "members zero2", phase, rank) for rank, phase in ((0, "checkpoint"), (1, "checkpoint"), (0, "final"), (0, "any"))},
    **{f"{stage}, SIGTERM": Kill(stage, signum=TERM) for stage in ("reward", "classify", "mlm", "token-classification", "question-answering", "evaluate", "bon", "judge-reward")},
    **{f"{stage}, Ctrl-C": Kill(stage, signum=INTERRUPT) for stage in ("bon", "judge-reward")},
    **{f"{stage} at two, rank {rank}": Kill(stage, "two", "any", rank) for stage in ("bon", "judge-reward") for rank in (0,)},
    **{f"ppo at {layout}, rank {rank} in {phase}": Kill("ppo", layout, phase, rank)
       for layout in ("judged two", "judged zero3") for rank, phase in ((0, "checkpoint"), (1, "checkpoint"), (0, "final"))},
    **{f"{stage} at {layout}, rank {rank} in {phase}": Kill(stage, layout, phase, rank)
       for stage, layout in (("sft", "zero2"), ("reward", "zero0"), ("ppo", "zero2"), ("ppo", "zero3"), ("sft", "two"))
       for rank, phase in ((0, "checkpoint"), (1, "checkpoint"), (0, "final"))},
}
OUTSIDE = [launcher("sft", KILL), launcher("ppo", TERM), pipeline("sft", KILL), pipeline("reward", INTERRUPT)]


def cases() -> Iterator[Case]:
    for name, kill in TABLE.items():
        yield Case("kills" if LAYOUTS[kill.layout].ranks == 1 else "kills of a rank", name, kill)
    yield from OUTSIDE
