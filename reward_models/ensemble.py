"""Several reward models of one reward, as one source of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reward_models.responses import Responses
from reward_models.trained import ModelReward


def mean(scores: Tensor, variance_coef: float) -> Tensor:
    """Mean over members, [k, B] -> [B]."""
    return scores.mean(dim=0)


def wco(scores: Tensor, variance_coef: float) -> Tensor:
    """Worst-case optimization: the lowest score of a member, [k, B] -> [B] (arXiv 2310.02743 eq. 5)."""
    return scores.amin(dim=0)


def uwo(scores: Tensor, variance_coef: float) -> Tensor:
    """Uncertainty-weighted optimization: mean - coef * variance among members, [k, B] -> [B] (arXiv 2310.02743 eq. 6).

    The variance is the population's (divided by k), which is 0 for one member.
    """
    return scores.mean(dim=0) - variance_coef * scores.var(dim=0, correction=0)


OBJECTIVES: dict[str, Callable[[Tensor, float], Tensor]] = {"mean": mean, "wco": wco, "uwo": uwo}


class RewardEnsemble:
    """Scores of k reward models, combined by `mean`, `wco` or `uwo`; `<name>_1` to `<name>_k` are the members' names.

    Args:
        name: for logs and errors.
        members: k models.
        objective: a key of `OBJECTIVES`.
        variance_coef: of `uwo`, in 1 / score.

    Raises:
        ValueError: no members, or another objective.
    """

    def __init__(
        self, name: str, members: Sequence[ModelReward], objective: str = "mean", variance_coef: float = 0.0
    ) -> None:
        if not members or objective not in OBJECTIVES:
            raise ValueError(f"{name}: expected members and one of {', '.join(OBJECTIVES)}, got {objective!r}.")
        self.name, self.members = name, list(members)
        self.objective, self.variance_coef = objective, variance_coef

    @property
    def member_names(self) -> list[str]:
        """Names of the members, in their order."""
        return [f"{self.name}_{number}" for number in range(1, len(self.members) + 1)]

    def score(self, batch: Responses) -> Tensor:
        """Scores [B], float32, on the CPU."""
        return self.combine(self.score_members(batch))

    def score_members(self, batch: Responses) -> Tensor:
        """Scores of each member, [k, B] float32, on the CPU.

        Raises:
            ValueError: as `ModelReward.score`.
        """
        return torch.stack([member.score(batch) for member in self.members])

    def combine(self, scores: Tensor) -> Tensor:
        """Scores of the members [k, B] to those of the ensemble [B]."""
        return OBJECTIVES[self.objective](scores, self.variance_coef)


def disagreement(scores: Tensor) -> Tensor:
    """Standard deviation among k members, divided by k, [k, B] -> [B], in units of score."""
    return scores.std(dim=0, correction=0)
