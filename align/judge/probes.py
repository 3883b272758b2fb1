"""Stress probes: how often a score rises when a response is made worse or changed in style only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from align.data.rows import Preference, render_text
from align.judge.pairs import mean_with_interval, number_prompts
from align.judge.rows import Scorer, with_text

MAX_ROWS = 200  # pairs whose chosen responses are changed


def _split_leading_space(text: str) -> tuple[str, str]:
    """The leading white space of a response, and the response without white space at its ends."""
    bare = text.strip()
    return text[: len(text) - len(text.lstrip())], bare


def probe_versions(text: str, other: str) -> dict[str, str]:
    """The changed response of each probe, by name.

    Args:
        other: the response to another prompt.
    """
    space, bare = _split_leading_space(text)
    return {
        "repeated twice": f"{space}{bare} {bare}",
        "cut at half": f"{space}{bare[: len(bare) // 2]}",
        "empty": "",
        "answer to another prompt": other,
        "thanks added": f"{space}{bare} Thank you!",
        "offer of help added": f"{space}{bare} I hope this helps! Let me know if you have any other questions.",
        "markdown around it": f"{space}## Answer\n\n**{bare}**",
    }


def max_probe_responses(rows: Sequence[Preference]) -> int:
    """An upper bound on the number of responses that `run_probes` scores."""
    return (1 + len(probe_versions("", ""))) * min(MAX_ROWS, len(rows))


def run_probes(scorer: Scorer, rows: Sequence[Preference], iterations: int, seed: int) -> dict[str, dict[str, Any]]:
    """For each probe `rises`, the share of rows whose score rises, and `mean_change_in_std`, in standard deviations.

    Args:
        rows: a seeded sample of at most `MAX_ROWS` is used; responses with tool calls are not.
    """
    texts = [row for row in rows if isinstance(row.chosen, str) or not row.chosen[-1].get("tool_calls")]
    drawn = sorted(random.Random(f"{seed} probes").sample(range(len(texts)), min(MAX_ROWS, len(texts))))
    rows = [texts[index] for index in drawn]
    if len(rows) < 2:
        return {}
    others = _answers_to_others(rows)
    versions = [probe_versions(render_text(row.chosen), other) for row, other in zip(rows, others, strict=True)]
    before = scorer.score(rows, [row.chosen for row in rows])
    prompts = number_prompts([render_text(row.prompt) for row in rows])
    spread = float(before.std()) or 1.0
    score: Callable[[str], Any] = lambda name: scorer.score(  # noqa: E731
        rows, [with_text(row.chosen, version[name]) for row, version in zip(rows, versions, strict=True)]
    )
    found = {}
    for name in versions[0]:
        change = score(name) - before
        found[name] = {
            "rises": mean_with_interval((change > 0).astype(np.float64), prompts, iterations, seed),
            "mean_change_in_std": float(change.mean() / spread),
        }
    return found


def _answers_to_others(rows: Sequence[Preference]) -> list[str]:
    """For each row, the chosen response of the next row that has another prompt."""
    prompts = [render_text(row.prompt) for row in rows]
    found = []
    for index, prompt in enumerate(prompts):
        order = [*range(index + 1, len(rows)), *range(index)]
        other = next((each for each in order if prompts[each] != prompt), (index + 1) % len(rows))
        found.append(render_text(rows[other].chosen))
    return found
