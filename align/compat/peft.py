"""The private names of PEFT that the package uses; see `align/compat/__init__.py`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any


def active_adapter_config(model: Any) -> Any:
    """The configuration of the active adapter of a `PeftModel`."""
    return model.active_peft_config


def load_adapter(
    model: Any, path: str, config: Any, without_storage: bool = False, keep_base_layers: bool = False
) -> Any:
    """`PeftModel.from_pretrained`, with an error where PEFT warns that the files lack weights, which it then leaves as new.

    Args:
        without_storage: of a model on the meta device, leave the adapter there too.
        keep_base_layers: do not read what PEFT saved of the model itself beside an adapter of the embeddings.
    """
    from peft import PeftModel, peft_model

    module: Any = peft_model
    read = module.load_peft_weights

    def without_base_layers(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: weight for name, weight in read(*args, **kwargs).items() if ".base_layer." not in name}

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("error", message=".*missing adapter keys")
        if keep_base_layers:
            stack.callback(setattr, module, "load_peft_weights", read)
            module.load_peft_weights = without_base_layers
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
    return merge_and_unload(model)  # which then sets `tie_word_embeddings: false`


def merge_and_unload(model: Any) -> Any:
    """PEFT's, also of IA3 beside a whole head of several layers (T5's, BART's, RoBERTa's): it asks the head for a `weight`."""
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    heads: list[Any] = [
        head for wrapper in wrappers for head in wrapper.modules_to_save.values() if not hasattr(head, "weight")
    ]
    for head in heads:
        head.weight = None
    merged = model.merge_and_unload()
    for head in heads:
        del head.weight
    return merged


@contextlib.contextmanager
def prefix_in_cache(model: Any) -> Iterator[None]:
    """Inside, `generate` of an encoder-decoder with prefix tuning begins with the prefix in the decoder's cache.

    PEFT 0.21 passes it as `past_key_values`, at every step, and transformers 5.24 reads `cache` in place of that.
    """
    if not hasattr(model, "active_peft_config"):
        yield
        return
    prepare = model.prepare_inputs_for_generation

    def with_prefix(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare(*args, **kwargs)
        given, prefix = kwargs.get("cache"), inputs.get("past_key_values")
        if prefix is not None and "cache" in inputs:
            del inputs["past_key_values"]
            inputs["cache"] = given if given is not None and given.get_seq_length() else prefix
        return inputs

    model.prepare_inputs_for_generation = with_prefix
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


def replace_module(tuner: Any, parent: Any, name: str, new: Any, old: Any) -> None:
    """Put a tuner's layer in the place of the module that it holds, on the same device."""
    tuner._replace_module(parent, name, new, old)


def register_method(name: str, config: type, tuner: type, prefix: str) -> None:
    """Make a tuner of ours known to PEFT: `get_peft_model`, `PeftConfig.from_pretrained` and saving look it up by name.

    PEFT's own function for this takes the names in its `PeftType` only.
    """
    from peft import mapping

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = prefix  # type: ignore[index]
