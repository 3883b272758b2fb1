"""Settings of a configuration that change what a forward pass returns: neutral while a stage runs, the base's when it saves.

With them, transformers' own models fail to generate from a batch (`output_router_logits`), or return tuples (`return_dict`).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

NEUTRAL = {"return_dict": True, "output_router_logits": False}


def set_neutral(model: PreTrainedModel) -> None:
    """Set the options on which the forward passes of all stages rely."""
    for config in (model.config, model.config.get_text_config()):
        for name, value in NEUTRAL.items():
            if hasattr(config, name):
                setattr(config, name, value)


def restore(saved: dict[str, Any], base: dict[str, Any]) -> None:
    """Give a saved `config.json` these settings of the base's, in the text model's part of either too."""
    text: dict[str, Any] = base.get("text_config") or base
    for config in (saved, saved.get("text_config") or {}):
        for name in NEUTRAL:
            if name in text:
                config[name] = text[name]
            else:
                config.pop(name, None)
