"""A key-value cache that is written in place: adding a token or dropping a row copies nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values [B, heads, tokens, head size], views of the front of a larger buffer.

    `DynamicLayer` copies the cache for every token.

    Args:
        capacity: tokens for which memory is allocated, and again whenever more come.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        rows = len(key_states)
        if not self.buffers or stop > self.buffers[0].shape[2]:
            cached: list[Tensor] = [self.keys, self.values] if start else []
            self.buffers = [
                states.new_empty(*states.shape[:2], start + max(self.capacity, key_states.shape[2]), states.shape[3])
                for states in (key_states, value_states)
            ]
            for buffer, states in zip(self.buffers, cached, strict=False):
                buffer[:, :, :start] = states
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, start:stop] = states
        self.keys, self.values = (buffer[:rows, :, :stop] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(1)
        stop = self.get_seq_length()
        for buffer in self.buffers:
            buffer[moved, :, :stop] = buffer[indices[moved], :, :stop]
        self.keys, self.values = (buffer[: len(indices), :, :stop] for buffer in self.buffers)


def preallocated_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """An empty cache for sequences of up to `capacity` tokens. Layers of other kinds (sliding windows) are unchanged."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def compaction_order(alive: Tensor) -> Tensor:
    """Indices [number alive] of the alive rows, in the order that moves as few of them as possible.

    Row `order[i]` goes to place i: alive rows within the first `number alive` places stay, the others fill the gaps.

    Args:
        alive: [B] bool, at least one of them True.
    """
    count = int(alive.sum())
    order = torch.arange(count, device=alive.device)
    order[~alive[:count]] = alive[count:].nonzero().squeeze(1) + count
    return order
