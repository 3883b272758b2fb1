"""The costs of runs: time by stage and phase, tokens, memory."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from align.report.curves import LabelledRun
from align.report.figures import Figure, PageTable, stacked_figure
from align.report.pipelines import Group
from align.report.read import Run
from align.runs.records import is_count

MAX_PARTS = 7  # of a bar; the smaller phases are summed as "rest", which has the last of the eight colors
NOT_PHASES = ("time/total", "time/tokens_per_second", "time/self_checks")


def costs_table(groups: Sequence[Group]) -> PageTable:
    """A row for each run: time from its first to its last line of metrics, steps, tokens, tokens per second, memory."""
    rows = []
    for each in groups:
        for labelled in each.runs:
            run = labelled.run
            seconds, count = wall_seconds(run), count_tokens(run)
            speed = run.last("time/tokens_per_second")
            if speed is None and count and seconds:
                speed = count / seconds
            memory = [
                f"{name[7:].replace('_', ' ')} {value:.3g} GiB" for name in sorted(run.metrics) if name.startswith("memory/")
                if (value := max(value for _, value in run.series(name))) is not None
            ]  # fmt: skip
            rows.append([
                f"{run.name} ({labelled.label})" if len(each.runs) > 1 else run.name,
                run.stage,
                format_duration(seconds) if seconds is not None else "",
                str(run.lines[-1]["step"]) if run.lines else "",
                f"{count:,.0f}" if count else "",
                f"{speed:,.0f}" if speed else "",
                ", ".join(memory) or "not recorded",
            ])  # fmt: skip
    columns = ["run", "stage", "first to last metrics", "steps", "tokens", "tokens per second", "most memory, by phase"]
    return PageTable("Time, tokens and memory by stage", columns, rows)


def phases_figure(groups: Sequence[Group]) -> Figure | None:
    """Seconds of each phase of PPO's updates, summed over the logged updates; None without any."""
    runs: list[LabelledRun] = [each for group in groups if group.stage == "ppo" for each in group.runs]
    sums = [
        {
            name: sum(value for _, value in each.run.series(name))
            for name in each.run.metrics
            if name.startswith("time/") and name not in NOT_PHASES
        }
        for each in runs
    ]
    names = sorted({name for each in sums for name in each}, key=lambda name: -sum(each.get(name, 0) for each in sums))
    if not names:
        return None
    first, rest = names[:MAX_PARTS], names[MAX_PARTS:]
    rows = []
    for each, total in zip(runs, sums, strict=True):
        parts = [total.get(name, 0.0) for name in first] + [sum(total.get(name, 0.0) for name in rest)] * bool(rest)
        rows.append((each.label if len(runs) > 1 else each.run.name, parts))
    titles = [name[5:].replace("_", " ") for name in first] + ["rest"] * bool(rest)
    about = "Sum over the updates in metrics.jsonl, without evaluation and saving."
    return stacked_figure("Where PPO's time goes", "seconds", titles, rows, about=about)


def wall_seconds(run: Run) -> float | None:
    """Seconds from the first to the last line of metrics, interruptions included; None if unknown."""
    times = []
    for line in (run.lines[0], run.lines[-1]) if run.lines else ():
        try:
            times.append(datetime.fromisoformat(str(line.get("time"))))
            _ = times[-1] - times[0]
        except (ValueError, TypeError):  # no date, or dates with and without a time zone
            return None
    return max((times[1] - times[0]).total_seconds(), 0.0) if times else None


def count_tokens(run: Run) -> float | None:
    """Tokens trained on, or sampled by PPO; None if unknown."""
    lengths, size = run.series("response/length"), run.recipe.get("rollout_batch_size")
    if lengths and is_count(size):
        return sum(value for _, value in lengths) / len(lengths) * lengths[-1][0] * size  # type: ignore[operator]
    return run.last("train/num_tokens")


def format_duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}\u00a0h {minutes:02d}\u00a0min"
    return (f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s").replace(" ", "\u00a0")
