"""`results.json` of `align bon`: its schema, its tables and its chart. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.best_of_n import BestOfNRecipe
from align.evaluate.results import Table
from align.runs.charts import draw
from align.runs.markdown import markdown_text
from align.runs.measurement import finished_measurement
from align.runs.records import COUNT, MAPPING, NUMBER, Kind, Record, is_count, is_number, mapping_of
from align.runs.schemas import IDENTITY, OF_IDENTITY
from align.runs.tables import markdown_table
from align.runs.whole import check_whole

LOW_EOS_RATE = 0.3
REPORT, CHART = "results.md", "frontier.svg"
ESTIMATES = ("proxy", "judge", "win_rate", "judge_win_rate", "length")


def _is_frontier(value: Any) -> bool:
    names = [f"{name}{end}" for name in ESTIMATES for end in ("", "_low", "_high")]
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(each, dict)
            and all(is_count(each.get(name)) for name in ("n", "prompts"))
            and all(is_number(each.get(name)) for name in ("kl", "win_rate_bound"))
            and all(name in each and (each[name] is None or is_number(each[name])) for name in names)
            for each in value
        )
    )


AGAIN = "sample again"  # what a folder is deleted for
RESULTS_RECORD = Record(
    {
        **IDENTITY,
        "prompts": COUNT,
        "num_generations": COUNT,
        "frontier": Kind("a list with an entry for each n", _is_frontier),
        "datasets": mapping_of("a mapping of files to rows", lambda name: isinstance(name, str), is_count),
        "data": MAPPING,
    },
    {
        **OF_IDENTITY,
        "eos_rate": NUMBER,
        "left_out": mapping_of("prompts by reason", lambda reasons: isinstance(reasons, str), is_count),
    },
    "restore the file from a copy, or delete the folder to sample again",
)


def finished(recipe: BestOfNRecipe) -> dict[str, Any] | None:
    """The content of `results.json` in `output_dir`; None when there is none.

    Raises:
        UserError: it is damaged, of another recipe, a model, the data or a function has changed since, or a data set is missing.
    """
    results = finished_measurement(recipe, RESULTS_RECORD, AGAIN)
    if results is not None:
        check_whole(Path(recipe.output_dir), results["datasets"])
    return results


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Tables of the frontier (at powers of two and the largest n), of the data sets' sizes, and of prompts left out."""
    frontier = results["frontier"]
    has_judge = any(each["judge"] is not None for each in frontier)
    has_judge_columns = ["judge", "win rate by judge"] if has_judge else []
    columns = ["n", "KL at most (nats)", "score", "win rate by score", *has_judge_columns, "length (tokens)"]
    names = ["proxy", "win_rate", *(["judge", "judge_win_rate"] if has_judge else []), "length"]
    rows = [
        [str(each["n"]), f"{each['kl']:.3f}", *(_with_interval(each, name) for name in names)]
        for each in frontier
        if each["n"] & (each["n"] - 1) == 0 or each is frontier[-1]
    ]
    title = f"Best of n, {results['prompts']} prompts with {results['num_generations']} responses each (-: no further response to compare with)"
    files = [[name, str(count)] for name, count in results["datasets"].items()]
    found = [Table(title, columns, rows), Table("Data sets", ["file", "rows"], files)]
    if reasons := results.get("left_out"):
        left_out = [[*reason.split(": ", 1), str(count)] for reason, count in reasons.items()]
        title = f"Prompts left out, of {results['prompts']}"
        found.append(Table(title, ["files", "because", "prompts"], left_out))
    return found


def eos_warning(results: Mapping[str, Any]) -> str | None:
    """A warning if the EOS rate is below the limit of PPO's self-checks, else None."""
    rate = results["eos_rate"]
    if rate >= LOW_EOS_RATE:
        return None
    return (
        f"warning: {rate:.0%} of the responses end by themselves; expected {LOW_EOS_RATE:.0%} or more, and others are in no data "
        f"set. response_length {results['recipe']['response_length']} is too short, or the model did not learn to stop."
    )


def _with_interval(entry: Mapping[str, Any], name: str) -> str:
    if entry[name] is None:
        return "-"
    low, high = entry[f"{name}_low"], entry[f"{name}_high"]
    return f"{entry[name]:.4g}" + (f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else "")


def report_text(results: Mapping[str, Any]) -> str:
    """The content of `results.md`."""
    text = (
        "# Best of n\n\nEstimates are unbiased, over all sets of n of the responses; in brackets 95% intervals, by bootstrap over "
        "the prompts. The KL divergence is from the model that was sampled. Win rates are against one more response, so that "
        "there is none for all of them.\n"
    )
    if "eos_rate" in results and (warning := eos_warning(results)):
        text += f"\n{markdown_text(warning)}\n"
    for table in tables(results):
        text += f"\n## {markdown_text(table.title)}\n\n{markdown_table(table.columns, table.rows)}"
    return f"{text}\n![Score against the square root of KL]({CHART})\n"


def chart(frontier: Sequence[Mapping[str, Any]]) -> str:
    """An SVG chart of score and judge over the square root of the KL bound."""
    curves = {
        name: [each[column] for each in frontier]
        for name, column in (("score", "proxy"), ("judge", "judge"))
        if frontier[0][column] is not None
    }
    title = f"mean reward of the best of 1 to {len(frontier)}"
    return draw([math.sqrt(each["kl"]) for each in frontier], curves, title, "√KL, √nats per response")
