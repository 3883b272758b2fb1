"""The private names of PEFT that the package uses; see `align/compat/__init__.py`."""

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


def merge_adapter(model: Any) -> Any:
    """`merge_and_unload`, exact also where embedding and head share a weight and only one of them has the adapter.

    PEFT adds the update to the weight that they share. Here each gets a weight of its own first.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    inner = model.get_base_model()
    ends = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    weights = [getattr(end, "weight", None) for end in ends]
    adapted: Any = next((end for end in ends if isinstance(end, BaseTunerLayer)), None)
    if adapted is not None and weights[0] is weights[1]:
        layer: Any = adapted.get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model.merge_and_unload()  # which then sets `tie_word_embeddings: false`
