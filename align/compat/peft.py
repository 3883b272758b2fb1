"""What the package relies on in PEFT; see `align/compat/__init__.py`."""

from __future__ import annotations

from typing import Any


def active_adapter_config(model: Any) -> Any:
    """The configuration of the active adapter of a `PeftModel`."""
    return model.active_peft_config
