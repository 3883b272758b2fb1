"""Responses of the SFT model and of PPO to the same prompts, side by side, and histograms of their scores and lengths."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.evaluate.statistics import repetition
from align.report.curves import LabelledRun
from align.report.figures import Figure, histogram_figure
from align.report.read import MAX_VALUE, Run
from align.runs.records import is_number

MAX_CHARACTERS = 2000  # of a text
TEXTS = ("prompt", "sft", "response")


@dataclass(frozen=True, slots=True)
class ResponsePair:
    """The SFT model's and PPO's responses to a prompt.

    Attributes:
        measures: name, value of the SFT model's response, value of PPO's.
        gain: score of PPO's response minus that of the SFT model's.
        length: of PPO's response, in tokens, or in characters if tokens are unknown.
        suspicion: how likely the gain is not in quality; a weight to sort by.
        reasons: for the suspicion.
    """

    label: str
    prompt: str
    sft: str
    response: str
    measures: list[tuple[str, str, str]]
    gain: float
    length: float
    suspicion: float
    reasons: list[str] = field(default_factory=list)


def last_rows(run: Run) -> list[dict[str, Any]]:
    """Rows of the last evaluation: of all held-out prompts if the run has recorded them, otherwise of some."""
    rows = [row for row in run.samples if _is_pair(row)]
    if every := [row for row in rows if row["name"] == "responses"]:
        rows = every
    last = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] == last]


def _is_pair(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(name), str) for name in TEXTS) and all(
        is_number(row.get(name)) and abs(row[name]) < MAX_VALUE for name in ("score", "score_sft")
    )


def samples(each: LabelledRun, max_samples: int) -> list[ResponsePair]:
    """Response pairs of a run, largest gain first; of more than `max_samples`, those with the largest gain, the largest
    loss, the most suspicion and the longest responses."""
    rows = last_rows(each.run)
    if not rows:
        return []
    spread = statistics.pstdev([row["score"] - row["score_sft"] for row in rows]) or 1.0
    found = [_response_pair(each.label, row, spread) for row in rows]
    if len(found) > max_samples:
        orders = [
            sorted(found, key=lambda s: -s.gain),
            sorted(found, key=lambda s: s.gain),
            sorted(found, key=lambda s: -s.suspicion),
            sorted(found, key=lambda s: -s.length),
        ]
        kept: dict[int, ResponsePair] = {}
        for ranked in zip(*orders, strict=True):
            for sample in ranked:
                if len(kept) < max_samples:
                    kept[id(sample)] = sample
        found = list(kept.values())
    return sorted(found, key=lambda sample: -sample.gain)


def _response_pair(label: str, row: Mapping[str, Any], spread: float) -> ResponsePair:
    gain = row["score"] - row["score_sft"]
    length, before = _length(row, "response", ""), _length(row, "sft", "_sft")
    measures = [("score", f"{row['score_sft']:.3g}", f"{row['score']:.3g}")]
    signs: list[tuple[float, str]] = []
    for name in sorted(row):
        if name.endswith("_sft") or f"{name}_sft" not in row or name in ("score", "length"):
            continue
        ours, theirs = row[name], row[f"{name}_sft"]
        if is_number(ours) and is_number(theirs):
            measures.append((name, f"{theirs:.3g}", f"{ours:.3g}"))
            if ours < theirs:
                signs.append((1.0, f"{name} fell from {theirs:.3g} to {ours:.3g}"))
    unit = "tokens" if "length" in row else "characters"
    measures.append((unit, f"{before:.0f}", f"{length:.0f}"))
    if is_number(row.get("kl")):
        measures.append(("KL (nats)", "", f"{row['kl']:.3g}"))
    if length > 1.5 * max(before, 1):
        signs.append((min(length / max(before, 1) - 1, 3) / 3, f"{length / max(before, 1):.1f} times as long"))
    if (repeated := repetition(row["response"])) > 0.1:
        signs.append((min(2 * repeated, 1.0), f"{repeated:.0%} of its 3-grams repeat"))
    # A gain in score, weighted by the signs that something other than quality was rewarded.
    suspicion = max(gain / spread, 0.0) * sum(weight for weight, _ in signs)
    prompt, sft, response = (_clipped(row[name]) for name in TEXTS)
    return ResponsePair(label, prompt, sft, response, measures, gain, length, suspicion, [why for _, why in signs])


def _length(row: Mapping[str, Any], text: str, suffix: str) -> float:
    value = row.get(f"length{suffix}")
    return float(value) if is_number(value) else float(len(row[text]))  # type: ignore[arg-type]


def _clipped(text: str) -> str:
    text = text.strip()
    return (
        text
        if len(text) <= MAX_CHARACTERS
        else f"{text[:MAX_CHARACTERS]} … ({len(text) - MAX_CHARACTERS} more characters)"
    )


def histograms(runs: Sequence[LabelledRun]) -> list[Figure]:
    """Histograms of scores, true rewards and lengths of the SFT model's and PPO's responses."""
    with_rows = [(each, rows) for each in runs if len(rows := last_rows(each.run)) > 1]
    found = []
    if not with_rows:
        return []
    truths = sorted(
        {name for _, rows in with_rows for name in rows[0] if name.startswith("true/") and name[-4:] != "_sft"}
    )
    tokens = all("length" in row for _, rows in with_rows for row in rows)
    charts = [("Scores of single responses", "score", "score")]
    charts += [(f"True reward of single responses: {name[5:]}", name, "true reward") for name in truths]
    if tokens:
        charts.append(("Lengths of single responses", "length", "tokens"))
    for title, column, unit in charts:
        series = []
        for number, (each, rows) in enumerate(with_rows):
            before = [row[f"{column}_sft"] for row in rows if is_number(row.get(f"{column}_sft"))]
            after = [row[column] for row in rows if is_number(row.get(column))]
            if number == 0:
                series.append(("SFT", before, 7))
            series.append((f"PPO, {each.label}" if len(with_rows) > 1 else "PPO", after, each.colour))
        if figure := histogram_figure(title, unit, series, whole=column == "length"):
            found.append(figure)
    return found
