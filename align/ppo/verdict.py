"""What the numbers of an evaluation mean: against the SFT model, against the best evaluation before, and as warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from align.config.judge import JUDGE, SCORE, TRUE
from align.evaluate.bootstrap import mean_interval

MOST_CORRELATION = 0.7  # of score and length
MOST_GROWTH = 1.25  # of the mean length, against the SFT model's


@dataclass(frozen=True, slots=True)
class Change:
    """Mean difference of one measure between two models on the same prompts, with its 95% interval."""

    mean: float
    low: float
    high: float
    prompts: int

    @property
    def word(self) -> str:
        """The first model compared with the second."""
        return "better than" if self.low > 0 else "worse than" if self.high < 0 else "no different from"

    def __str__(self) -> str:
        return f"{self.mean:+.3g} ({self.low:+.3g} to {self.high:+.3g})"


def change(after: Sequence[float], before: Sequence[float], prompts: Sequence[str]) -> Change:
    """The change from `before` to `after`, row by row; rows in which one is NaN are left out.

    The interval is bootstrapped by prompt.
    """
    rows = [(a - b, p) for a, b, p in zip(after, before, prompts, strict=True) if not math.isnan(a - b)]
    groups = [prompt for _, prompt in rows]
    return Change(*mean_interval([difference for difference, _ in rows], groups), len(set(groups)))


def label(metric: str) -> str:
    """A measure in words, by the name of its metric."""
    if metric == JUDGE:
        return "judge"
    return "score (the training reward)" if metric == SCORE else f"true reward ({metric.removeprefix(TRUE)})"


def verdicts(changes: Mapping[str, Change]) -> list[str]:
    """A line for each measure: is the policy better than the SFT model?

    Args:
        changes: from the SFT model to the policy, by metric, the most trustworthy first.
    """
    lines = [
        f"{each.word} SFT by {label(metric)}: {each}, 95% interval, on {each.prompts} prompts unseen in training"
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
    """Signs, by kind, that the gain is not real, or not measured.

    Args:
        changes: as for `verdicts`.
        objective: change of score - `kl_coef` * KL.
        correlation: of score and length over the responses of both models.
        lengths: mean length of the SFT model's responses and of the policy's, tokens.
        truncated: responses of both models that the judge could not read whole.
    """
    score, found = changes[SCORE], {}
    for metric, each in changes.items():
        if each.word == "worse than" and score.mean > 0:
            found[metric] = (
                f"{label(metric)} is {each} from the SFT model's while the score rose by {score.mean:.3g}: the reward is "
                "exploited. Read samples.jsonl, raise kl_coef, or fix the reward."
            )
    before, after = lengths
    if correlation > MOST_CORRELATION and after > MOST_GROWTH * before and score.mean > 0:
        found["length"] = (
            f"the score is explained by length: their correlation is {correlation:.2g}, and responses grew from {before:.3g} to "
            f"{after:.3g} tokens. See whether the annotators preferred length or the reward model does; train it on pairs of "
            "equal length, or add a penalty to reward_funcs."
        )
    if objective.word == "worse than":
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


def fell(metric: str, each: Change, best: int, score: float) -> str:
    """That the measure which chooses the best checkpoint has fallen since update `best`.

    Args:
        each: the change since then.
        score: that of the mean score.
    """
    while_score = f" while the score {'rose' if score > 0 else 'fell'} by {abs(score):.3g}" if metric != SCORE else ""
    kept = "the SFT model" if best == 0 else f"update {best}"
    return f"{label(metric)} is {each} from its best, of {kept}{while_score}; best/ keeps {kept}."


def mean(values: Sequence[float]) -> float:
    """Mean of those that are not NaN."""
    return float(torch.tensor(values).nanmean())


def spread(values: Sequence[float]) -> float:
    """Their standard deviation, without NaN."""
    given = torch.tensor(values, dtype=torch.float64)
    return float(given[~given.isnan()].std(correction=0))


def win_rate_of(metric: str) -> str:
    """The metric of the win rate by a measure."""
    names = {SCORE: "eval/win_rate", JUDGE: "eval/judge_win_rate"}
    return names.get(metric) or f"eval/true_win_rate/{metric.removeprefix(TRUE)}"
