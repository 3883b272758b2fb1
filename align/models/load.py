"""Model configurations and models from a folder or the hub, adapters merged, dropout off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from align.compat.peft import load_adapter, merge_adapter
from align.compat.transformers import implementations, keep_weights_in_evaluation, loads_sharded
from align.data.hub import go_offline_if_unreachable
from align.errors import UserError, is_out_of_memory, reason
from align.models.check_weights import check_finite, check_report
from align.models.dropout import disable_dropout
from align.models.forward_settings import set_neutral
from align.models.inspect_folder import ADAPTER_CONFIG, CONFIG, check_adapter, looks_local, read_object
from align.models.model_types import check_kind, is_encoder_decoder
from align.models.quantization import disable_inference_kernels
from reward_models.bottleneck import bottleneck_settings, head_entries, insert_bottlenecks, set_entries
from reward_models.linear_head import SequenceClassifier

LANGUAGE_MODELS = (AutoModelForCausalLM, AutoModelForSeq2SeqLM)  # whose head is never new


def load_config(
    path: str, key: str, trust_remote_code: bool = False, *, encoder_decoder: bool = False
) -> PretrainedConfig:
    """The model's configuration, without its weights.

    Args:
        key: the recipe key that names the model, for errors.
        encoder_decoder: whether the stage takes an encoder-decoder (T5, BART, ...) there.

    Raises:
        UserError: there is no model at `path`, or one that the stage does not take.
    """
    if (base := adapter_base(path)) is not None:
        where = f"{key}: {path} is an adapter of {base}"
        of_base = load_config(base, where, trust_remote_code, encoder_decoder=encoder_decoder)
        bottleneck = bottleneck_settings(path)
        return of_base if bottleneck is None else set_entries(of_base, bottleneck)
    if looks_local(path) and not (Path(path) / CONFIG).is_file():
        raise UserError(f"{key}: no model at {path}; run the stage that makes it first, or correct the path.")
    if not Path(path).is_dir():
        go_offline_if_unreachable()
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the network, the hub and configurations fail in many ways
        known = Path(path).is_dir()
        problem = (
            f"{path}: transformers cannot read its {CONFIG}"
            if known
            else f"no model at {path}; check the path or hub id"
        )
        raise UserError(f"{key}: {problem}. {reason(error)}") from error
    for kernel in implementations(config):
        if "/" in kernel:
            raise UserError(
                f"{key}: {path}: its {CONFIG} names the kernel {kernel}, code of the hub; take it out of the file, and if you trust "
                "it, set `attn_implementation` in the recipe."
            )
    check_kind(config, key, path, encoder_decoder=encoder_decoder)
    return config


def adapter_settings(path: str) -> dict[str, Any] | None:
    """PEFT's configuration of the adapter in `path`; None unless `path` holds an adapter and no model."""
    file = Path(path) / ADAPTER_CONFIG
    if not file.is_file() or (Path(path) / CONFIG).is_file():
        return None
    settings = read_object(file, "adapter")
    check_adapter(settings, path, "adapter")
    return {"num_virtual_tokens": None, "task_type": None, **settings}


def adapter_base(path: str) -> str | None:
    """The model that the adapter in `path` was trained on; None unless `path` holds an adapter and no model.

    Raises:
        UserError: it consists of virtual tokens, which no later stage can start from.
    """
    settings = adapter_settings(path)
    if settings is None:
        return None
    if settings["num_virtual_tokens"]:
        raise UserError(
            f"{path}: holds virtual tokens, which cannot be merged into a model, so no stage can start from them; "
            "`align evaluate` and PEFT's AutoPeftModelForCausalLM load them. Train with method: lora instead."
        )
    return str(settings["base_model_name_or_path"])


