"""The evaluation of the SFT stage, exact and in one pass over three splits:

held out    rows that are not trained on: how good the model is
retention   rows of what the base model could do: what it has forgotten
training    a sample of the training rows, as many as are held out (at most 256): how much better it is on what it has seen

All go through the same forward pass, without NEFTune noise or dropout, so their losses are comparable. Rows are numbered
by group, a pair of split and task; sums are kept per group.
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
MAX_TRAINING_ROWS = 256
OTHER = "other"  # all tasks but the most frequent ones
GROUP = "group"  # the column, and the tensor of a batch, with the number of each row's group


@dataclass(frozen=True, slots=True)
class EvalRows:
    """Rows to evaluate on, with the column `group`, and the (split, task) of each group."""

    rows: Dataset
    groups: list[tuple[str, str]]


def build_eval_rows(
    held_out: tuple[Dataset, Sequence[Demonstration]],
    retention: tuple[Dataset, Sequence[Demonstration]] | None,
    training: Dataset,
    max_length: int,
    seed: int,
    first_is_predicted: bool = False,
) -> EvalRows:
    """Concatenate the rows of the three splits.

    Args:
        held_out, retention: rows in token ids, and the demonstrations they were made from.
        training: the training rows, before packing and without replayed ones.
        max_length: training rows with more tokens are left out, unless a held-out row is as long.
        first_is_predicted: whether the first label counts, as in an encoder-decoder; in a decoder nothing predicts it.
    """
    longest = max(max_length, *map(len, held_out[0]["input_ids"]))
    short_enough = [index for index, ids in enumerate(training["input_ids"]) if len(ids) <= longest]
    size = min(len(held_out[0]), len(short_enough), MAX_TRAINING_ROWS)
    sample = training.select(sorted(random.Random(f"{seed} measured").sample(short_enough, size)))
    splits = [(HELD_OUT, held_out[0], _tasks(held_out[1])), (TRAINING, sample, [""] * size)]
    if retention is not None:
        splits.append((RETENTION, retention[0], _tasks(retention[1])))
    groups = list(dict.fromkeys((split, task) for split, _, tasks in splits for task in tasks))
    numbers = [groups.index((split, task)) for split, _, tasks in splits for task in tasks]
    rows = concatenate_datasets([dataset.select_columns(["input_ids", "labels"]) for _, dataset, _ in splits])
    if first_is_predicted:
        return EvalRows(rows.add_column(GROUP, numbers), groups)
    # The first token has no prediction, except after virtual tokens: leave it out for these too.
    columns = {"input_ids": rows["input_ids"][:], "labels": [[IGNORE_INDEX, *labels[1:]] for labels in rows["labels"]]}
    return EvalRows(Dataset.from_dict(columns, features=rows.features).add_column(GROUP, numbers), groups)


def _tasks(rows: Sequence[Demonstration]) -> list[str]:
    tasks = [str(row.extra[TASK]) for row in rows]
    frequent = {task for task, _ in Counter(tasks).most_common(MAX_REPORTED_TASKS)}
    return [task if task in frequent else OTHER for task in tasks]


def groups_of_tokens(batch: dict[str, Tensor], group: Tensor, width: int) -> Tensor:
    """The group of each predicted token, [m, T] int64.

    Args:
        batch: as the collator makes it; with `position_ids` [1, T + 1] it is padding-free.
        group: of each row, [m] int64.
        width: T, which is more than the batch has with virtual tokens.
    """
    if "position_ids" in batch:
        row_of_token = (batch["position_ids"][:, 1:] == 0).long().cumsum(dim=1)
        return group[row_of_token]
    return group[:, None].expand(-1, width)


def group_sums(group_of_token: Tensor, num_groups: int, *values: Tensor) -> Tensor:
    """Sums of per-token values by group, [num_groups, number of values] float64.

    Args:
        group_of_token: [m, T] int64.
        values: of the predicted tokens, each [m, T] and 0 where the loss ignores the token.
    """
    flat = torch.stack([value.double().flatten() for value in values], dim=1)
    return one_hot(group_of_token.flatten(), num_groups).double().T @ flat


def metrics_from_sums(
    sums: Tensor, groups: Sequence[tuple[str, str]], initial_retention_loss: float | None
) -> dict[str, float]:
    """The metrics of an evaluation, under Trainer's names.

    Args:
        sums: of -log p, of tokens ranked first, of their number and of entropies, by group, [groups, 4].
        initial_retention_loss: nats per token before training; None in the evaluation that measures it.
    """
    nll, correct, count, entropy = _split_sums(sums, groups, HELD_OUT)
    metrics = {
        "eval_loss": nll / count,
        "eval_mean_token_accuracy": correct / count,
        "eval_entropy": entropy / count,
    }
    metrics |= _task_metrics(sums, groups, HELD_OUT, "eval_")
    nll, correct, count, _ = _split_sums(sums, groups, RETENTION)
    if count:
        loss = nll / count
        initial = loss if initial_retention_loss is None else initial_retention_loss
        metrics |= {
            "eval_retention_loss": loss,
            "eval_retention_perplexity": perplexity(loss),
            "eval_retention_token_accuracy": correct / count,
            "eval_forgetting": 100 * (loss / initial - 1) if initial else math.inf,
        }
        metrics |= _task_metrics(sums, groups, RETENTION, "eval_retention/")
    nll, _, count, _ = _split_sums(sums, groups, TRAINING)
    if count:
        metrics |= {"eval_train_loss": nll / count, "eval_gap": metrics["eval_loss"] - nll / count}
    return metrics


def _split_sums(sums: Tensor, groups: Sequence[tuple[str, str]], split: str) -> list[float]:
    """Sums over the groups of one split."""
    mine = [index for index, (each, _) in enumerate(groups) if each == split]
    total: list[float] = sums[mine].sum(dim=0).tolist()
    return total


def _task_metrics(sums: Tensor, groups: Sequence[tuple[str, str]], split: str, prefix: str) -> dict[str, float]:
    """Loss and accuracy of each task of the split, if it has several."""
    rows = {task: sums[index].tolist() for index, (each, task) in enumerate(groups) if each == split}
    metrics = {}
    for task, (nll, correct, count, _) in rows.items() if len(rows) > 1 else ():
        if count:
            metrics[f"{prefix}{task}/loss"] = nll / count
            metrics[f"{prefix}{task}/token_accuracy"] = correct / count
    return metrics


class GroupCollator:
    """Wraps a collator to pass on the group of each row, if rows have one."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        if GROUP in rows[0]:
            batch[GROUP] = torch.tensor([row[GROUP] for row in rows])
        return batch
