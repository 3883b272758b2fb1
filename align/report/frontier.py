"""Rewards against the distance from the SFT model: PPO's evaluations, and best-of-n if the report has it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from align.maths.overoptimization import fit_rl_gain, rl_gain, rl_peak
from align.report.curves import GRAY, LabelledRun, axis_title, metric_interval, sft_value
from align.report.figures import Figure, curves_figure
from align.report.metric_docs import describe
from align.report.svg import Curve
from align.runs.records import is_number

MIN_POINTS = 5  # evaluations that a fit needs
REWARD_METRICS = ("eval/score", "eval/judge", "eval/judge/.+", "eval/true/.+")


def frontiers(runs: Sequence[LabelledRun], best_of_n: Sequence[tuple[str, dict[str, Any]]]) -> list[Figure]:
    """A chart of each reward over the square root of the KL divergence.

    Args:
        runs: PPO runs.
        best_of_n: names of runs of `align bon`, with the contents of their `results.json`.
    """
    names = sorted({name for each in runs for name in each.run.metrics if _is_reward_metric(name)}, key=_order)
    found = []
    for name in names or ["eval/score", "eval/judge"]:
        curves = [curve for each in runs if (curve := _run_curve(each, name, len(runs) > 1)) is not None]
        curves += list(_best_of_n_curves(name, best_of_n))
        fits = [fit for curve in curves if name != "eval/score" and (fit := _fitted_law(curve)) is not None]
        curves += [curve for curve, _ in fits]
        doc = describe("ppo", name)
        figure = curves_figure(
            f"{name.removeprefix('eval/').removeprefix('true/')} against distance",
            "√KL from SFT, √nats per response",
            axis_title(doc.unit) if doc else "reward",
            curves,
            whole_x=False,
            about="A point is an evaluation on held-out prompts; SFT is at 0. Higher at the same distance is better; "
            "a true or a judge's reward that turns down while the score rises is over-optimization. "
            + " ".join(words for _, words in fits),
        )
        if figure is not None and len(curves[0].points) > 1:
            found.append(figure)
    return found


def _is_reward_metric(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in REWARD_METRICS) and not name.endswith(("_low", "_high"))


def _order(name: str) -> int:
    return next(i for i, pattern in enumerate(REWARD_METRICS) if re.fullmatch(pattern, name))


def _run_curve(each: LabelledRun, name: str, several: bool) -> Curve | None:
    kl = dict(each.run.series("eval/kl"))
    points = [(math.sqrt(max(kl[step], 0.0)), value) for step, value in each.run.series(name) if step in kl]
    if not points:
        return None
    band = [(math.sqrt(max(kl[x], 0.0)), low, high) for x, low, high in metric_interval(each.run, name) if x in kl]
    if (before := sft_value(each.run, name)) is not None and 0 not in kl:
        points = [(0.0, before), *points]
    # The line follows the order of training, but a band can only be drawn if x never decreases.
    ordered = band == sorted(band)
    return Curve(
        f"PPO, {each.label}" if several else "PPO", points, each.colour, dots=True, band=band if ordered else ()
    )


def _fitted_law(curve: Curve) -> tuple[Curve, str] | None:
    """The fit of d (a - b ln d) to the gain over SFT (arXiv 2210.10760), as curve and text; None with too few points."""
    if curve.dash or not curve.points or curve.points[0][0] != 0 or len(curve.points) <= MIN_POINTS:
        return None
    (_, start), *points = curve.points
    fit = fit_rl_gain([d for d, _ in points], [value - start for _, value in points])
    if fit is None:
        return None
    last = max(d for d, _ in points)
    drawn = [(last * step / 40, start + rl_gain(last * step / 40, *fit)) for step in range(41)]
    peak = rl_peak(*fit)
    peak_text = f"its peak is at √KL {peak[0]:.3g}, with a gain of {peak[1]:.3g}" if peak else "it has no peak"
    words = f"Fit of d (a - b ln d) to {curve.name}: a = {fit[0]:.3g}, b = {fit[1]:.3g}; {peak_text}."
    return Curve(f"fit of {curve.name}", drawn, curve.colour, 2), words


def _best_of_n_curves(name: str, cards: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Curve]:
    for number, (label, card) in enumerate(cards):
        column = "proxy" if name == "eval/score" else "judge"
        if name.startswith("eval/true/") and card["recipe"].get("judge_reward_funcs") != [
            name.removeprefix("eval/true/")
        ]:
            continue  # its judge measures something else
        points, band = [], []
        given = card.get("frontier")
        entries: list[Any] = [each for each in given if isinstance(each, dict)] if isinstance(given, list) else []
        for entry in entries:
            kl, value, low, high = (entry.get(each) for each in ("kl", column, f"{column}_low", f"{column}_high"))
            if is_number(kl) and is_number(value):
                points.append((math.sqrt(max(kl, 0.0)), value))
                if is_number(low) and is_number(high):
                    band.append((points[-1][0], low, high))
        if points:
            yield Curve(
                f"best of n ({label})", sorted(points), GRAY - number, 1, dots=len(points) < 20, band=sorted(band)
            )
