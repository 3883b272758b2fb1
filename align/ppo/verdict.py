"""Interpretation of an evaluation: differences from the SFT model and from the best evaluation, and warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from align.config.judge import JUDGE, SCORE, TRUE
from align.evaluate.bootstrap import mean_interval

MAX_LENGTH_CORRELATION = 0.7  # of score and length
MAX_LENGTH_GROWTH = 1.25  # of the mean length, against the SFT model's


@dataclass(frozen=True, slots=True)
class Change:
    """Mean difference of one measure between two models on the same prompts, with its 95% interval."""

    mean: float
    low: float
    high: float
    prompts: int

    @property
    def comparison(self) -> str:
        """ "better than", "worse than", or "no different from" if the interval contains 0."""
        return "better than" if self.low > 0 else "worse than" if self.high < 0 else "no different from"

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


def paired_change(after: Sequence[float], before: Sequence[float], prompts: Sequence[str]) -> Change:
    """The mean difference `after` - `before` over rows, without rows in which either is NaN; bootstrapped by prompt."""
    rows = [(a - b, p) for a, b, p in zip(after, before, prompts, strict=True) if not math.isnan(a - b)]
    groups = [prompt for _, prompt in rows]
    return Change(*mean_interval([difference for difference, _ in rows], groups), len(set(groups)))


def metric_label(metric: str) -> str:
    """The name of a metric in verdicts and tables."""
    if metric == JUDGE:
        return "judge"
    return "score (the training reward)" if metric == SCORE else f"true reward ({metric.removeprefix(TRUE)})"


def verdicts(changes: Mapping[str, Change]) -> list[str]:
    """One line for each metric that says whether the policy is better than the SFT model.

    Args:
        changes: from the SFT model to the policy, by metric: judge, true rewards, score.
    """
    lines = [
        f"{each.comparison} SFT by {metric_label(metric)}: {each}, 95% interval, on {each.prompts} prompts unseen in training"
        for metric, each in changes.items()
    ]
    if [*changes] == [SCORE]:
        lines.append("the score was trained on, so that it proves nothing: measure a judge (`judge_reward_model_path`)")
    return lines


def warnings(
    changes: Mapping[str, Change],
    objective: Change,
    correlation: float,
    lengths: tuple[float, float],
    truncated: float = 0,
) -> dict[str, str]:
    """Warnings, by kind, that the gain may not be real or was not measured.

    Args:
        changes: as for `verdicts`.
        objective: change of score - `kl_coef` * KL.
        correlation: of score and length over the responses of both models.
        lengths: mean length of the SFT model's responses and of the policy's, tokens.
        truncated: number of responses of both models that the judge's model truncated.
    """
    score, found = changes[SCORE], {}
    for metric, each in changes.items():
        if each.comparison == "worse than" and score.mean > 0:
            found[metric] = (
                f"{metric_label(metric)} is {each} from the SFT model's while the score rose by {score.mean:.3g}: the reward is "
                "exploited. Read samples.jsonl, raise kl_coef, or fix the reward."
            )
    before, after = lengths
    if correlation > MAX_LENGTH_CORRELATION and after > MAX_LENGTH_GROWTH * before and score.mean > 0:
        found["length"] = (
            f"the score is explained by length: their correlation is {correlation:.2g}, and responses grew from {before:.3g} to "
            f"{after:.3g} tokens. See whether the annotators preferred length or the reward model does; train it on pairs of "
            "equal length, or add a penalty to reward_funcs."
        )
    if objective.comparison == "worse than":
        found["objective"] = (
            f"the objective, score - kl_coef * KL, is {objective} from the SFT model's: the policy moves away and gains less "
            "than that costs. Lower learning_rate or kl_coef."
        )
    if truncated:
        found["truncated"] = (
            f"{truncated:.0f} prompts with a response, of the SFT model or the policy, are longer than the judge's model can "
            "read, and lost their beginning there. Lower max_prompt_length or response_length, or take another judge."
        )
    return found


def describe_fall(metric: str, each: Change, best: int, score: float) -> str:
    """The warning that `metric_for_best_model` is lower than at update `best`.

    Args:
        each: change of the metric since then.
        score: change of the mean score since then.
    """
    while_score = f" while the score {'rose' if score > 0 else 'fell'} by {abs(score):.3g}" if metric != SCORE else ""
    kept = "the SFT model" if best == 0 else f"update {best}"
    return f"{metric_label(metric)} is {each} from its best, of {kept}{while_score}; best/ keeps {kept}."


def mean(values: Sequence[float]) -> float:
    """The mean without NaN."""
    return float(torch.tensor(values).nanmean())


def spread(values: Sequence[float]) -> float:
    """The standard deviation without NaN."""
    given = torch.tensor(values, dtype=torch.float64)
    return float(given[~given.isnan()].std(correction=0))


def win_rate_metric(metric: str) -> str:
    """The name of the win rate by a metric."""
    names = {SCORE: "eval/win_rate", JUDGE: "eval/judge_win_rate"}
    return names.get(metric) or f"eval/true_win_rate/{metric.removeprefix(TRUE)}"
