"""The best checkpoint among those within `max_forgetting`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import EarlyStoppingCallback

FORGETTING = "eval_forgetting"


def better(entry: Mapping[str, float], metric: str, high_is_good: bool, bound: float | None) -> tuple[int, float]:
    """A key by which evaluations are ordered, the best first.

    Those come first that forget at most `bound` percent, by their metric; then the others, by how little they forget. So
    when none keeps to the bound, the best is the one that forgets least.
    """
    value = entry[metric]
    if math.isnan(value):
        return 2, 0.0
    if not keeps(entry, bound):
        return 1, entry[FORGETTING]
    return 0, -value if high_is_good else value


def keeps(entry: Mapping[str, float], bound: float | None) -> bool:
    """Whether an evaluation forgets at most `bound` percent; always without a bound."""
    return bound is None or entry[FORGETTING] <= bound


class BoundedPatience(EarlyStoppingCallback):  # type: ignore[misc]
    """Early stopping to which a model that forgets too much is no better, however good it is."""

    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float | None = 0.0,
        max_forgetting: float = math.inf,
    ):
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.max_forgetting = max_forgetting

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any) -> None:
        if keeps(metrics, self.max_forgetting):
            super().on_evaluate(args, state, control, metrics, **kwargs)
            return
        self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        told: dict[str, Any] = super().state()
        return {**told, "args": {**told["args"], "max_forgetting": self.max_forgetting}}
