"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247) in a model that is used.

A folder holds `adapter_config.json` with peft_type BOTTLENECK and `adapter_model.safetensors`, named as PEFT names them:
the blocks, and beside them the modules that were trained whole, such as a head. An adapter is not linear, so no weights
of the base model equal it: the model is loaded with its blocks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from reward_models.stored_head import ADAPTED, ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG

BOTTLENECK = "BOTTLENECK"  # as `peft_type`
PREFIX = "bottleneck_"  # of the names of a block's layers, by which PEFT finds its weights
BLOCK = ("down.weight", "down.bias", "up.weight", "up.bias")
POOLER = "pooler"  # a layer of the backbone's that only some heads read
FIRST = f".{PREFIX}{BLOCK[0]}"


def new_block(width: int, size: int) -> tuple[nn.Linear, nn.Linear]:
    """The projections down and up of a block; it is the identity at first, since what projects up is 0."""
    down, up = nn.Linear(width, size), nn.Linear(size, width)
    nn.init.normal_(down.weight, std=0.02)
    for zero in (down.bias, up.weight, up.bias):
        nn.init.zeros_(zero)
    return down, up


def after_block(output: Any, down: nn.Module, up: nn.Module) -> Any:
    """h + W_up relu(W_down h + b_down) + b_up, of the hidden states h [..., H] that a module gives.

    Args:
        output: h, or a tuple whose first entry it is, as that of attention; the others are kept.
    """
    if isinstance(output, tuple):
        return (after_block(output[0], down, up), *output[1:])
    hidden = torch.relu(down(output.to(down.weight.dtype)))
    return output + up(hidden).to(output.dtype)


class OutputWithBottleneck(nn.Module):
    """A module with a block after it."""

    def __init__(self, base_layer: nn.Module, down: nn.Linear, up: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = down, up

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return after_block(self.base_layer(*args, **kwargs), self.bottleneck_down, self.bottleneck_up)

    def __getattr__(self, name: str) -> Any:
        """What models read of their own modules, as T5 does of a projection's `weight`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def bottleneck_settings(path: str) -> dict[str, Any] | None:
    """The configuration of the bottleneck adapter in a folder; None unless it holds one, and no model."""
    file = Path(path) / ADAPTER_CONFIG
    if not file.is_file() or (Path(path) / CONFIG).is_file():
        return None
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings if settings.get("peft_type") == BOTTLENECK else None


def base_of(path: str) -> str:
    """The model in `path`, or that of a bottleneck adapter in `path`."""
    settings = bottleneck_settings(path)
    return path if settings is None else base_of(str(settings["base_model_name_or_path"]))


def entries(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's training changed in the base model's configuration, such as the labels of a head."""
    return {
        name: {int(index): label for index, label in value.items()} if name == "id2label" else value
        for name, value in settings["model_config"].items()
    }


def head_entries(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the entries that decide the size of a head, as arguments of `from_pretrained`."""
    return {
        name: value for name, value in entries(settings).items() if name in ("id2label", "label2id", "problem_type")
    }


def set_entries(config: PretrainedConfig, settings: Mapping[str, Any]) -> PretrainedConfig:
    """Give a base model's configuration the entries of its adapter, in place."""
    for name, value in entries(settings).items():
        setattr(config, name, value)
    return config


def adapted_config(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of the model in `path`, or of a bottleneck adapter with its base model."""
    settings = bottleneck_settings(path)
    if settings is None:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return config
    return set_entries(adapted_config(str(settings["base_model_name_or_path"]), trust_remote_code), settings)


def adapter_weights(path: str, model: Any) -> dict[str, Tensor]:
    """The weights of the adapter in `path`, by the names that they have in `model`, which may have an adapter of its own.

    transformers gives some classes' backbones a prefix that others lack: T5's classifier, not T5 itself.
    """
    stored = {name.removeprefix(ADAPTED): each for name, each in load_file(Path(path) / ADAPTER_WEIGHTS).items()}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    places, prefix = {name for name, _ in inner.named_modules()}, f"{inner.base_model_prefix}."
    modules = [name.removesuffix(FIRST) for name in stored if name.endswith(FIRST)]
    if not places.issuperset(modules) and places.issuperset(prefix + name for name in modules):
        return {prefix + name: each for name, each in stored.items()}
    if not places.issuperset(modules) and places.issuperset(name.removeprefix(prefix) for name in modules):
        return {name.removeprefix(prefix): each for name, each in stored.items()}
    return stored


def insert_bottlenecks(model: Any, path: str) -> set[str]:
    """Give a loaded base model the blocks and whole modules of the adapter in `path`, in place.

    A head for which the model has no place, or one of another size, is left out.

    Returns:
        the names of the model's own weights that were replaced, those of a head.

    Raises:
        ValueError: a weight is missing, or has no place in the backbone.
    """
    weights = adapter_weights(path, model)
    modules = [name.removesuffix(FIRST) for name in weights if name.endswith(FIRST)]
    if not modules:
        raise ValueError(f"{path}: {ADAPTER_WEIGHTS} holds no bottleneck adapters")
    reference = next(iter(model.parameters()))
    places = {name for name, _ in model.named_modules()}
    for module in modules:
        parent, _, name = module.rpartition(".")
        if not {f"{module}.{PREFIX}{part}" for part in BLOCK} <= weights.keys() or module not in places:
            raise ValueError(f"{path}: there is no {module} in {type(model).__name__}, or its adapter lacks weights")
        size, width = weights[f"{module}{FIRST}"].shape
        down, up = new_block(width, size)
        block = nn.ModuleDict({"down": down, "up": up})
        block.load_state_dict({part: weights.pop(f"{module}.{PREFIX}{part}") for part in BLOCK})
        block.to(reference.device, reference.dtype)
        setattr(model.get_submodule(parent), name, OutputWithBottleneck(model.get_submodule(module), down, up))
    own = dict(model.named_parameters())
    fitting = {name for name, weight in weights.items() if name in own and own[name].shape == weight.shape}
    backbone = f"{model.base_model_prefix}."
    if unfit := [name for name in weights if name.startswith(backbone) and POOLER not in name and name not in fitting]:
        raise ValueError(f"{path}: {type(model).__name__} has no place for {unfit[0]} {list(weights[unfit[0]].shape)}")
    for name in fitting:
        own[name].data.copy_(weights[name])
    set_entries(model.config, bottleneck_settings(path) or {"model_config": {}})
    return fitting
