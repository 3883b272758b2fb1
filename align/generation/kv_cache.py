"""A key-value cache that is written in place and grows by blocks: adding a token or dropping a row copies nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

BLOCK = 256  # tokens for which memory is allocated at a time, beyond those of the prompt


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values [B, heads, tokens, head size], views of the front of a larger buffer.

    `DynamicLayer` copies the cache for every token. Here it is copied when it grows, without the rows that have ended.

    Args:
        block: tokens for which memory is allocated beyond those that are there, whenever it runs out.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, block: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.block = block
        self.buffers: list[Tensor] = []
        self.place: Tensor | None = None  # where fixed shapes are wanted: the column of the next token, [1] int64

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin without tokens; `DynamicLayer` copies empty tensors to the device, for each of which Python waits."""
        self.device = key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.place is not None:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, self.place, states)
            return self.buffers[0], self.buffers[1]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if not self.buffers or stop > self.buffers[0].shape[2]:
            cached: list[Tensor] = [self.keys, self.values] if start else []
            self.buffers = [
                states.new_empty(*states.shape[:2], stop + self.block, states.shape[3])
                for states in (key_states, value_states)
            ]
            for buffer, states in zip(self.buffers, cached, strict=False):
                buffer[:, :, :start] = states
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values

    def begin_fixed(self, place: Tensor, width: int) -> None:
        """From now on write one token at a time, at column `place`, and return whole buffers: zeros where none is written yet.

        Args:
            width: columns that are written; there is room for more afterwards.
        """
        if width == self.buffers[0].shape[2]:
            self.buffers = [F.pad(buffer, (0, 0, 0, self.block)) for buffer in self.buffers]
        for buffer in self.buffers:
            buffer[:, :, width:] = 0
        self.place = place
        self.keys, self.values = (buffer[:, :, :-1] for buffer in self.buffers)  # as if one column were left to write

    def end_fixed(self, width: int) -> None:
        """Write at the end of what is there again, the first `width` columns."""
        self.place = None
        self.keys, self.values = (buffer[:, :, :width] for buffer in self.buffers)

    def keep_rows(self, count: int, places: Tensor, sources: Tensor) -> None:
        """Copy the rows `sources` to `places`, [m] indices each; then keep the first `count` rows."""
        stop = self.get_seq_length()
        for buffer in self.buffers if len(places) else []:
            buffer[places, :, :stop] = buffer[sources, :, :stop]
        self.buffers = [buffer[:count] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)

    def join(self, other: PreallocatedLayer, width: int) -> None:
        """Append the rows of `other`; of all rows the last `width` tokens are kept, with zeros on the left of shorter caches."""
        buffers = []
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            shape = len(mine) + len(theirs), mine.shape[1], width + self.block, mine.shape[3]
            buffers.append(buffer := mine.new_empty(shape))
            for rows, states in ((buffer[: len(mine)], mine), (buffer[len(mine) :], theirs)):
                empty = max(0, width - states.shape[2])
                rows[:, :, :empty] = 0
                rows[:, :, empty:width] = states[:, :, states.shape[2] + empty - width :]
        self.buffers = buffers
        self.keys, self.values = (buffer[:, :, :width] for buffer in buffers)


def preallocated_cache(config: PretrainedConfig, length: int) -> DynamicCache:
    """An empty cache for prompts and up to `length` more tokens. Layers of other kinds (sliding windows) are unchanged."""
    cache = DynamicCache(config=config)
    block = min(length, BLOCK)
    cache.layers = [PreallocatedLayer(block) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def compaction_order(alive: Sequence[bool]) -> list[int]:
    """Indices of the alive rows, in the order that moves as few of them as possible.

    Row `order[i]` goes to place i: alive rows within the first `sum(alive)` places stay, the others fill the gaps.
    """
    count = sum(alive)
    behind = (row for row in range(count, len(alive)) if alive[row])
    return [place if alive[place] else next(behind) for place in range(count)]
