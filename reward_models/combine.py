"""A weighted sum of several sources of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reward_models.responses import Responses, RewardSource, row_error


class RewardSum:
    """The weighted sum of the scores of `sources`, with weight 1 each by default.

    Raises:
        ValueError: no source, two of one name, a weight that is not finite, or another number of weights than sources.
    """

    def __init__(self, sources: Sequence[RewardSource], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else list(weights)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"rewards: expected one or more, each with a name of its own, got {names}.")
        if len(self.weights) != len(names) or not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"reward weights: expected a finite number for each of {names}, got {self.weights}.")

    def score(self, batch: Responses) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The weighted sum [B], each source's own scores by name, unweighted [B], and what single tokens got [B, T].

        All float32, on the CPU. A source that scores single tokens has their sum as its score. A source that does
        not apply to a row has NaN there (so log `nanmean`) and adds nothing to the sum.

        Raises:
            ValueError: a source failed, or none applies to a row; the message shows the row.
        """
        given = {source.name: source.score(batch).cpu() for source in self.sources}
        scores = {name: values if values.dim() == 1 else values.sum(dim=1) for name, values in given.items()}
        weights = dict(zip(scores, self.weights, strict=True))
        weighted = torch.stack([weights[name] * own for name, own in scores.items()])
        for row in weighted.isnan().all(dim=0).nonzero().flatten().tolist():
            raise row_error(
                " + ".join(scores), batch, row, "returned None; expected a score from one of them at least."
            )
        tokens = torch.zeros(len(batch), max(map(len, batch.response_ids), default=0))
        for name, values in given.items():
            if values.dim() == 2:
                tokens += weights[name] * values.nan_to_num(0.0)
        return weighted.nansum(dim=0), scores, tokens
