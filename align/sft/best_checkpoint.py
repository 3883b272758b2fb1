"""The choice of the best checkpoint among those within `max_forgetting`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import EarlyStoppingCallback

FORGETTING = "eval_forgetting"


def within_bound(entry: Mapping[str, float], max_forgetting: float | None) -> bool:
    """Whether an evaluation log shows at most `max_forgetting` percent forgetting; always true without a bound."""
    return max_forgetting is None or entry[FORGETTING] <= max_forgetting


def rank_key(
    entry: Mapping[str, float], metric: str, greater_is_better: bool, max_forgetting: float | None
) -> tuple[int, float]:
    """A sort key for evaluation logs that puts the best first.

    Logs within `max_forgetting` come first, ordered by `metric`; then the others, ordered by how little they forget; then
    those whose metric is NaN. So if none is within the bound, the best is the one that forgets least.
    """
    value = entry[metric]
    if math.isnan(value):
        return 2, 0.0
    if not within_bound(entry, max_forgetting):
        return 1, entry[FORGETTING]
    return 0, -value if greater_is_better else value


class BoundedEarlyStopping(EarlyStoppingCallback):
    """Early stopping that counts every evaluation beyond `max_forgetting` as no improvement."""

    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float | None = 0.0,
        max_forgetting: float = math.inf,
    ):
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.max_forgetting = max_forgetting

    def on_evaluate(  # type: ignore[override]  # as EarlyStoppingCallback has it
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any
    ) -> None:
        if within_bound(metrics, self.max_forgetting):
            super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]
            return
        self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        saved: dict[str, Any] = super().state()
        return {**saved, "args": {**saved["args"], "max_forgetting": self.max_forgetting}}
