"""Weighted sums of several sources of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reward_models.ensemble import RewardEnsemble
from reward_models.responses import Responses, RewardSource, row_error
from reward_models.trained import ModelReward


class RewardSum:
    """The weighted sum of the scores of `sources`; all weights are 1 by default.

    Raises:
        ValueError: no sources, two with the same name, a weight that is not finite, or not one weight per source.
    """

    def __init__(self, sources: Sequence[RewardSource], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else list(weights)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"rewards: expected one or more with distinct names, got {names}.")
        if len(self.weights) != len(names) or not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"reward weights: expected a finite number for each of {names}, got {self.weights}.")

    @property
    def ensembles(self) -> list[RewardEnsemble]:
        """The sources that are ensembles."""
        return [source for source in self.sources if isinstance(source, RewardEnsemble)]

    @property
    def names(self) -> list[str]:
        """Names of all that is scored, in the order of the scores by name: the sources, then members of ensembles."""
        members = [name for ensemble in self.ensembles for name in ensemble.member_names]
        return [*(source.name for source in self.sources), *members]

    @property
    def models(self) -> list[ModelReward]:
        """The trained reward models among the sources, members of ensembles included."""
        return [
            model
            for source in self.sources
            for model in (source.members if isinstance(source, RewardEnsemble) else [source])
            if isinstance(model, ModelReward)
        ]

    def score(self, batch: Responses) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Score B responses; all results are float32 on the CPU.

        Returns:
            The weighted sum [B]; unweighted scores by name (`names`: each source, and each member of an ensemble, which
            is not in the sum by itself), [B]; the weighted rewards of single tokens [B, T]. The score of a source that
            scores tokens is their sum. A source that does not apply to a row has NaN there (aggregate with `nanmean`) and
            adds nothing to the sum.

        Raises:
            ValueError: a source failed, or none applies to a row; the message shows the row.
        """
        members: dict[str, Tensor] = {}
        raw_scores: dict[str, Tensor] = {}
        for source in self.sources:
            if isinstance(source, RewardEnsemble):
                each = source.score_members(batch)
                members |= zip(source.member_names, each, strict=True)
                raw_scores[source.name] = source.combine(each)
            else:
                raw_scores[source.name] = source.score(batch).cpu()
        scores = {name: values if values.dim() == 1 else values.sum(dim=1) for name, values in raw_scores.items()}
        weights = dict(zip(scores, self.weights, strict=True))
        weighted = torch.stack([weights[name] * values for name, values in scores.items()])
        for row in weighted.isnan().all(dim=0).nonzero().flatten().tolist():
            raise row_error(
                " + ".join(scores), batch, row, "returned None; expected a score from at least one of them."
            )
        tokens = torch.zeros(len(batch), max(map(len, batch.response_ids), default=0))
        for name, values in raw_scores.items():
            if values.dim() == 2:
                tokens += weights[name] * values.nan_to_num(0.0)
        return weighted.nansum(dim=0), {**scores, **members}, tokens
