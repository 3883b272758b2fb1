"""A key-value cache for generation that is written in place: nothing is copied to add a token or to drop a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [B, heads, tokens so far, head size], at the front of a buffer with room for more.

    transformers' own layer copies the whole cache for every token.

    Args:
        room: tokens that the buffer takes; it is made anew, with as much room again, when more come.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        rows = len(key_states)
        if not self.buffers or stop > self.buffers[0].shape[2]:
            held: list[Tensor] = [self.keys, self.values] if start else []
            self.buffers = [
                states.new_empty(*states.shape[:2], start + max(self.room, key_states.shape[2]), states.shape[3])
                for states in (key_states, value_states)
            ]
            for buffer, states in zip(self.buffers, held, strict=False):
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


def roomy_cache(config: PretrainedConfig, room: int) -> DynamicCache:
    """An empty cache for sequences of up to `room` tokens. Layers of another kind (sliding windows) stay transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def closed_ranks(alive: Tensor) -> Tensor:
    """Which row to put in each place so that the rows that are alive come first, and as few as possible move.

    Args:
        alive: [B] bool, at least one of them True.
    """
    count = int(alive.sum())
    order = torch.arange(count, device=alive.device)
    order[~alive[:count]] = alive[count:].nonzero().squeeze(1) + count
    return order
