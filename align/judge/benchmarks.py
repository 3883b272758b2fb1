"""Read, check and score files of RewardBench 1 and 2, RM-Bench and JudgeBench in their published format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.rows import Preference
from align.errors import UserError, first_few
from align.judge.benchmark_scores import (
    COUNTS,
    DOMAINS,
    STYLES,
    is_ties,
    judge_bench,
    reward_bench,
    reward_bench_2,
    rm_bench,
)
from align.judge.rows import Scorer, as_pair

REWARD_BENCH, REWARD_BENCH_2, RM_BENCH, JUDGE_BENCH = "RewardBench", "RewardBench 2", "RM-Bench", "JudgeBench"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark file.

    Attributes:
        kind: name of the benchmark.
        rows: place (file and line) and raw columns of each row.
    """

    kind: str
    rows: list[tuple[str, Mapping[str, Any]]]

    def sides(self, row: Mapping[str, Any]) -> list[list[str]]:
        """The right and the wrong responses of a row."""
        names = ("response_A", "response_B") if self.kind == JUDGE_BENCH else ("chosen", "rejected")
        return [[row[name]] if isinstance(row[name], str) else list(row[name]) for name in names]

    @property
    def responses(self) -> int:
        """Responses to score."""
        return sum(len(side) for _, row in self.rows for side in self.sides(row))


def detect_benchmark(source: str, columns: Sequence[str]) -> str:
    """The name of the benchmark that has these columns.

    Args:
        source: path or hub id, for errors.
        columns: names; those that hold lists end in `[]`.

    Raises:
        UserError: no supported benchmark has these columns.
    """
    known = set(columns)
    if {"question", "response_A", "response_B", "label"} <= known:
        return JUDGE_BENCH
    if {"prompt", "chosen[]", "rejected[]", "num_correct", "subset", "id"} <= known:
        return REWARD_BENCH_2
    if {"prompt", "chosen[]", "rejected[]", "domain"} <= known:
        return RM_BENCH
    if {"prompt", "chosen", "rejected", "subset"} <= known:
        return REWARD_BENCH
    raise UserError(
        f"benchmarks: {source}: expected the columns of RewardBench (prompt, chosen, rejected, subset), RewardBench 2 (lists "
        f"chosen and rejected, num_correct, subset, id), RM-Bench (lists chosen and rejected, domain) or JudgeBench (question, "
        f"response_A, response_B, label), got {first_few(columns)}"
    )


def read_benchmark(source: str, raw: Sequence[tuple[str, Any]]) -> Benchmark:
    """A benchmark from raw rows.

    Raises:
        UserError: the columns are those of no supported benchmark, or a row is incomplete.
    """
    if not raw:
        raise UserError(f"benchmarks: {source}: expected rows, found none; name a file that holds data.")
    for where, row in raw:
        if not isinstance(row, Mapping):
            raise UserError(f"benchmarks: {where}: expected a mapping of columns; download the file again.")
    kind = detect_benchmark(
        source, [f"{name}[]" if isinstance(value, list) else str(name) for name, value in raw[0][1].items()]
    )
    for where, row in raw:
        if problem := _row_problem(kind, row):
            raise UserError(f"benchmarks: {where}: {problem} in a row of {kind}; download the file again.")
    return Benchmark(kind, list(raw))


def _row_problem(kind: str, row: Mapping[str, Any]) -> str | None:
    """The problem of an invalid row; None if it is valid."""
    if kind == JUDGE_BENCH:
        texts = all(isinstance(row.get(name), str) for name in ("question", "response_A", "response_B"))
        labelled = row.get("label") in ("A>B", "B>A")
        return None if texts and labelled else "no texts `response_A` and `response_B`, or no `label` A>B or B>A"
    if not isinstance(row.get("prompt"), str):
        return "no text `prompt`"
    sides = [row.get("chosen"), row.get("rejected")]
    if kind == REWARD_BENCH:
        texts = all(isinstance(side, str) for side in sides)
        known = isinstance(row.get("subset"), str) and row["subset"] in COUNTS
        return (
            None
            if texts and known
            else f"no text `chosen` and `rejected`, or an unknown `subset` {row.get('subset')!r}"
        )
    if not all(isinstance(side, list) and side and all(isinstance(text, str) for text in side) for side in sides):
        return "no lists of texts `chosen` and `rejected`"
    if kind == RM_BENCH:
        known = str(row.get("domain")).startswith(DOMAINS)
        three = all(len(side) == STYLES for side in sides if side is not None)
        return (
            None
            if known and three
            else f"no three `chosen` and `rejected`, or an unknown `domain` {row.get('domain')!r}"
        )
    if is_ties(row):
        kind_of, _, number = str(row.get("id")).partition(":")
        return None if kind_of in ("ref", "tied") and number.isdigit() else f"an `id` {row.get('id')!r} of Ties"
    return None if isinstance(row.get("subset"), str) else "no `subset`"


def score_benchmark(benchmark: Benchmark, scorer: Scorer, chat: bool) -> dict[str, Any]:
    """Score a benchmark: its name, number of rows, overall score and the scores of its parts.

    Args:
        chat: whether prompts are passed as user messages, for a model with a chat template, or as text.
    """
    judge = benchmark.kind == JUDGE_BENCH
    rows: list[Preference] = []
    sizes: list[tuple[int, int]] = []
    for where, row in benchmark.rows:
        prompt = row["question" if judge else "prompt"]
        sides = benchmark.sides(row)
        sizes.append((len(sides[0]), len(sides[1])))
        for text in sides[0] + sides[1]:
            rows.append(as_pair([{"role": "user", "content": prompt}] if chat else prompt, text, text, where))
    scores = scorer.score(rows, [row.chosen for row in rows]).tolist()
    split = []
    start = 0
    for first, second in sizes:
        split.append((scores[start : start + first], scores[start + first : start + first + second]))
        start += first + second
    measure = {REWARD_BENCH: reward_bench, REWARD_BENCH_2: reward_bench_2, RM_BENCH: rm_bench, JUDGE_BENCH: judge_bench}
    found = measure[benchmark.kind]([row for _, row in benchmark.rows], split)
    return {"benchmark": benchmark.kind, "n": len(benchmark.rows), **found}
