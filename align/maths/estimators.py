"""The table of advantage estimators. It imports nothing heavy: recipes are checked by it before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True, slots=True)
class Estimator:
    """The properties of an advantage estimator; its function has the same name in `align.maths.advantages`."""

    value_model: bool = False  # has a value model, which is trained beside the policy
    compares_group: bool = False  # compares the responses to one prompt: needs num_generations of 2 or more
    aggregation: Aggregation = "token_mean"  # of the policy loss, see `align.maths.losses.loss_weights`


ESTIMATORS = {
    "gae": Estimator(value_model=True),
    "rloo": Estimator(compares_group=True),
    "grpo": Estimator(compares_group=True, aggregation="sequence_mean"),
    "dr_grpo": Estimator(compares_group=True, aggregation="constant"),
    "reinforce_plus_plus": Estimator(),
}

# Of objectives of their own, which have their own advantages.
TRAJECTORY_BALANCE = Estimator(compares_group=True, aggregation="constant")
BALANCE_WITH_VALUES = Estimator(value_model=True, aggregation="constant")
