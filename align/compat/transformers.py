"""The private names of transformers that the package uses; see `align/compat/__init__.py`."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from datetime import date
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def attention_implementation(config: Any) -> str:
    """The attention kernel that a loaded model uses, such as "sdpa"."""
    return str(config._attn_implementation)


def implementations(config: Any) -> list[str]:
    """The kernels of attention and of experts that a configuration and those inside it name."""
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    found = [
        getattr(each, name, None)
        for each in (config, *inner)
        for name in ("_attn_implementation", "_experts_implementation")
    ]
    return [name for name in found if isinstance(name, str)]


def sdpa_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention: query, key, value [B, heads, S, D] -> [B, S, heads, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def register_sdpa_variant(name: str, attention: Callable[..., Any]) -> None:
    """Offer `attention` as an attention implementation that gets the masks of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def has_fixed_step(model: Any) -> bool:
    """Whether transformers has written this model's decoding step for a cache of fixed size."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


_PADDED: ContextVar[bool | None] = ContextVar("padded", default=None)


@contextlib.contextmanager
def known_rows(padded: bool) -> Iterator[None]:
    """Inside, transformers does not ask the device whether rows are padded (as `padded` says) or packed (they are not).

    It asks in every pass, to leave out a mask that hides nothing, and each answer makes Python wait for a GPU.
    """
    from transformers import masking_utils

    names: Any = masking_utils
    if names.fast_all.__module__ != __name__:
        names.fast_all = _unless_known(names.fast_all, lambda padded: not padded)
        names.find_packed_sequence_indices = _unless_known(names.find_packed_sequence_indices, lambda _: None)
    token = _PADDED.set(padded)
    try:
        yield
    finally:
        _PADDED.reset(token)


def _unless_known(ask: Callable[[Tensor], Any], answer: Callable[[bool], Any]) -> Callable[[Tensor], Any]:
    def asked(tensor: Tensor) -> Any:
        known = _PADDED.get()
        return ask(tensor) if known is None else answer(known)

    return asked


def chat_template_compiler(today: date) -> str:
    """Python source of transformers' function from the text of a chat template to the template, as `compile_template`.

    It is for a process that does not import transformers, and in which it is always `today`.
    """
    import inspect

    from transformers.utils import chat_template_utils

    source = inspect.getsource(chat_template_utils._cached_compile_jinja_template)
    clock = f"class datetime:\n    now = staticmethod(lambda: date.fromisoformat('{today}'))\n"
    return f"{_COMPILER_NAMES}\n\n{clock}\n\n{source}\n\ncompile_template = _cached_compile_jinja_template\n"


# What that function reads of its module. This process has checked Jinja's version.
_COMPILER_NAMES = """
import json
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date
from types import SimpleNamespace

import jinja2
import jinja2.ext
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

def no_type_check(function):
    return function

def is_jinja_available():
    return True

version = SimpleNamespace(parse=lambda text: [int(part) for part in text.split(".")])
"""


def apply_chat_template(tokenizer: Any, messages: Any, compile_template: Callable[[str], Any], **kwargs: Any) -> str:
    """`tokenizer.apply_chat_template` as text, with the template compiled by `compile_template`."""
    from transformers.utils import chat_template_utils as utils

    before = utils._compile_jinja_template
    utils._compile_jinja_template = compile_template  # type: ignore[assignment]  # a plain function
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    finally:
        utils._compile_jinja_template = before


def write_unchecked(config: Any) -> None:
    """Have a generation config written as it is, as `save_pretrained` writes one that has not changed since it was loaded.

    A changed one is refused with a setting of a mode that is off, as Llama 2's: a temperature without `do_sample`.
    """
    config._original_object_hash = hash(config)


def has_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal language model for this configuration class."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping


def model_class(auto: Any, config: Any) -> Any:
    """The class of which `auto.from_pretrained` would make a model, None where transformers itself has none.

    Without one of `auto` for this configuration, the backbone's.
    """
    from transformers import AutoModel
    from transformers.models.auto.auto_factory import _get_model_class

    mappings = [each._model_mapping for each in (auto, AutoModel)]
    return next((_get_model_class(config, mapping) for mapping in mappings if type(config) in mapping), None)


def config_of(cls: Any, config: Any) -> Any:
    """The configuration from which `auto.from_pretrained` makes a model of `cls`: the text model's, inside one that sees too."""
    text = getattr(config, "sub_configs", {}).get("text_config")
    return config.get_text_config() if text is not None and getattr(cls, "config_class", None) == text else config


