"""The report card of a reward: verdicts, measurements, reliability diagram, margins, and confident errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from align.report.figures import Figure, PageTable, curves_figure
from align.report.read import Run
from align.report.svg import Bars, Curve, histogram_chart
from align.runs.records import is_number

MAX_DEPTH, MAX_ROWS = 4, 120
MAX_ERRORS, MAX_CHARACTERS = 20, 600  # confident errors, and characters of each text


@dataclass(frozen=True, slots=True)
class RewardCard:
    """One card on the page."""

    title: str
    verdict: str
    verdicts: PageTable | None
    tables: list[PageTable]
    figures: list[Figure]
    notes: list[str]


def cards(run: Run, name: str) -> Iterator[RewardCard]:
    """The card of a run of `align judge-reward` or of the reward stage, if it has one."""
    found = [content["card"] for content in (run.record, *run.cards.values()) if isinstance(content.get("card"), dict)]
    for card in found[:1]:
        yield RewardCard(
            name,
            _overall(card),
            _verdicts(card),
            [table for table in (_measured(card), _errors(run)) if table is not None],
            [figure for figure in (_reliability(card), _margins(card)) if figure is not None],
            [note for note in notes if isinstance(note, str)] if isinstance(notes := card.get("notes"), list) else [],
        )
    brief = run.results.get("card")
    if not found and isinstance(brief, dict) and isinstance(lines := brief.get("lines"), dict):
        rows = [[line, str(verdict)] for line, verdict in lines.items()]
        more = PageTable("Verdicts; card/card.md in its folder has the measurements", ["line", "verdict"], rows)
        yield RewardCard(name, str(brief.get("summary", "")), more, [], [], [])


def _overall(card: Mapping[str, Any]) -> str:
    by_verdict: dict[str, list[str]] = {}
    for each in _lines(card):
        by_verdict.setdefault(str(each.get("verdict")), []).append(str(each.get("line")))
    return "; ".join(
        f"{verdict}: {', '.join(by_verdict[verdict])}"
        for verdict in ("bad", "doubtful", "good")
        if verdict in by_verdict
    )


def _lines(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    lines = card.get("verdicts")
    return [each for each in lines if isinstance(each, dict)][:MAX_ROWS] if isinstance(lines, list) else []


def _verdicts(card: Mapping[str, Any]) -> PageTable | None:
    names = ("line", "verdict", "measured", "reason", "go_back_to")
    rows = [[str(each.get(name, "")).replace("`", "") for name in names] for each in _lines(card)]
    columns = ["line", "verdict", "measured", "reason", "go back to"]
    return PageTable("Verdict by line", columns, rows) if rows else None


def _measured(card: Mapping[str, Any]) -> PageTable | None:
    rows = list(_leaves({k: v for k, v in card.items() if k not in ("verdicts", "notes")}, ""))[:MAX_ROWS]
    return PageTable("Everything measured, with 95% intervals", ["measure", "value", "n"], rows) if rows else None


def _leaves(value: Any, name: str, depth: int = 0) -> Iterator[list[object]]:
    """Rows of name, value with interval, and n, for every measurement under `value`."""
    if isinstance(value, dict) and is_number(value.get("value")):
        ends = value.get("low"), value.get("high")
        interval = f" [{ends[0]:.3g}, {ends[1]:.3g}]" if all(map(is_number, ends)) else ""
        yield [name, f"{value['value']:.4g}{interval}", f"{value['n']}" if is_number(value.get("n")) else ""]
    elif isinstance(value, dict) and depth < MAX_DEPTH:
        label = next((value[key] for key in ("slice", "benchmark") if isinstance(value.get(key), str)), None)
        for key, item in value.items():
            if key not in ("reliability", "margins", "slice", "benchmark"):
                yield from _leaves(item, " › ".join(filter(None, (name, label, key.replace("_", " ")))), depth + 1)
    elif isinstance(value, list) and depth < MAX_DEPTH:
        for item in value[:MAX_ROWS]:
            if isinstance(item, dict):
                yield from _leaves(item, name, depth)
    elif is_number(value):
        yield [name, f"{value:.4g}", ""]


def _metrics(card: Mapping[str, Any]) -> dict[str, Any]:
    found = card.get("metrics")
    return found if isinstance(found, dict) else {}


def _reliability(card: Mapping[str, Any]) -> Figure | None:
    bins = _metrics(card).get("reliability")
    if not isinstance(bins, list):
        return None
    points = [
        (float(each["confidence"]), float(each["accuracy"]))
        for each in bins
        if isinstance(each, dict) and is_number(each.get("confidence")) and is_number(each.get("accuracy"))
    ]
    if len(points) < 2:
        return None
    ends = points[0][0], points[-1][0]
    return curves_figure(
        "Reliability",
        "confidence, share",
        "accuracy, share",
        [Curve("accuracy", points, 0, dots=True), Curve("calibrated", [(x, x) for x in ends], 7, 1)],
        whole_x=False,
        about="Confidence is max(p, 1 - p) of the Bradley-Terry probability of a pair. Below the dashed line the reward is "
        "overconfident.",
    )


def _margins(card: Mapping[str, Any]) -> Figure | None:
    given = _metrics(card).get("margins")
    if not isinstance(given, dict):
        return None
    edges, counts = given.get("edges"), given.get("counts")
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1 or not counts:
        return None
    if len(counts) > 200 or not all(map(is_number, [*edges, *counts])) or edges != sorted(edges):
        return None
    title = "Margins of the pairs"
    svg = Markup(histogram_chart(title, "chosen less rejected score", "pairs", edges, [Bars("pairs", counts, 0)]))
    rows = [
        [f"{low:.4g} to {high:.4g}", f"{count}"] for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    return Figure(
        title,
        svg,
        PageTable(title, ["margin", "pairs"], rows),
        [("pairs", 0, 0)],
        "Left of 0 the label is not followed.",
    )


def _errors(run: Run) -> PageTable | None:
    rows: Sequence[Sequence[object]] = [
        [_short(each["prompt"]), _short(each["chosen"]), _short(each["rejected"]), f"{each['margin']:.3g}"]
        for each in run.errors
        if is_number(each.get("margin"))
        and all(isinstance(each.get(text), str) for text in ("prompt", "chosen", "rejected"))
    ][:MAX_ERRORS]
    columns = ["prompt", "labelled better", "labelled worse", "margin"]
    return PageTable("The pairs that it is most confidently wrong about", columns, rows) if rows else None


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} …"
