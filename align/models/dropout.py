"""Dropout of every kind, and random routing to experts, which no stage trains with."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, so that `train()` and `eval()` give the same numbers. The model's configuration keeps its own.

    Layers that route tokens to experts with noise in training (Mixtral's and Phi-MoE's `router_jitter_noise`) stay in evaluation
    mode: a policy that is sampled without noise and trained with it has no ratio of 1, and Phi-MoE also draws the experts.
    """
    for module in model.modules():
        if any("jitter" in name for name in vars(module)) and not isinstance(module, PreTrainedModel):
            setattr(module, "training", False)  # noqa: B010  # as below
            setattr(module, "train", partial(_train_inner, module))  # noqa: B010
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Rates that a layer reads as a number: `dropout`, `attention_dropout`, `layerdrop`, ...
        for name, rate in list(vars(module).items()):
            if _is_rate(name, rate):
                setattr(module, name, 0.0)
        # Rates that a layer reads from the configuration in its forward pass (Falcon, Persimmon, GPT-Neo)
        config = getattr(module, "config", None)
        rates = vars(config) if hasattr(config, "__dict__") and not isinstance(module, PreTrainedModel) else {}
        if any(_is_rate(name, rate) and rate for name, rate in rates.items()):
            setattr(module, "config", WithoutDropout(config))  # noqa: B010  # nn.Module declares tensors and modules


def _train_inner(module: nn.Module, mode: bool = True) -> nn.Module:
    """`module.train(mode)` for the modules inside it alone."""
    for each in module.children():
        each.train(mode)
    return module


class WithoutDropout:
    """A layer's view of its model's configuration, later changes included, in which every dropout rate is 0."""

    def __init__(self, config: Any):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "config":  # of a copy that is being made
            raise AttributeError(name)
        value = getattr(self.config, name)
        return 0.0 if _is_rate(name, value) else value


def _is_rate(name: str, value: Any) -> bool:
    return isinstance(value, float) and "drop" in name
