"""The report card as files (`card.md` with charts, `confident_errors.jsonl`) and as tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.evaluate.results import Table
from align.judge.verdicts import LIMITS, format_value, overall, summary
from align.runs.charts import draw, draw_bars
from align.runs.files import write_text
from align.runs.markdown import markdown_text
from align.runs.tables import markdown_table

CARD, ERRORS, RELIABILITY, MARGINS = "card.md", "confident_errors.jsonl", "reliability.svg", "margins.svg"
FILES = (CARD, ERRORS, RELIABILITY, MARGINS)
SHOWN_ERRORS, SHOWN_CHARACTERS = 5, 300


def manifest_entry(card: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a card that a stage's manifest keeps: overall verdict, summary, and the verdict of each line."""
    verdicts = card["verdicts"]
    return {
        "verdict": overall(verdicts),
        "summary": summary(verdicts),
        "lines": {each["line"]: each["verdict"] for each in verdicts},
    }


def verdict_table(card: Mapping[str, Any]) -> Table:
    """The verdicts as a table."""
    rows = [
        [each["line"], each["verdict"], each["measured"], each["reason"], each["go_back_to"]]
        for each in card["verdicts"]
    ]
    return Table(f"Reward: {overall(card['verdicts'])}", ["line", "verdict", "measured", "reason", "go back to"], rows)


def tables(card: Mapping[str, Any]) -> list[Table]:
    """All measurements as tables, with n and 95% interval."""
    found = [verdict_table(card), Table("On the pairs", ["measure", "value"], _metrics(card))]
    found.append(Table("With people's ratings", ["measure", "reward", "second reward", "difference"], _ratings(card)))
    found += [
        Table(
            f"Accuracy by {column}",
            [column, "accuracy", "less the rest"],
            [
                [each["slice"], format_value(each["accuracy"]), format_value(each["less_the_rest"], "+")]
                for each in values
            ],
        )
        for column, values in card.get("slices", {}).items()
    ]
    for each in card.get("benchmarks", []):
        parts = [*each["parts"].items(), *((f"level {k}", v) for k, v in each.get("levels", {}).items())]
        rows = [["overall", f"{each['overall']:.4f}"], *([name, f"{value:.4f}"] for name, value in parts)]
        found.append(Table(f"{each['benchmark']} ({each['n']} rows)", ["part", "score"], rows))
    return [each for each in found if each.rows]


def _metrics(card: Mapping[str, Any]) -> list[list[str]]:
    metrics, length = card.get("metrics", {}), card.get("length", {})
    rows = [
        [title, format_value(metrics[name])]
        for name, title in (
            ("accuracy", "accuracy, pairs that are no ties"),
            ("nll", "NLL, nats per pair"),
            ("brier", "Brier score"),
            ("ece", "ECE, 10 bins"),
            ("temperature", "temperature that fits"),
        )
        if name in metrics
    ]
    rows += [
        [f"{name.replace('_', ' ')}", str(metrics[name])]
        for name in ("ties_in_data", "ties_in_scores")
        if name in metrics
    ]
    for name, each in card.get("baselines", {}).items():
        fitted = f", fitted on {each['fitted_on']}" if "fitted_on" in each else ""
        rows.append([f"accuracy of {name}{fitted}", format_value(each["accuracy"])])
        rows.append([f"the reward less {name}", format_value(each["difference"], "+")])
    titles = {
        "score_with_length": "Spearman of score with characters, over responses",
        "within_pairs": "Spearman of margin with difference of characters, within pairs",
        "accuracy_longer_won": "accuracy where the longer response is better",
        "accuracy_shorter_won": "accuracy where the shorter response is better",
        "length_controlled_accuracy": "length-controlled accuracy",
    }
    rows += [[title, format_value(length[name])] for name, title in titles.items() if name in length]
    if agreement := card.get("agreement"):
        rows += [
            ["share ordered as by the second reward", format_value(agreement["agree"])],
            ["Spearman of the two margins", format_value(agreement["rank_correlation"])],
            ["both wrong", format_value(agreement["both_wrong"])],
            ["right where they differ", format_value(agreement["right_where_they_differ"])],
        ]
    return rows


def _ratings(card: Mapping[str, Any]) -> list[list[str]]:
    ratings = card.get("ratings", {})
    titles = {
        "pearson": "Pearson, over all responses",
        "spearman": "Spearman, over all responses",
        "kendall": "Kendall's tau-b, over all responses",
        "pair_accuracy": "pairs of a prompt in the rated order",
    }
    second, difference = ratings.get("second", {}), ratings.get("difference", {})
    return [
        [title, format_value(ratings[name]), format_value(second.get(name)), format_value(difference.get(name), "+")]
        for name, title in titles.items()
        if name in ratings
    ]


def write_card(folder: Path, card: Mapping[str, Any], errors: Sequence[Mapping[str, Any]], of: str) -> None:
    """Write the card's files into a folder of the run.

    Args:
        errors: from `align.judge.measure.confident_errors`.
        of: name of the reward, for the title.
    """
    charts = []
    if bins := card.get("metrics", {}).get("reliability"):
        confidence = [each["confidence"] for each in bins]
        curves = {"accuracy": [each["accuracy"] for each in bins], "calibrated": confidence}
        write_text(folder / RELIABILITY, draw(confidence, curves, "accuracy", "confidence"))
        histogram = card["metrics"]["margins"]
        write_text(
            folder / MARGINS, draw_bars(histogram["edges"], histogram["counts"], "pairs", "chosen less rejected score")
        )
        charts = ["## Charts", f"![reliability]({RELIABILITY})", f"![margins]({MARGINS})"]
    parts = [
        f"# Report card: {markdown_text(of)}",
        f"Verdict: **{overall(card['verdicts'])}** ({markdown_text(summary(card['verdicts']))}).",
    ]
    for table in tables(card):
        parts += [f"## {markdown_text(table.title)}", markdown_table(table.columns, table.rows).rstrip()]
    parts += charts
    if notes := card.get("notes"):
        parts += ["## Notes", *(f"- {markdown_text(note)}" for note in notes)]
    if errors:
        shown = [
            [f"{each['margin']:.3f}", *(_short(each[name]) for name in ("prompt", "chosen", "rejected"))]
            for each in errors[:SHOWN_ERRORS]
        ]
        parts += [
            "## Most confidently wrong",
            f"The first {len(shown)} of {len(errors)} in `{ERRORS}`: the score prefers the rejected response.",
            markdown_table(["margin", "prompt", "chosen", "rejected"], shown).rstrip(),
        ]
    parts += ["## Limits", "\n".join(f"- {limit}" for limit in LIMITS)]
    write_text(folder / CARD, "\n\n".join(parts) + "\n")
    write_text(folder / ERRORS, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in errors))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
