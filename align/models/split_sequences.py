"""Whether a model computes the parts of a sequence as it computes the whole; tried on a small model of its configuration.

With sequence parallelism a process has one part of every sequence, and attention alone sees the others, by its causal mask and
nothing else. That is exact for models that mix tokens in attention only, which they compute through transformers' interface.
Others attend within a window or a chunk, add a bias, carry a recurrent state, convolve over tokens or ignore position ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from align.compat.transformers import attention_implementation, sdpa_attention
from align.errors import UserError, reason
from align.models.packing import TOLERANCE, VOCABULARY, example_rows
from align.models.small_model import small_model

KEY = "sequence_parallel_size"
LENGTH, CUT = 12, 7  # tokens of a row, more than the windows of small models, and of its first part


@torch.no_grad()
def check_splits(config: PretrainedConfig, size: int, trust_remote_code: bool = False) -> None:
    """Check that a model of this configuration can have its sequences split over `size` processes.

    Raises:
        UserError: it cannot, or it cannot be tried.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int):
        check_heads(heads, getattr(text, "num_key_value_heads", None) or heads, size)
    try:
        model = small_model(config, VOCABULARY, trust_remote_code=trust_remote_code)
        gap = max(_mask_gap(model), _parts_gap(model))
    except Exception as error:  # of any architecture that does not compute attention by the interface
        why = f"cannot have its sequences split: {reason(error)}"
    else:
        if gap <= TOLERANCE:
            return
        why = (
            f"gets log-probabilities that are off by up to {gap:.2g} nats when sequences are split, as it sees other tokens than "
            "by causal attention alone"
        )
    raise UserError(
        f"{KEY}: a model of type {config.model_type} {why} (tried on a small random model); leave {KEY} out."
    )


def check_heads(heads: int, key_heads: int, size: int) -> None:
    """Check that heads can be shared out evenly, as in DeepSpeed.

    Raises:
        UserError: they cannot.
    """
    if heads % size or (key_heads % size and size % key_heads):
        fits = [n for n in range(2, heads + 1) if heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)]
        use = f"use {' or '.join(map(str, fits))}, or leave it out" if fits else "leave it out"
        raise UserError(
            f"{KEY}: the model has {heads} attention heads, {key_heads} of keys and values, which {size} "
            f"processes cannot share evenly; {use}."
        )


def _mask_gap(model: PreTrainedModel) -> float:
    """Largest difference between the model's own attention and causal attention, in any log-probability, nats."""
    ids = _ids()
    own = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    _set_attention(model, "causal", _causal)
    return float((model(**_part(ids, 0, LENGTH)).logits.log_softmax(-1) - own).abs().max())


def _parts_gap(model: PreTrainedModel) -> float:
    """Largest difference between a row and its parts, where attention gives each token something of its own alone, nats."""
    ids = _ids()
    _set_attention(model, "of_one_token", _of_one_token)
    whole = model(**_part(ids, 0, LENGTH)).logits
    parts = torch.cat([model(**_part(ids, *span)).logits for span in ((0, CUT), (CUT, LENGTH))], dim=1)
    return float((whole.log_softmax(-1) - parts.log_softmax(-1)).abs().max())


def _ids() -> Tensor:
    return torch.tensor(example_rows((LENGTH,), VOCABULARY))


def _part(ids: Tensor, start: int, end: int) -> dict[str, Any]:
    return {"input_ids": ids[:, start:end], "position_ids": torch.arange(start, end)[None], "use_cache": False}


def _set_attention(model: PreTrainedModel, name: str, attention: Any) -> None:
    AttentionInterface.register(name, attention)
    model.set_attn_implementation(name)
    if attention_implementation(model.config) != name:
        raise ValueError("it does not compute attention by transformers' AttentionInterface")


def _causal(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return sdpa_attention(module, query, key, value, None, **kwargs)


def _of_one_token(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Values scaled by queries and keys of the same token, which its position has rotated."""
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    return (value * (query + key).mean(dim=-1, keepdim=True)).transpose(1, 2), None
