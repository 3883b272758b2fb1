"""Learning curves: which metrics of a stage share a chart, for one run or for several."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from align.report.figures import Figure, curves_figure
from align.report.metric_docs import describe
from align.report.read import Point, Run
from align.report.svg import Curve
from align.runs.records import is_number

BY_SOURCE = "Score by source"
MAX_FIGURES = 80  # of metrics that no chart names, for a stage
INTERVAL_ENDS = ("_low", "_high")  # ends of an interval, drawn around the metric


@dataclass(frozen=True, slots=True)
class LabelledRun:
    """A run in a report, with its label in legends and the number of its color."""

    label: str
    run: Run
    colour: int


# Title of each chart and patterns of its metrics, the first of which gives the axis its unit; most important charts first.
MAIN_CHARTS = (
    ("Score", ("objective/score", "eval/score")),
    ("Judge reward", ("eval/judge", "eval/judge/.+")),
    ("True reward", ("eval/true/.+",)),
    ("Win rate against SFT", ("eval/win_rate", "eval/true_win_rate/.+", "eval/judge_win_rate.*")),
    ("KL from SFT", ("objective/kl", "eval/kl")),
    ("Objective: score less KL penalty", ("objective/reward",)),
    ("Change from SFT on the same prompts", ("eval/change/.+",)),
    (BY_SOURCE, ("objective/score/.+", "eval/score/.+")),
    ("Disagreement of the reward models", ("objective/disagreement.*", "objective/score_disagreement.*")),
    ("Response length", ("response/length", "eval/length")),
    ("Responses that end", ("response/eos_rate", "eval/eos_rate", "self_check/eos_rate")),
    ("Repeated 3-grams", ("response/repetition", "eval/repetition")),
    ("Entropy", ("objective/entropy",)),
    ("Loss", ("train/loss", "eval/loss", "eval/train_loss")),
    ("Accuracy", ("train/accuracy", "eval/accuracy", "eval/ceiling")),
    ("Margin of chosen over rejected", ("train/margin", "eval/margin")),
    ("Scores", ("train/mean_reward", "train/min_reward", "train/max_reward")),
    ("Token accuracy", ("train/mean_token_accuracy", "eval/mean_token_accuracy")),
    ("Forgetting", ("eval/retention_loss",)),
    ("Forgetting in percent", ("eval/forgetting",)),
    ("Macro F1", ("eval/macro_f1", "eval/micro_f1")),
)
OPTIMIZATION_CHARTS = (
    ("Spread of scores", ("objective/score_std",)),
    ("KL coefficient", ("objective/kl_coef",)),
    ("Change of the policy in an update", ("policy/approx_kl",)),
    ("Clipped tokens", ("policy/clipfrac", "value/clipfrac")),
    ("Probability ratio", ("policy/ratio", "policy/first_ratio")),
    ("Explained variance of the values", ("value/explained_variance",)),
    ("Value loss", ("value/loss",)),
    ("Mean value", ("value/mean",)),
    ("Spread of advantages", ("advantage/std",)),
    ("Policy loss", ("policy/loss",)),
    ("Residual of the balance", ("policy/residual",)),
    ("Gradient norm", ("train/grad_norm", "policy/grad_norm")),
    ("Gradient norm of the value model", ("value/grad_norm",)),
    ("Learning rate", ("train/learning_rate", "policy/learning_rate", "value/learning_rate")),
    ("Entropy of the model", ("train/entropy", "eval/entropy")),
    ("Generalization gap", ("eval/gap",)),
    ("Tokens per second", ("time/tokens_per_second",)),
)
# The measure of a PPO run's closing table that has the SFT model's value of a metric.
SFT_MEASURES = {
    "eval/score": "score (the training reward)",
    "eval/judge": "judge",
    "eval/length": "response length (tokens)",
    "eval/eos_rate": "EOS rate",
    "eval/repetition": "repeated 3-grams",
    "eval/kl": "KL from SFT (nats/response)",
}
MAX_CURVES = 8  # of a run, in a chart
GRAY = 7
NO_CHART = re.compile(
    r"(time|memory)/.+|self_check/.+|episode|epoch|train/epoch|train/num_tokens|eval/(min|max)_reward|eval/change_(low|high)/.+"
)


def learning_curves(stage: str, runs: Sequence[LabelledRun], max_points: int) -> tuple[list[Figure], list[Figure]]:
    """The charts of a stage's results, and those of its optimization, followed by a chart for each remaining metric.

    Args:
        max_points: of a curve.
    """
    drawn: set[str] = set()
    first = [*_figures(stage, runs, MAIN_CHARTS, drawn, max_points)]
    then = [*_figures(stage, runs, OPTIMIZATION_CHARTS, drawn, max_points)]
    names = sorted({name for each in runs for name in each.run.metrics} - drawn)
    others = tuple(
        (name, (re.escape(name),)) for name in names if not (NO_CHART.fullmatch(name) or name.endswith(INTERVAL_ENDS))
    )
    return first, [*then, *_figures(stage, runs, others[:MAX_FIGURES], drawn, max_points)]


def _figures(
    stage: str,
    runs: Sequence[LabelledRun],
    charts: Sequence[tuple[str, tuple[str, ...]]],
    drawn: set[str],
    max_points: int,
) -> Iterator[Figure]:
    x_label = "update" if stage == "ppo" else "optimizer step"
    steps = [point[0] for each in runs for points in each.run.metrics.values() for point in (points[0], points[-1])]
    x_range = (0.0, max(steps)) if steps else None
    for title, patterns in charts:
        names = _matching(runs, patterns)
        if not names:
            continue
        drawn |= set(names)
        if title == BY_SOURCE and not any(len({n for n in each.run.metrics if n in names}) > 2 for each in runs):
            continue  # one source: it is the score
        doc = describe(stage, names[0])
        curves = [curve for each in runs for curve in _curves(each, names, len(runs) > 1)]
        legend = None
        if len(runs) > 1 and len(names) > 1:
            legend = [(each.label, each.colour, 0) for each in runs]
            legend += [(name, GRAY, index) for index, name in enumerate(names)]
        figure = curves_figure(
            title,
            x_label,
            axis_title(doc.unit if doc else names[0]),
            curves,
            max_points=max_points,
            x_range=x_range,
            legend=legend,
            about=f"`{names[0]}`: {doc.definition}" if doc else "",
            healthy=doc.healthy if doc else "",
        )
        if figure is not None:
            yield figure


def axis_title(unit: str) -> str:
    """The axis title for a unit of metrics.md."""
    return {"its own": "reward", "that of the measure": "reward", "1": "no unit"}.get(unit, unit)


def _matching(runs: Sequence[LabelledRun], patterns: Sequence[str]) -> list[str]:
    known = sorted({name for each in runs for name in each.run.metrics if not name.endswith(INTERVAL_ENDS)})
    return [name for pattern in patterns for name in known if re.fullmatch(pattern, name)][:MAX_CURVES]


def _curves(each: LabelledRun, names: Sequence[str], several_runs: bool) -> Iterator[Curve]:
    for index, name in enumerate(names):
        points = each.run.series(name)
        if points and points[0][0] > 0 and (before := sft_value(each.run, name)) is not None:
            points = [(0.0, before), *points]
        label = each.label if len(names) == 1 else f"{each.label}: {name}"
        style = (label, each.colour, index) if several_runs else (name, index, 0)
        yield Curve(style[0], points, style[1], style[2], name.startswith("eval/"), metric_interval(each.run, name))


def metric_interval(run: Run, name: str) -> list[tuple[float, float, float]]:
    """Step, low and high of a metric's interval, where logged."""
    ends = [
        name.replace("/change/", f"/change{side}/") if "/change/" in name else f"{name}{side}" for side in INTERVAL_ENDS
    ]
    low, high = (dict(run.series(each)) for each in ends)
    points: Sequence[Point] = run.series(name)
    return [(x, low[x], high[x]) for x, _ in points if x in low and x in high]


def sft_value(run: Run, name: str) -> float | None:
    """The SFT model's value of a metric, from the closing table of a finished PPO run; None if it is not there."""
    wanted = SFT_MEASURES.get(name) or (f"true reward ({name[10:]})" if name.startswith("eval/true/") else None)
    for measure, before, _ in run.results.get("table", []) if run.stage == "ppo" else ():
        if measure == wanted and is_number(before):
            return float(before)
    return None
