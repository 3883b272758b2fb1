"""A Hugging Face folder from weights, adapters merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn


def skeleton(model: nn.Module) -> Any:
    """A model of the same class, configuration and adapter, with shapes and no storage."""
    with torch.device("meta"):
        if isinstance(model, PeftModel):
            base = model.get_base_model()
            return get_peft_model(type(base)(base.config), model.peft_config["default"])
        return type(model)(model.config)


def save_weights(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a Hugging Face folder with these weights, under the names of `model`.

    An adapter is merged into them, and saved as such in `adapter/`.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        return
    whole = skeleton(model).to(next(iter(weights.values())).dtype).to_empty(device="cpu")
    whole.get_base_model().tie_weights()
    whole.load_state_dict(weights, strict=False)  # tied weights are there once
    whole.merge_and_unload().save_pretrained(folder)
    model.save_pretrained(folder / "adapter", state_dict=weights)
