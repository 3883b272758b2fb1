"""Labels that are not equally frequent: weights of the loss by label, and an order of rows that draws all labels equally often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from align.config.convert import key_text
from align.config.encoders import ClassifyRecipe
from align.encoders.labels import SHOWN, SINGLE, LabelSet
from align.errors import UserError, nearest


def check_imbalance(recipe: ClassifyRecipe, label_set: LabelSet) -> None:
    """Check `class_weights` and `balanced_sampling` against the labels of the training rows.

    Raises:
        UserError: rows that do not have one label each, weights of labels that no row has, or labels without a weight.
    """
    for name in ("class_weights", "balanced_sampling"):
        if getattr(recipe, name) and label_set.problem_type != SINGLE:
            raise UserError(
                f"{name}: is for rows with one label each, and these are of problem_type: {label_set.problem_type}; leave it out"
            )
    if isinstance(recipe.class_weights, Mapping):
        known = [key_text(label) for label in label_set.ids]
        for name in recipe.class_weights:
            if name not in known:
                raise UserError(
                    f"class_weights.{name}: no training row has this label{nearest(name, known)}; they have {_few(known)}"
                )
        if missing := [name for name in known if name not in recipe.class_weights]:
            raise UserError(f"class_weights: no weight of {_few(missing)}; give one for each label, or write balanced")


def class_weights(
    setting: Literal["balanced"] | Mapping[Any, float] | None, label_set: LabelSet, labels: Sequence[int]
) -> list[float] | None:
    """The weight of the loss of each label, in the order of ids; None if all count the same.

    Args:
        setting: a weight by label, or balanced: rows / (labels * rows of the label), as in scikit-learn.
        labels: of the training rows.
    """
    if setting is None:
        return None
    if setting == "balanced":
        found = Counter(labels)
        return [len(labels) / (len(label_set.names) * max(found[index], 1)) for index in range(len(label_set.names))]
    return [setting[key_text(label)] for label, _ in sorted(label_set.ids.items(), key=lambda item: item[1])]


def describe_imbalance(label_set: LabelSet) -> str:
    """What choosing the commonest label would give, and how much rarer the rarest is."""
    most, least = max(label_set.frequency), min(label_set.frequency)
    return (
        f"always choosing the commonest label is right in {most / sum(label_set.frequency):.1%} of the training rows, and it has "
        f"{most / least:.3g} times the rows of the rarest"
    )


class BalancedSampler(Sampler[int]):
    """Draws every label equally often, to within one row an epoch; the rows of a label take turns.

    A rare label's rows repeat within an epoch, a frequent one's are all drawn over several. The order depends on seed and
    epoch alone: the same on any number of ranks, and after a resume.

    Args:
        labels: ids of the rows to draw from, the first of the data set.
        size: draws an epoch.
    """

    def __init__(self, labels: Sequence[int], size: int, seed: int):
        self.rows = {label: np.flatnonzero(np.asarray(labels) == label) for label in sorted(set(labels))}
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        first, count = self.epoch * self.size, len(self.rows)
        drawn: list[int] = []
        for place, (label, rows) in enumerate(self.rows.items()):
            # the label's draws among those of all epochs in a row, of which it has every `count`-th
            begin, end = ((draw - place + count - 1) // count for draw in (first, first + self.size))
            for draw in range(begin, end):
                if draw == begin or draw % len(rows) == 0:
                    order = np.random.default_rng([self.seed, label, draw // len(rows)]).permutation(rows)
                drawn.append(int(order[draw % len(rows)]))
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(drawn).tolist())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
