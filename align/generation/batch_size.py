"""How many responses are decoded at once: a step of the decoding loop takes a GPU nearly as long for one row as for hundreds."""

from __future__ import annotations

from typing import Any

import torch

from align.engine.distributed import World

SHARE = 8  # an eighth of a GPU's memory is for decoding, beside models, gradients and optimizer states


def decoding_rows(row: int, memory: int | None, at_least: int) -> int:
    """The rows that a device decodes at once where the recipe does not say: the same in every run there.

    Args:
        row: `row_bytes`.
        memory: bytes of the smallest GPU; None on a CPU, which gains little from more rows.
        at_least: the rows on a CPU, and the fewest on a GPU.
    """
    return at_least if memory is None else max(at_least, memory // SHARE // row)


def gpu_bytes(world: World) -> int | None:
    """Memory of the smallest GPU of any rank; None on a CPU."""
    if world.device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(world.device).total_memory
    return -int(world.max(torch.tensor(-memory, device=world.device)))


def row_bytes(config: Any, prompt: int, response: int, width: int) -> int:
    """Bytes that decoding one row takes: keys and values of all layers, the pass over the prompt, and logits in float32.

    The pass keeps a dozen hidden states and three of the feed-forward layer of each prompt token; the choice of a token five
    numbers of each of the vocabulary.
    """
    text = config.get_text_config(decoder=True)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    passes = prompt * (12 * text.hidden_size + 3 * inner) * width
    return int(cache_bytes(config, prompt + response, width) + passes + 5 * text.vocab_size * 4)


def cache_bytes(config: Any, tokens: int, width: int) -> int:
    """Bytes of the keys and values of all layers for `tokens` tokens of a row; 0 for a model without attention."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(
        2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * size * tokens * width
    )
