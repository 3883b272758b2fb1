"""Stress probes: responses that were changed for the worse or hardly at all, and how often their score rises."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from align.data.rows import Preference, render_text
from align.judge.pairs import number_prompts, share
from align.judge.rows import Scorer, with_text

MOST_ROWS = 200  # whose chosen responses are changed


def _spaced(text: str) -> tuple[str, str]:
    """The white space that a plain-text response begins with, and the rest."""
    bare = text.strip()
    return text[: len(text) - len(text.lstrip())], bare


def changed(text: str, other: str) -> dict[str, str]:
    """Each probe's version of a response, `other` being the answer to another prompt."""
    space, bare = _spaced(text)
    return {
        "repeated twice": f"{space}{bare} {bare}",
        "cut at half": f"{space}{bare[: len(bare) // 2]}",
        "empty": "",
        "answer to another prompt": other,
        "thanks added": f"{space}{bare} Thank you!",
        "offer of help added": f"{space}{bare} I hope this helps! Let me know if you have any other questions.",
        "markdown around it": f"{space}## Answer\n\n**{bare}**",
    }


def most_probed(rows: Sequence[Preference]) -> int:
    """Responses that `run_probes` scores, at most."""
    return (1 + len(changed("", ""))) * min(MOST_ROWS, len(rows))


def run_probes(scorer: Scorer, rows: Sequence[Preference], iterations: int, seed: int) -> dict[str, dict[str, Any]]:
    """By probe, the share of rows whose score rises strictly, and the mean change in standard deviations of the scores.

    Args:
        rows: at most `MOST_ROWS` of them are drawn by seed; tool calls are left out.
    """
    texts = [row for row in rows if isinstance(row.chosen, str) or not row.chosen[-1].get("tool_calls")]
    drawn = sorted(random.Random(f"{seed} probes").sample(range(len(texts)), min(MOST_ROWS, len(texts))))
    rows = [texts[index] for index in drawn]
    if len(rows) < 2:
        return {}
    others = _answers_to_others(rows)
    versions = [changed(render_text(row.chosen), other) for row, other in zip(rows, others, strict=True)]
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
            "rises": share((change > 0).astype(np.float64), prompts, iterations, seed),
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
