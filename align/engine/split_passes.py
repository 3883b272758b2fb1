"""The training passes of `align.models.forward` over rows that the processes of a group share, each with a part of every row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align.compat.transformers import attention_implementation
from align.engine.engine import Engine
from align.engine.sequence_parallel import ULYSSES, SequenceGroup
from align.models.forward import all_logits, scatter_to_mask, strip_padding, token_loss
from align.models.lm_head import Objective
from reward_models.heads import hf_model


@contextlib.contextmanager
def split_attention(*engines: Engine) -> Iterator[None]:
    """Inside, also in backward passes, the models compute parts of rows; else whole ones."""
    models = [hf_model(engine.module) for engine in engines]
    before = [attention_implementation(model.config) for model in models]
    for model in models:
        model.set_attn_implementation(ULYSSES)
    try:
        yield
    finally:
        for model, name in zip(models, before, strict=True):
            model.set_attn_implementation(name)


def split_response_loss(
    sequence: SequenceGroup,
    engine: Engine,
    ids: Tensor,
    mask: Tensor,
    length: int,
    temperature: float,
    objective: Objective,
) -> tuple[Tensor, Tensor, Tensor]:
    """`align.models.forward.response_loss`: this process's share of the loss, of the tokens that its part predicts.

    Log-probabilities and entropies [N] are those of all tokens, the same on all processes of the group.
    """
    stripped, indices, tokens = strip_padding(ids, mask, length)
    own, places = sequence.own_places(indices, stripped.shape[1])
    idle = not len(own)  # a token of weight 0, so that every process has a gradient of every weight
    if idle:
        own, places = torch.zeros(2, 1, dtype=torch.int64, device=ids.device)

    def own_objective(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        if idle:
            return 0.0 * logprobs.sum()
        return objective(logprobs, entropy, own[part])  # type: ignore[arg-type]  # an index like a slice

    parts = _Parts(engine, sequence)
    loss, logprobs, entropy = token_loss(parts, stripped, places, tokens[own], temperature, own_objective)
    found = torch.zeros(2, len(tokens), device=ids.device)
    if not idle:
        found[:, own] = torch.stack([logprobs, entropy])
    dist.all_reduce(found, group=sequence.group)
    return loss, found[0], found[1]


def split_response_values(sequence: SequenceGroup, engine: Engine, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """`align.models.forward.response_values`: the same on all processes of the group, each with the gradient of its own."""
    stripped, indices, tokens = strip_padding(ids, mask, length)
    own, places = sequence.own_places(indices, stripped.shape[1])
    mine = all_logits(_Parts(engine, sequence), stripped)[places, 0].float()
    found = torch.zeros(len(tokens), device=ids.device).index_put((own,), mine)
    total = found.detach().clone()
    dist.all_reduce(total, group=sequence.group)
    return scatter_to_mask(total + (found - found.detach()), mask[:, -length:])


class _Parts:
    """An engine that is given whole rows, and computes this process's part of them."""

    def __init__(self, engine: Engine, sequence: SequenceGroup):
        self.engine, self.sequence, self.module = engine, sequence, engine.module

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        return self.engine(**self.sequence.inputs(input_ids, None), use_cache=use_cache)
