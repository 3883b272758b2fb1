"""The order of rows, packing, and padding rows that make batches even."""

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
    """Draws `size` prompts in a new seeded order each epoch; where it stands is a function of the update alone."""

    size: int
    seed: int

    def batch(self, update: int, rollout_batch_size: int) -> list[int]:
        """Indexes of the global batch of `update` (from 0). A batch may run over the end of an epoch into the next."""
        first = update * rollout_batch_size
        places = range(first, first + rollout_batch_size)
        orders = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(self.size)
            for epoch in range(first // self.size, places[-1] // self.size + 1)
        }
        return [int(orders[place // self.size][place % self.size]) for place in places]


def pack(dataset: Dataset, length: int) -> Dataset:
    """Rows of at most `length` tokens that hold several examples each, their lengths in `seq_lengths`.

    The longest examples go first, each to where it leaves the least room (best fit decreasing). Examples stay whole, apart
    from those over `length`, which are cut into pieces.
    """
    return pack_dataset(dataset, length, "bfd_split", {"batch_size": None})


def pad_to_batches(dataset: Dataset, batch_size: int) -> Dataset:
    """Append rows without weight until `batch_size` divides the count, so that samplers repeat and drop no real row.

    Such a row has the weight 0, where rows have weights; in SFT it has no label; in a preference it is chosen and
    rejected at once, which has no gradient.
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
    weightless = {name: [value] * missing for name, value in row.items()}
    return concatenate_datasets([dataset, Dataset.from_dict(weightless, features=dataset.features)])


class ResumableLengthGroupedSampler(Sampler[int]):
    """transformers' order by length, as a function of seed and epoch alone, so that a resumed run finds its place."""

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
