"""What an evaluation of the SFT stage measures, exactly and in one pass: three kinds of rows, told apart by task.

held out    rows that are not trained on, which say how good the model is
retention   rows of what it could do before, which say what it has forgotten
training    as many training rows as are held out (256 at most), which say by how much it does better on what it has seen

All are judged by the same forward pass without noise or dropout, so that their losses can be compared.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from torch.nn.functional import one_hot

from align.data.mixture import MAX_REPORTED_TASKS
from align.data.rows import Demonstration
from align.data.templates import TASK
from align.data.tokenize import IGNORE_INDEX
from align.maths.perplexity import perplexity

HELD_OUT, RETENTION, TRAINING = "held out", "retention", "training"
MOST_TRAINING_ROWS = 256
OTHER = "other"  # the tasks beyond the most frequent ones
PART = "part"  # column, and tensor of a batch: the number of a row's part


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows to measure, with the number of its part in the column `part`, and the kind and task of each part."""

    rows: Dataset
    parts: list[tuple[str, str]]


def measured_rows(
    held_out: tuple[Dataset, Sequence[Demonstration]],
    retention: tuple[Dataset, Sequence[Demonstration]] | None,
    training: Dataset,
    max_length: int,
    seed: int,
) -> Measured:
    """The rows of all kinds.

    Args:
        held_out, retention: rows in token ids, and what they were made of.
        training: rows that are trained on, before packing and without replayed ones.
        max_length: tokens of the longest training row to measure, if no held-out row is longer.
    """
    longest = max(max_length, *map(len, held_out[0]["input_ids"]))
    whole = [index for index, ids in enumerate(training["input_ids"]) if len(ids) <= longest]
    size = min(len(held_out[0]), len(whole), MOST_TRAINING_ROWS)
    sample = training.select(sorted(random.Random(f"{seed} measured").sample(whole, size)))
    sides = [(HELD_OUT, held_out[0], _tasks(held_out[1])), (TRAINING, sample, [""] * size)]
    if retention is not None:
        sides.append((RETENTION, retention[0], _tasks(retention[1])))
    parts = list(dict.fromkeys((side, task) for side, _, tasks in sides for task in tasks))
    numbers = [parts.index((side, task)) for side, _, tasks in sides for task in tasks]
    rows = concatenate_datasets([dataset.select_columns(["input_ids", "labels"]) for _, dataset, _ in sides])
    # Nothing predicts a first token, but for virtual tokens before it: those would be asked for one token more.
    columns = {"input_ids": rows["input_ids"][:], "labels": [[IGNORE_INDEX, *labels[1:]] for labels in rows["labels"]]}
    return Measured(Dataset.from_dict(columns, features=rows.features).add_column(PART, numbers), parts)


def _tasks(rows: Sequence[Demonstration]) -> list[str]:
    tasks = [str(row.extra[TASK]) for row in rows]
    known = {task for task, _ in Counter(tasks).most_common(MAX_REPORTED_TASKS)}
    return [task if task in known else OTHER for task in tasks]


def part_sums(batch: dict[str, Tensor], part: Tensor, parts: int, *values: Tensor) -> Tensor:
    """Sums of per-token values by part, [parts, number of values] float64.

    Args:
        batch: as the collator makes it; with `position_ids` [1, S], its rows lie end to end.
        part: of each row, [m] int64.
        values: of the predicted tokens, each [m, T] and 0 where nothing is to be predicted.
    """
    if "position_ids" in batch:
        rows = (batch["position_ids"][:, 1:] == 0).long().cumsum(dim=1)
        of_token = part[rows]
    else:
        of_token = part[:, None].expand(values[0].shape)
    flat = torch.stack([value.double().flatten() for value in values], dim=1)
    return one_hot(of_token.flatten(), parts).double().T @ flat


def measures(sums: Tensor, parts: Sequence[tuple[str, str]], start: float | None) -> dict[str, float]:
    """The numbers of an evaluation, named as Trainer names them.

    Args:
        sums: of -log p, of tokens ranked first, of their number and of entropies, by part, [parts, 4].
        start: the retention loss before training; None when that is being measured.
    """
    by_side = {side: sum_of(sums, parts, side) for side in (HELD_OUT, RETENTION, TRAINING)}
    nll, correct, count, entropy = by_side[HELD_OUT]
    found = {
        "eval_loss": nll / count,
        "eval_mean_token_accuracy": correct / count,
        "eval_entropy": entropy / count,
    }
    found |= _by_task(sums, parts, HELD_OUT, "eval_")
    nll, correct, count, _ = by_side[RETENTION]
    if count:
        loss = nll / count
        before = loss if start is None else start
        found |= {
            "eval_retention_loss": loss,
            "eval_retention_perplexity": perplexity(loss),
            "eval_retention_token_accuracy": correct / count,
            "eval_forgetting": 100 * (loss / before - 1) if before else math.inf,
        }
        found |= _by_task(sums, parts, RETENTION, "eval_retention/")
    nll, _, count, _ = by_side[TRAINING]
    if count:
        found |= {"eval_train_loss": nll / count, "eval_gap": found["eval_loss"] - nll / count}
    return found


def sum_of(sums: Tensor, parts: Sequence[tuple[str, str]], side: str) -> list[float]:
    """Sums over the parts of one kind."""
    mine = [index for index, (kind, _) in enumerate(parts) if kind == side]
    total: list[float] = sums[mine].sum(dim=0).tolist()
    return total


def _by_task(sums: Tensor, parts: Sequence[tuple[str, str]], side: str, prefix: str) -> dict[str, float]:
    """Loss and accuracy of each task, when there are several."""
    rows = {task: sums[index].tolist() for index, (kind, task) in enumerate(parts) if kind == side}
    found = {}
    for task, (nll, correct, count, _) in rows.items() if len(rows) > 1 else ():
        if count:
            found[f"{prefix}{task}/loss"] = nll / count
            found[f"{prefix}{task}/token_accuracy"] = correct / count
    return found


class PartCollator:
    """A collator that also passes on the part of each row, where rows have one."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        if PART in rows[0]:
            batch[PART] = torch.tensor([row[PART] for row in rows])
        return batch
