"""Logits of the next token of every row, step by step, by the way that is exact for the model's architecture.

With a cache where decoding with it gives what a forward pass over the whole row gives, with left padding and when rows
are dropped: attention of every kind, and the recurrent layers in `align.compat.transformers.EXACT_RECURRENT`. Otherwise
(RWKV, RecurrentGemma, Zamba, ...) each step is a forward pass over whole rows, padded on the right, as in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from align.compat.transformers import CACHE_ARGUMENTS, is_linear_attention, keeps_exact_cache, known_rows
from align.engine.engine import Engine
from align.generation.kv_cache import PreallocatedLayer, preallocated_cache
from align.models.forward import position_ids, to_device
from reward_models.heads import hf_model


class Decoder(Protocol):
    """Holds B rows of tokens, at first none, and runs the model on them.

    Attributes:
        joins: whether rows can be added to others.
    """

    joins: bool

    def admit(self, prompt_ids: Tensor, prompt_mask: Tensor, sizes: Sequence[int]) -> Tensor:
        """Add n rows behind the others by one forward pass over their prompts.

        Args:
            prompt_ids, prompt_mask: [n, Q], padded on the left.
            sizes: real tokens of each prompt.

        Returns:
            logits [n, V] of the token after each new row; `append` then takes one for each of them.
        """

    def logits(self) -> Tensor:
        """Logits [B, V] of the token after each row, by one forward pass. Calling it again is one more pass."""

    def append(self, tokens: Tensor) -> None:
        """Append tokens to the last rows, as many as there are tokens."""

    def keep(self, order: Sequence[int], index: Tensor) -> None:
        """Keep the rows `order`, b indices below B, in this order; `index` [b] is the same on the device."""


def decoder(model: nn.Module | Engine, length: int) -> Decoder:
    """A decoder of up to `length` tokens after each prompt."""
    inner = hf_model(model.module if isinstance(model, Engine) else model)
    parameters = inspect.signature(inner.forward).parameters
    if not keeps_exact_cache(inner.config):
        return WholeRows(model, "logits_to_keep" in parameters, length)
    name = next((name for name in parameters if name in CACHE_ARGUMENTS), "past_key_values")
    return Cached(model, name, inner.config, length)


class Cached:
    """Runs the model on the last token of each row, after a first pass over its prompt."""

    ids: Tensor  # [B, 1], the last token of each row
    positions: Tensor  # [B, 1], of that token
    mask: Tensor  # [B, W + T], of which a pass reads the front

    def __init__(self, model: Any, cache_name: str, config: PretrainedConfig, length: int):
        self.model, self.cache_name, self.config, self.length = model, cache_name, config, length
        self.cache: Any = preallocated_cache(config, length)
        self.joins = all(isinstance(layer, PreallocatedLayer) for layer in self.cache.layers)
        self.recurrent = all(self.cache.is_linear)
        self.sizes: list[int] = []  # real tokens of each row
        self.width = 0  # columns that the rows share

    def admit(self, prompt_ids: Tensor, prompt_mask: Tensor, sizes: Sequence[int]) -> Tensor:
        cache, width = preallocated_cache(self.config, self.length), prompt_ids.shape[1]
        positions = position_ids(prompt_mask)
        logits = self.run_model(cache, prompt_ids, prompt_mask.long(), positions, min(sizes) < width)
        if not self.sizes:
            self.cache, self.width, self.sizes = cache, width, list(sizes)
            self.positions = positions[:, -1:]
            self.mask = F.pad(prompt_mask.long(), (0, self.length), value=1)
            return logits
        self.sizes += sizes
        virtual = cache.get_seq_length() - width  # tokens that the model puts before each row
        self.width = max(self.sizes)
        for mine, new in zip(self.cache.layers, cache.layers, strict=True):
            mine.join(new, self.width + virtual)
        self.positions = torch.cat([self.positions, positions[:, -1:]])
        columns = torch.arange(self.width + self.length, device=prompt_ids.device)
        padding = to_device(self.width - torch.tensor(self.sizes), prompt_ids.device)
        self.mask = (columns >= padding[:, None]).long()
        return logits

    def logits(self) -> Tensor:
        self.width += 1
        self.sizes = [size + 1 for size in self.sizes]
        self.positions = self.positions + 1
        # A model of recurrent layers alone applies its mask to the tokens that it is given.
        mask = None if self.recurrent else self.mask[:, : self.width]
        return self.run_model(self.cache, self.ids, mask, self.positions, min(self.sizes) < self.width)

    def run_model(self, cache: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, padded: bool) -> Tensor:
        with known_rows(padded=padded):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_name: cache},
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def append(self, tokens: Tensor) -> None:
        others = len(self.sizes) - len(tokens)
        self.ids = torch.cat([self.ids, tokens[:, None]]) if others else tokens[:, None]

    def keep(self, order: Sequence[int], index: Tensor) -> None:
        self.sizes = [self.sizes[row] for row in order]
        if not order:
            return  # `admit` begins anew
        moved = [place for place, row in enumerate(order) if place != row]
        places = to_device(torch.tensor(moved, dtype=torch.int64), index.device)
        sources = index[places]
        for layer in self.cache.layers:  # layers of both kinds in one inherit a `batch_select_indices` for one of them
            if isinstance(layer, PreallocatedLayer):
                layer.keep_rows(len(order), places, sources)
            else:
                (layer.reorder_cache if is_linear_attention(layer) else layer.batch_select_indices)(index)
        self.ids, self.mask, self.positions = self.ids[index], self.mask[index], self.positions[index]


class WholeRows:
    """Runs the model on whole rows without a cache: exact for every causal model, at the cost of the rows' lengths."""

    joins = False
    ids: Tensor  # [B, W + T], padded on the right
    sizes: Tensor  # [B] tokens of each row

    def __init__(self, model: Any, selects_logits: bool, length: int):
        self.model, self.selects_logits, self.length = model, selects_logits, length

    def admit(self, prompt_ids: Tensor, prompt_mask: Tensor, sizes: Sequence[int]) -> Tensor:
        self.sizes = prompt_mask.sum(dim=1)
        columns = torch.arange(max(sizes) + self.length, device=prompt_ids.device)
        self.ids = prompt_ids.new_zeros(len(prompt_ids), len(columns))
        self.ids[columns < self.sizes[:, None]] = prompt_ids[prompt_mask]
        return self.logits()

    def logits(self) -> Tensor:
        last, place = torch.unique(self.sizes - 1, return_inverse=True)
        selected = {"logits_to_keep": last} if self.selects_logits else {}
        output = self.model(input_ids=self.ids[:, : int(self.sizes.max())], use_cache=False, **selected)
        logits: Tensor = output.logits
        return logits[torch.arange(len(logits), device=logits.device), place if selected else self.sizes - 1]

    def append(self, tokens: Tensor) -> None:
        self.ids.scatter_(1, self.sizes[:, None], tokens[:, None])
        self.sizes = self.sizes + 1

    def keep(self, order: Sequence[int], index: Tensor) -> None:
        self.ids, self.sizes = self.ids[index], self.sizes[index]
