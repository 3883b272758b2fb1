"""Sizes in a model's configuration, and the largest that are built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.config.convert import shown
from align.errors import UserError

# Largest accepted sizes in a configuration; larger models could not be built in reasonable time or memory.
_LAYERS, _HEADS, _WIDTH, _LENGTH = 10_000, 2**16, 2**20, 2**28
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "head_dim", "embedding_size"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "hidden_dim"), _WIDTH),
    "num_labels": 1_000_000,
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), _LENGTH),
}


def check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Check the sizes in a model's configuration, those of a text model inside it too.

    Raises:
        UserError: one is no whole number, below 1 or absurd.
    """
    for name, largest in SIZES.items():
        value = config.get(name)
        if value is None or isinstance(value, list):  # one for each layer
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise UserError(f"{where}: {name}: expected a whole number from 1 to {largest:,}, got {shown(value)}")
    if isinstance(config.get("text_config"), dict):
        check_sizes(config["text_config"], f"{where}: text_config")
