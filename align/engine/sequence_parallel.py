"""Sequence parallelism by DeepSpeed's Ulysses (Jacobs et al. 2023, arXiv 2309.14509).

The processes of a group share rows. Each computes its own part of every sequence; before attention they exchange parts of the
sequence for heads, so that each has the whole sequence of its share of the heads, and back after it. All else that a layer
does is done token by token (`align.models.split_sequences` makes sure), so that activations are divided by the group's size.

DeepSpeed's and transformers' own support is not used: it averages the means of microbatches, drops the mask that keeps packed
examples apart under "sdpa", and evaluates on whole sequences. To DeepSpeed and to a Trainer all processes are data parallel
here, which is right for a loss that is a sum over tokens divided by their global number.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from align.compat.transformers import sdpa_attention
from align.engine.distributed import World
from align.models.split_sequences import check_heads

ULYSSES = "ulysses"  # the attention implementation of models whose sequences are split


class SequenceGroup:
    """The processes that share rows with this one: neighbours in rank order, each with one part of every sequence.

    Attributes:
        size: processes of the group, which are the parts of a sequence.
        rank: of this process in it, the number of its part.
        index: of this group among `count` groups.
        group: of torch.distributed.
    """

    def __init__(self, world: World, size: int):
        self.size, self.rank = size, world.rank % size
        self.index, self.count = world.rank // size, world.size // size
        self._mask: Tensor | None = None
        # Every process must take part in making every group.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world.size, size)]
        self.group: Any = groups[self.index]
        AttentionInterface.register(ULYSSES, self._attention)

    def part(self, tensor: Tensor, filler: int) -> Tensor:
        """This process's part of [m, S, ...]: [m, ceil(S / size), ...], filled up on the right."""
        width = -(-tensor.shape[1] // self.size)
        missing = width * self.size - tensor.shape[1]
        whole = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing), value=filler) if missing else tensor
        return whole[:, self.rank * width : (self.rank + 1) * width].contiguous()

    def inputs(self, ids: Tensor, position_ids: Tensor | None) -> dict[str, Tensor]:
        """This process's part of rows, as the arguments of a model; attention is to these rows until the next call.

        The rows are padded on the right, so that no token sees padding.

        Args:
            ids: [m, S] int64, the same on all processes of the group.
            position_ids: [m, S] int64 of rows of several examples, each of which begins at 0.
        """
        if position_ids is None:
            self._mask = None
            position_ids = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        else:
            self._mask = self._packed_mask(position_ids)
        return {"input_ids": self.part(ids, 0), "position_ids": self.part(position_ids, 0)}

    def at(self, part: Tensor, places: Tensor) -> Tensor:
        """The value of each row at one place, from its parts: the same on all processes of the group, [m].

        Each process of the group computes the same loss of them, and gradients are averaged over processes, while that of a
        value reaches one process alone: it is multiplied by the size of the group.

        Args:
            part: this process's part of the values, [m, ceil(S / size)].
            places: in the whole rows, [m] int64.
        """
        width = part.shape[1]
        mine = part[torch.arange(len(part), device=part.device), places % width] * (places // width == self.rank)
        total = mine.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total + self.size * (mine - mine.detach())

    def own_places(self, places: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Which of N places this process has, [n] int64 from 0 to N - 1, and where they are in its part, [n] int64.

        Args:
            places: [N] int64, in the flattened rows [m * length].
            length: of the whole rows.
        """
        width = -(-length // self.size)
        rows, columns = places // length, places % length
        own = (columns // width == self.rank).nonzero().squeeze(1)
        return own, (rows * width + columns % width)[own]

    def _packed_mask(self, position_ids: Tensor) -> Tensor:
        """Which tokens see which, [m, 1, S, S] bool with S filled up: those before in the same example."""
        position_ids = F.pad(position_ids, (0, -position_ids.shape[1] % self.size))
        example = (position_ids == 0).cumsum(dim=1)
        return (example[:, None, :, None] == example[:, None, None, :]).tril()

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention of parts of sequences, each [B, heads, S / size, D] -> [B, S / size, heads, D]."""
        heads, key_heads = query.shape[1], key.shape[1]
        check_heads(heads, key_heads, self.size)
        if key_heads < self.size:  # a copy for each process that has query heads of it
            key, value = (each.repeat_interleave(self.size // key_heads, dim=1) for each in (key, value))
        query, key, value = (self._whole_sequences(each) for each in (query, key, value))
        of_these = SimpleNamespace(
            num_key_value_groups=query.shape[1] // key.shape[1], is_causal=getattr(module, "is_causal", True)
        )
        output, _ = sdpa_attention(of_these, query, key, value, self._mask, **kwargs)  # type: ignore[arg-type]
        return self._all_heads(output), None

    def _whole_sequences(self, part: Tensor) -> Tensor:
        """All heads of a part of the sequences -> a share of the heads of whole sequences, [B, heads, S, D]."""
        rows, heads, width, size = part.shape
        sent = part.view(rows, self.size, heads // self.size, width, size).transpose(0, 1)
        received: Tensor = _Exchange.apply(sent, self.group)  # type: ignore[no-untyped-call]
        return received.permute(1, 2, 0, 3, 4).reshape(rows, heads // self.size, self.size * width, size)

    def _all_heads(self, whole: Tensor) -> Tensor:
        """The reverse, [B, S, heads, D] each."""
        rows, length, heads, size = whole.shape
        sent = whole.view(rows, self.size, length // self.size, heads, size).transpose(0, 1)
        received: Tensor = _Exchange.apply(sent, self.group)  # type: ignore[no-untyped-call]
        return received.permute(1, 2, 0, 3, 4).reshape(rows, length // self.size, self.size * heads, size)


class _Exchange(torch.autograd.Function):
    """Sends entry i of [size, ...] to process i of the group; entry j of the result came from process j."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _exchange(sent, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None  # the transpose of this permutation is itself


def _exchange(sent: Tensor, group: Any) -> Tensor:
    received = torch.empty(sent.shape, dtype=sent.dtype, device=sent.device)
    dist.all_to_all_single(received, sent.contiguous(), group=group)
    return received
