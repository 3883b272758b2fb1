"""Mean and variance of a stream of numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all numbers so far, merged batch by batch (Chan et al. 1983)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 0 before the first number."""
        return (self.squares / self.count) ** 0.5 if self.count else 0.0

    def include(self, values: Tensor) -> RunningMoments:
        """The moments with `values`, of any shape, added to the stream."""
        values = values.double()
        count, mean = values.numel(), float(values.mean())
        total, shift = self.count + count, mean - self.mean
        return RunningMoments(
            count=total,
            mean=self.mean + shift * count / total,
            squares=self.squares + float(((values - mean) ** 2).sum()) + shift**2 * self.count * count / total,
        )
