"""What the package relies on in PEFT; see `align/compat/__init__.py`."""

from __future__ import annotations

import warnings
from typing import Any


def active_adapter_config(model: Any) -> Any:
    """The configuration of the active adapter of a `PeftModel`."""
    return model.active_peft_config


def load_adapter(model: Any, path: str, config: Any, without_storage: bool = False) -> Any:
    """`PeftModel.from_pretrained`, with an error where PEFT warns that the files lack weights, which it then leaves as new.

    Args:
        without_storage: of a model on the meta device, leave the adapter there too.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return PeftModel.from_pretrained(model, path, config=config, low_cpu_mem_usage=without_storage)
