"""Write a model as a Hugging Face folder, adapters merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from reward_models.bottleneck import BOTTLENECK


def meta_copy(model: nn.Module) -> Any:
    """A model of the same class, configuration and adapter, without storage (on the meta device)."""
    with torch.device("meta"):
        if isinstance(model, PeftModel):
            base = model.get_base_model()
            return get_peft_model(type(base)(base.config), model.peft_config["default"])
        return type(model)(model.config)


def save_weights(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Write these weights, named as in `model`, as a Hugging Face folder.

    An adapter is merged into them, and also saved on its own in `adapter/`; one that cannot be merged is saved instead.
    """
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        return
    if model.peft_type == BOTTLENECK:
        model.save_pretrained(str(folder), state_dict=weights)
        (folder / "README.md").unlink()  # PEFT's card
        return
    merged = filled_copy(model, weights).merge_and_unload()
    base: Any = model.get_base_model()
    if base.can_generate():
        merged.generation_config = base.generation_config  # its end tokens among them
    merged.save_pretrained(folder)
    model.save_pretrained(str(folder / "adapter"), state_dict=weights)


def save_base_weights(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the model beneath an adapter, of these weights named as in `model`, as a Hugging Face folder."""
    base = filled_copy(model, weights).unload()
    base.generation_config = model.get_base_model().generation_config
    base.save_pretrained(folder)


def filled_copy(model: PeftModel, weights: dict[str, Tensor]) -> Any:
    """A copy on the CPU of a model with its adapter, of these weights."""
    full = meta_copy(model).to(next(iter(weights.values())).dtype).to_empty(device="cpu")
    full.get_base_model().tie_weights()
    full.load_state_dict(weights, strict=False)  # tied weights are stored once
    return full