def keep_weights_in_evaluation(model: Any) -> None:
    """Keep RWKV from changing its weights: it divides them by powers of two, in place, when it goes from training to evaluation.

    Saved or trained on in between they would be other weights. It does so for float16 alone; here it computes as in training.
    """
    for module in model.modules():
        if hasattr(module, "_rescale_layers"):
            module._rescale_layers = lambda: None


def has_sequence_classifier(config: Any) -> bool:
    """Whether transformers has a sequence classifier for this configuration class."""
    from transformers import AutoModelForSequenceClassification

    return has_auto_class(AutoModelForSequenceClassification, config)


def has_auto_class(auto: Any, config: Any) -> bool:
    """Whether an auto class of transformers, such as `AutoModelForTokenClassification`, has a model for this configuration."""
    return type(config) in auto._model_mapping


def causal_lm_types() -> Collection[str]:
    """Values of `config.model_type` that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def seq2seq_lm_types() -> Collection[str]:
    """Values of `config.model_type` that have a sequence-to-sequence language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


def masked_lm_types() -> Collection[str]:
    """Values of `config.model_type` that have a masked language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return MODEL_FOR_MASKED_LM_MAPPING_NAMES


def loads_sharded() -> bool:
    """Whether `from_pretrained` shards the weights that it loads now, as under `HfDeepSpeedConfig` with ZeRO-3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def unlogged_loss(trainer: Any) -> tuple[int, float]:
    """Steps since a Trainer has logged, and the sum of its losses in them on this rank."""
    return trainer.state.global_step - trainer._globalstep_last_logged, trainer._tr_loss.item()


def set_unlogged_loss(trainer: Any, steps: int, loss: float) -> None:
    """Set what `unlogged_loss` gives, once a Trainer has begun to train."""
    trainer._globalstep_last_logged = trainer.state.global_step - steps
    trainer._tr_loss.fill_(loss)


def stop_sharded_loading() -> None:
    """Make `from_pretrained` load whole models again after a Trainer has trained under ZeRO-3."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


# Types of models (of the text part) whose recurrent states, decoded with left padding and with rows dropped, give what a
# forward pass over the whole row gives. Others do not: they ignore padding (RWKV, RecurrentGemma), or clamp time steps in
# the whole pass only (Zamba-2, Nemotron-H).
EXACT_RECURRENT = {"mamba", "falcon_mamba", "mamba2", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm2_moe",
                   "jamba", "bamba", "granitemoehybrid", "falcon_h1", "olmo_hybrid"}  # fmt: skip
CACHE_ARGUMENTS = {"cache", "cache_params", "past_key_values"}  # names of the cache in `forward`, by version and type
# Types that take no positions, because attention is biased by distance, and padding changes no distance.
ALIBI = {"bloom", "mpt"}
# Types that count positions themselves, from pad_token_id + 1 on (so that they have that many less), and that other positions
# than they count give another model: they get none, and read rows without padding before them.
COUNT_FROM_PADDING = {"camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta",
                      "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}  # fmt: skip


def is_linear_attention(layer: Any) -> bool:
    """Whether a cache's layer holds a recurrent state (with keys and values beside it, or without)."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return isinstance(layer, LinearAttentionCacheLayerMixin)


def keeps_state(config: Any) -> bool:
    """Whether a model keeps more than the keys and values of attention, such as a recurrent state, or counts padding or positions."""
    return config.get_text_config(decoder=True).model_type in EXACT_RECURRENT or not keeps_exact_cache(config)


def keeps_exact_cache(config: Any) -> bool:
    """Whether decoding with transformers' `DynamicCache` is exact with left padding and when rows are dropped."""
    from transformers import AutoModelForCausalLM, DynamicCache

    text = config.get_text_config(decoder=True)
    if text.model_type in COUNT_FROM_PADDING:
        return False
    if text.model_type in EXACT_RECURRENT:  # the step of Mamba-2 does not clamp
        return tuple(getattr(text, "time_step_limit", (0.0, math.inf))) == (0.0, math.inf)
    if has_causal_lm(config):
        model: Any = AutoModelForCausalLM._model_mapping[type(config)]
        if model._is_stateful or not model._supports_default_dynamic_cache():
            return False
        parameters = inspect.signature(model.forward).parameters
        if not parameters.keys() & CACHE_ARGUMENTS:
            return False  # GPT-1 has no cache
        if text.model_type not in ALIBI and "position_ids" not in parameters:
            return False  # it counts padding
    return not any(map(is_linear_attention, DynamicCache(config=config).layers))
