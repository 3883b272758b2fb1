"""Gain over the SFT model against the KL from it: a chart for the model card, and a fit of the over-optimization law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.maths.overoptimization import fit_rl_gain, rl_gain, rl_peak
from align.runs.charts import draw

CHART = "frontier.svg"  # in output_dir
MIN_DRAWN, MIN_FITTED = 2, 5  # evaluations for a chart and for a fit
History = Sequence[Mapping[str, float]]


def distances(history: History) -> list[float]:
    """The square root of the KL of each evaluation, in nats; negative estimates count as 0."""
    return [math.sqrt(max(each["eval/kl"], 0.0)) for each in history]


def fit(history: History, metric: str) -> dict[str, Any] | None:
    """Fit Gao et al.'s law (arXiv 2210.10760) d (a - b ln d) to the gain over the SFT model.

    Args:
        history: metrics of evaluations.
        metric: such as `eval/judge`.

    Returns:
        metric, a, b, and KL (nats) and gain at the peak, None without one; None with fewer than `MIN_FITTED` evaluations.
    """
    gains = [each.get(f"eval/change/{metric.removeprefix('eval/')}", math.nan) for each in history]
    points = [(d, gain) for d, gain in zip(distances(history), gains, strict=True) if d > 0 and math.isfinite(gain)]
    coefficients = fit_rl_gain([d for d, _ in points], [gain for _, gain in points])
    if len({d for d, _ in points}) < MIN_FITTED or coefficients is None:
        return None
    a, b = coefficients
    found: dict[str, Any] = {"metric": metric, "a": a, "b": b, "peak_kl": None, "peak_gain": None}
    if (peak := rl_peak(a, b)) is not None:
        found |= {"peak_kl": peak[0] ** 2, "peak_gain": peak[1]}
    return found


def describe_fit(found: Mapping[str, Any], last_kl: float) -> str:
    """The fit as a line of text, and whether the last evaluation has passed its peak."""
    law = f"fit of the gain by {found['metric']}: d ({found['a']:.3g} - {found['b']:.3g} ln d), d the root of the KL"
    law = law.replace("- -", "+ ")
    if found["peak_kl"] is None:
        return f"{law}; it has no peak"
    where = "was passed" if found["peak_kl"] < last_kl else "lies ahead"
    return f"{law}; its peak, at {found['peak_kl']:.3g} nats, {where} (the last evaluation had {last_kl:.3g})"


def draw_frontier(history: History, spreads: Mapping[str, float], found: Mapping[str, Any] | None) -> str:
    """An SVG of the gain in each metric over the square root of the KL, with the fit; the SFT model is at the origin.

    Args:
        spreads: standard deviation of each metric over the SFT model's responses, the unit of its gain.
        found: the result of `fit`.
    """
    ordered = sorted(zip(distances(history), history, strict=True), key=lambda each: each[0])
    d = [0.0, *(distance for distance, _ in ordered)]
    curves: dict[str, Sequence[float]] = {}
    for metric, spread in spreads.items():
        change = f"eval/change/{metric.removeprefix('eval/')}"
        curves[metric] = [0.0, *(each.get(change, math.nan) / (spread or 1.0) for _, each in ordered)]
    if found is not None:
        scale = spreads[found["metric"]] or 1.0
        curves[f"{found['metric']}, fit"] = [rl_gain(each, found["a"], found["b"]) / scale for each in d]
    return draw(d, curves, "gain over SFT, in standard deviations of its responses", "square root of the KL from SFT")
