"""A model's responses to the held-out prompts, and their columns in `samples.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from align.config.judge import SCORE
from align.generation.responses import unpadded
from align.ppo.metrics import member_scores, response_kl
from align.ppo.rollout import Rollout
from reward_models.combine import RewardSum
from reward_models.ensemble import disagreement

SAMPLE_COLUMNS = ["prompt", "sft", "response", "score_sft", "score", "kl"]
Columns = dict[str, list[float | None]]


@dataclass(frozen=True, slots=True)
class HeldOutResponses:
    """A model's responses to all held-out prompts.

    Attributes:
        texts: of the responses.
        metric_values: a value [B] for each response by metric: `eval/judge` with a judge, `eval/true/<function>` (NaN where
            the function does not apply), `eval/score`, in the order in which they are trusted.
        truncated: number of responses that the judge's model truncated.
    """

    rollout: Rollout
    texts: list[str]
    metric_values: dict[str, list[float]]
    truncated: float = 0.0


def sample_rows(prompts: Sequence[str], before: HeldOutResponses, after: HeldOutResponses) -> list[list[Any]]:
    """One row per prompt, in the columns `SAMPLE_COLUMNS`, of the SFT model (`before`) and the policy (`after`)."""
    kl = response_kl(after.rollout).tolist()
    columns = (prompts, before.texts, after.texts, before.metric_values[SCORE], after.metric_values[SCORE], kl)
    return [list(row) for row in zip(*columns, strict=True)]


def same_responses(before: HeldOutResponses, after: HeldOutResponses) -> list[bool]:
    """For which prompts both models gave the same response, whose scores may differ by the rounding of other batches."""
    pairs = zip(*(unpadded(model.rollout.response_ids, model.rollout.mask) for model in (before, after)), strict=True)
    return [a == b for a, b in pairs]


def measure_columns(before: HeldOutResponses, after: HeldOutResponses) -> Columns:
    """Columns of lengths in tokens and of metrics other than the score, of the SFT model (`_sft`) and the policy."""
    both = ((before, "_sft"), (after, ""))
    columns: Columns = {f"length{suffix}": [*model.rollout.lengths.tolist()] for model, suffix in both}
    for name in after.metric_values:
        for model, suffix in both if name != SCORE else ():
            values = model.metric_values[name]
            columns[f"{name[5:]}{suffix}"] = [None if math.isnan(value) else value for value in values]
    return columns


def member_columns(model: HeldOutResponses, rewards: RewardSum) -> Columns:
    """Columns of the scores of each member of an ensemble and of their disagreement."""
    columns: Columns = {}
    for ensemble, scores in member_scores(model.rollout, rewards).items():
        columns |= {f"score/{ensemble}_{n}": each.tolist() for n, each in enumerate(scores, start=1)}
        columns[f"disagreement/{ensemble}"] = disagreement(scores).tolist()
    return columns
