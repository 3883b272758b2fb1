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

from align.compat.transformers import CACHE_ARGUMENTS, is_linear_attention, keeps_exact_cache, known_rows
from align.engine.engine import Engine
from align.generation.kv_cache import PreallocatedLayer, preallocated_cache
from align.models.forward import position_ids, to_device
from reward_models.heads import hf_model


class Decoder(Protocol):
    """Holds B rows of tokens, and runs the model on them."""

    def logits(self) -> Tensor:
        """Logits [B, V] of the token after each row, by one forward pass. Calling it again is one more pass."""

    def append(self, tokens: Tensor) -> None:
        """Append tokens [B] to the rows."""

    def keep(self, order: Sequence[int], index: Tensor) -> None:
        """Keep the rows `order`, b indices below B, in this order; `index` [b] is the same on the device."""


def decoder(model: nn.Module | Engine, prompt_ids: Tensor, prompt_mask: Tensor, length: int) -> Decoder:
    """A decoder of up to `length` tokens after prompts [B, Q], which are padded on the left."""
    inner = hf_model(model.module if isinstance(model, Engine) else model)
    parameters = inspect.signature(inner.forward).parameters
    if not keeps_exact_cache(inner.config):
        return WholeRows(model, "logits_to_keep" in parameters, prompt_ids, prompt_mask, length)
    name = next((name for name in parameters if name in CACHE_ARGUMENTS), "past_key_values")
    return Cached(model, name, preallocated_cache(inner.config, length), prompt_ids, prompt_mask, length)


class Cached:
    """Runs the model on the last token of each row, and on whole prompts in its first pass."""

    def __init__(self, model: Any, cache_name: str, cache: Any, prompt_ids: Tensor, prompt_mask: Tensor, length: int):
        self.model = model
        self.cache_name, self.cache = cache_name, cache
        self.ids, self.positions = prompt_ids, position_ids(prompt_mask)
        self.mask = F.pad(prompt_mask.long(), (0, length), value=1)  # [B, Q + T], of which a pass reads the front
        self.width = prompt_ids.shape[1]
        self.padded: list[bool] = (~prompt_mask[:, 0]).tolist()
        self.recurrent = all(cache.is_linear)
        self.started = False

    def logits(self) -> Tensor:
        if self.started:
            self.width += 1
        # A model of recurrent layers alone applies its mask to the tokens that it is given.
        mask = None if self.recurrent and self.started else self.mask[:, : self.width]
        with known_rows(padded=any(self.padded)):
            output = self.model(
                input_ids=self.ids,
                attention_mask=mask,
                position_ids=self.positions,
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_name: self.cache},
            )
        self.positions, self.started = self.positions[:, -1:] + 1, True
        logits: Tensor = output.logits[:, -1]
        return logits

    def append(self, tokens: Tensor) -> None:
        self.ids = tokens[:, None]

    def keep(self, order: Sequence[int], index: Tensor) -> None:
        moved = [place for place, row in enumerate(order) if place != row]
        places = to_device(torch.tensor(moved, dtype=torch.int64), index.device)
        sources = index[places]
        for layer in self.cache.layers:  # layers of both kinds in one inherit a `batch_select_indices` for one of them
            if isinstance(layer, PreallocatedLayer):
                layer.keep_rows(len(order), places, sources)
            else:
                (layer.reorder_cache if is_linear_attention(layer) else layer.batch_select_indices)(index)
        self.ids, self.mask, self.positions = self.ids[index], self.mask[index], self.positions[index]
        self.padded = [self.padded[row] for row in order]


class WholeRows:
    """Runs the model on whole rows without a cache: exact for every causal model, at the cost of the rows' lengths."""

    def __init__(self, model: Any, selects_logits: bool, prompt_ids: Tensor, prompt_mask: Tensor, length: int):
        self.model, self.selects_logits = model, selects_logits
        self.sizes = prompt_mask.sum(dim=1)  # [B] tokens of each row
        columns = torch.arange(int(self.sizes.max()) + length, device=prompt_ids.device)
        self.ids = prompt_ids.new_zeros(len(prompt_ids), len(columns))
        self.ids[columns < self.sizes[:, None]] = prompt_ids[prompt_mask]

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
