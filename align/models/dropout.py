"""Dropout of every kind, which no stage trains with."""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, so that `train()` and `eval()` give the same numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Rates that a layer reads as a number: `dropout`, `attention_dropout`, `layerdrop`, ...
        for name, rate in list(vars(module).items()):
            if isinstance(rate, float) and "drop" in name:
                setattr(module, name, 0.0)