def load_pretrained(
    auto: Any,
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Any:
    """`auto.from_pretrained`, dropout off, an adapter in `path` merged into its base model, or inserted if it is a bottleneck.

    Args:
        auto: a class such as `AutoModelForCausalLM`.
        dtype: of the weights. What trains is loaded in float32; the engine converts it.
        device: where weights go, each straight from the file; None: the CPU, or under ZeRO-3 the shards.

    Raises:
        UserError: the model cannot be loaded, or an adapter cannot be merged.
    """
    settings = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    placed = {} if device is None else {"device": device}
    if (bottleneck := bottleneck_settings(path)) is not None:
        return _load_with_bottlenecks(auto, path, bottleneck, **settings, **placed, **kwargs)
    if (base := adapter_base(path)) is not None:
        if loads_sharded():
            raise UserError(
                f"{path}: an adapter cannot be merged while ZeRO 3 shards the model; run `align merge` first."
            )
        if "quantization_config" in kwargs:
            raise UserError(
                f"{path}: an adapter cannot be merged into the 4-bit weights of method: qlora; run `align merge` first."
            )
        loaded = load_pretrained(auto, base, **settings, **placed, **kwargs)  # type: ignore[arg-type]
        model, *report = loaded if isinstance(loaded, tuple) else (loaded,)
        with _loading(path, "adapter"):
            config = PeftConfig.from_pretrained(path)
            config.task_type = None  # a value model may start from a language model's adapter
            merged = merge_adapter(load_adapter(model, path, config)).requires_grad_(True)
        check_finite(merged, path)
        for each in report:  # a head in `modules_to_save` came with the adapter
            whole = tuple(f".{name}." for name in config.modules_to_save or ())
            each["missing_keys"] = {name for name in each["missing_keys"] if not any(w in f".{name}." for w in whole)}
        return (merged, *report) if report else merged
    report_asked = kwargs.pop("output_loading_info", False)
    kernel = f" with attn_implementation: {attn_implementation}" * (attn_implementation is not None)
    with _loading(path, f"model{kernel}"):
        model, report = auto.from_pretrained(
            path,
            use_safetensors=True,
            output_loading_info=True,
            device_map={"": device} if device is not None else None,
            **settings,
            **kwargs,  # never a pickle
        )
    check_report(model, report, path, new_head=auto not in LANGUAGE_MODELS)
    check_finite(model, path)
    disable_dropout(model)
    keep_weights_in_evaluation(model)
    set_neutral(model)
    return (model, report) if report_asked else model


def _load_with_bottlenecks(auto: Any, path: str, bottleneck: Mapping[str, Any], **settings: Any) -> Any:
    """`load_pretrained` of a base model, with the blocks and the head of its bottleneck adapter."""
    if not {"num_labels", "id2label"} & settings.keys():
        settings = {**head_entries(bottleneck), **settings}
    loaded = load_pretrained(auto, str(bottleneck["base_model_name_or_path"]), **settings)
    model, *report = loaded if isinstance(loaded, tuple) else (loaded,)
    with _loading(path, "adapter"):
        whole = insert_bottlenecks(model, path)
    check_finite(model, path)
    for each in report:
        each["missing_keys"] = set(each["missing_keys"]) - whole
    return (model, *report) if report else model


@contextlib.contextmanager
def _loading(path: str, what: str) -> Iterator[None]:
    """Turn any error in the block, except for a lack of memory, into a user error about the model's files."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise  # the stage says what to lower
        raise UserError(f"{path}: cannot load the {what}. {reason(error)}") from error


def language_model_class(config: PretrainedConfig) -> Any:
    """The auto class of a model that generates."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def load_policy(
    path: str,
    *,
    auto: Any = AutoModelForCausalLM,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A language model, causal unless `auto` is another class of it; arguments as for `load_pretrained`."""
    model: PreTrainedModel = load_pretrained(
        auto,
        path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **kwargs,
    )
    disable_inference_kernels(model)
    return model


def new_reward_model(
    path: str,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """A sequence classifier with one label on the backbone in `path`; the caller has to initialize its head if it is new."""
    model: PreTrainedModel = load_pretrained(
        SequenceClassifier,
        path,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        device=device,
        num_labels=1,
    )
    return model


def new_classifier(
    path: str, *, attn_implementation: str | None = None, trust_remote_code: bool = False, **head: Any
) -> PreTrainedModel:
    """`new_head` of a sequence classifier."""
    auto = AutoModelForSequenceClassification
    return new_head(auto, path, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, **head)


def new_head(
    auto: Any, path: str, *, attn_implementation: str | None = None, trust_remote_code: bool = False, **head: Any
) -> PreTrainedModel:
    """The backbone in `path`, with the head of `auto` in `path` if its size is right, else a new one.

    Args:
        auto: a class such as `AutoModelForTokenClassification`.
        head: entries of the configuration: `num_labels` or `id2label`, `label2id`, `problem_type`.
    """
    model: PreTrainedModel = load_pretrained(
        auto,
        path,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,
        **head,
    )
    return model


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of a classifier's modules outside its backbone: those that are new when a head is put on a backbone."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def load_masked_lm(
    path: str,
    *,
    auto: Any = AutoModelForMaskedLM,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A masked language model, or by `auto` one that fills in spans; a backbone without a masked one's head gets a new one."""
    model: PreTrainedModel = load_pretrained(
        auto, path, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    return model
