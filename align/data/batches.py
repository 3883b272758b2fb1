"""The order of rows, packing, and padding rows that fill the last batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import pack_dataset

from align.data.tokenize import IGNORE_INDEX


@dataclass(frozen=True, slots=True)
class PromptLoader:
    """A new seeded order of `size` prompts each epoch. Stateless: the update number alone gives the batch."""

    size: int
    seed: int

    def batch(self, update: int, rollout_batch_size: int) -> list[int]:
        """Indices of the global batch of `update` (counted from 0). A batch may span the end of an epoch."""
        first = update * rollout_batch_size
        places = range(first, first + rollout_batch_size)
        orders = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(self.size)
            for epoch in range(first // self.size, places[-1] // self.size + 1)
        }
        return [int(orders[place // self.size][place % self.size]) for place in places]


def pack(dataset: Dataset, length: int) -> Dataset:
    """Pack examples into rows of at most `length` tokens by best-fit decreasing; `seq_lengths` holds their lengths.

    Examples are not split, except those longer than `length`, which are cut into pieces.
    """
    return pack_dataset(dataset, length, "bfd_split", {"batch_size": None})


def pad_to_batches(dataset: Dataset, batch_size: int) -> Dataset:
    """Append rows that do not contribute until `batch_size` divides their number, so that samplers repeat or drop none.

    Such a row has weight 0 if rows have weights, no labels in SFT, and equal chosen and rejected ids in a preference,
    whose gradient is 0.
    """
    missing = -len(dataset) % batch_size
    if missing == 0:
        return dataset
    row = dict(dataset[0])
    if "weight" in row:
        row["weight"] = 0
    elif "labels" in row:
        row["labels"] = [IGNORE_INDEX] * len(row["labels"])
    else:
        row["rejected_ids"] = row["chosen_ids"]
        row |= {name: 0.0 for name in ("margin", "tie") if name in row}
    weightless = {name: [value] * missing for name, value in row.items()}
    return concatenate_datasets([dataset, Dataset.from_dict(weightless, features=dataset.features)])


class ResumableLengthGroupedSampler(Sampler[int]):
    """transformers' grouping by length, with an order that depends on seed and epoch alone, so that a run can resume."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
