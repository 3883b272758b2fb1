"""A model's responses to the held-out prompts, and the rows and columns in which they are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.config.judge import SCORE
from align.ppo.metrics import member_scores, response_kl
from align.ppo.rollout import Rollout
from reward_models.combine import RewardSum
from reward_models.ensemble import disagreement

SAMPLE_COLUMNS = ["prompt", "sft", "response", "score_sft", "score", "kl"]
Columns = dict[str, list[float | None]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's responses to all held-out prompts, their text, and what each is worth by metric, [B], the most trustworthy first.

    The metrics are `eval/judge` with a judge, `eval/true/<function>`, where NaN says that the function does not apply, and
    `eval/score`.

    Attributes:
        truncated: how many responses the judge read without the beginning of their prompt, which its model has no room for.
    """

    rollout: Rollout
    texts: list[str]
    worth: dict[str, list[float]]
    truncated: float = 0.0


def sample_rows(prompts: Sequence[str], before: Measured, after: Measured) -> list[list[Any]]:
    """A row per prompt, in the columns `SAMPLE_COLUMNS`, for the SFT model and the policy."""
    kl = response_kl(after.rollout).tolist()
    columns = (prompts, before.texts, after.texts, before.worth[SCORE], after.worth[SCORE], kl)
    return [list(row) for row in zip(*columns, strict=True)]


def measure_columns(before: Measured, after: Measured) -> Columns:
    """Lengths in tokens and what the responses are worth but for the score, of the SFT model (`_sft`) and the policy."""
    both = ((before, "_sft"), (after, ""))
    columns: Columns = {f"length{whose}": [*model.rollout.lengths.tolist()] for model, whose in both}
    for name in after.worth:
        for model, whose in both if name != SCORE else ():
            values = model.worth[name]
            columns[f"{name[5:]}{whose}"] = [None if math.isnan(value) else value for value in values]
    return columns


def member_columns(model: Measured, rewards: RewardSum) -> Columns:
    """Scores of each member of an ensemble, and their disagreement."""
    columns: Columns = {}
    for ensemble, scores in member_scores(model.rollout, rewards).items():
        columns |= {f"score/{ensemble}_{n}": each.tolist() for n, each in enumerate(scores, start=1)}
        columns[f"disagreement/{ensemble}"] = disagreement(scores).tolist()
    return columns
