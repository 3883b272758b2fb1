"""Check that configuration, tokenizer and weights of a model folder match, from its files, before weights are loaded.

The model is built without storage, and transformers itself loads into it tensors without storage, of the names and
shapes in the headers of the safetensors files: tied weights, old names and weights that it converts are thereby treated
as they will be.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers import AutoHfQuantizer

from align.compat.peft import load_adapter
from align.compat.transformers import config_of, model_class
from align.config.base import StageRecipe
from align.errors import UserError, reason
from align.models.bottleneck import check_start
from align.models.check_weights import check_report
from align.models.inspect_folder import ADAPTER_WEIGHTS, stored_tensors
from align.models.model_types import is_encoder_decoder
from align.models.safetensors_header import StoredTensor
from align.models.trainable import check_trainable, is_tied, without_adapter
from align.terminal import say
from reward_models.bottleneck import bottleneck_settings, insert_bottlenecks
from reward_models.linear_head import AnyBackbone

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_files(
    auto: Any,
    path: str,
    key: str,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    new_head: bool = False,
    attn_implementation: str | None = None,
    num_labels: int | None = None,
    trained_by: StageRecipe | None = None,
) -> None:
    """Check the model or adapter in `path`; of a model on the hub, configuration and tokenizer only.

    Args:
        auto: the class that will load it, such as `AutoModelForCausalLM` or `TokenClassifier`.
        key: the recipe key that names the model, for errors.
        config: of the model; of an adapter, of its base.
        new_head: whether a head that is missing, or has another shape, is drawn at random.
        trained_by: the recipe whose `method` trains the model.

    Raises:
        UserError: a token has no embedding, weights are missing, unexpected or misshapen, or the method does not fit.
    """
    if trained_by is not None:
        check_start(path, key, trained_by)
        if is_encoder_decoder(config) and hasattr(config, "router_aux_loss_coef"):
            _note(
                f"{key}: {path}: the losses of the router of this {config.model_type} (router_aux_loss_coef, router_z_loss_coef) are not "
                "trained: transformers' count padding, so that they would depend on how rows are batched"
            )
    if tokenizer is not None:
        check_embeddings(tokenizer, config, path, key)
    folder, tensors = stored_tensors(path, key)
    cls = auto.class_of(config) if isinstance(auto, AnyBackbone) else model_class(auto, config)
    own_code = getattr(auto, "__name__", "AutoModel") in (getattr(config, "auto_map", None) or {})
    if getattr(config, "quantization_config", None) is not None:
        _check_quantizer(config, path, key, trains=trained_by is not None)
        return  # as below
    if tensors is None or cls is None or own_code:
        return  # transformers reports it after loading
    model = _load_without_storage(cls, folder, key, config, tensors, new_head, attn_implementation, num_labels)
    if (Path(path) / ADAPTER_WEIGHTS).is_file() and folder != path:
        _check_adapter(model, path, key)
    if trained_by is not None:
        if experts := without_adapter(model, trained_by):
            _note(
                f"method: {trained_by.method}: the experts of {path} get no adapter, and stay as they are: their weights are not in linear "
                f"layers, but whole ({experts[0]} and {len(experts) - 1} more). To train them, use method: full or freeze"
            )
        if trained_by.freeze_layers and is_tied(model, model.get_output_embeddings()):
            _note(
                f"freeze_layers: {path}: its embedding is its head, too (tied weights), and stays trainable; the first "
                f"{trained_by.freeze_layers} layers are frozen"
            )
        check_trainable(model, trained_by)
        if config_of(cls, config) is not config:
            _note(f"{key}: {path}: of this {config.model_type} model the text model alone is loaded, trained and saved")


def _note(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"note: {text}")


def _check_quantizer(config: PretrainedConfig, path: str, key: str, trains: bool) -> None:
    """Check that quantized weights can be loaded here, as transformers does before it loads them."""
    try:
        if AutoHfQuantizer.supports_quant_method(config.quantization_config):
            quantizer = AutoHfQuantizer.from_config(copy.deepcopy(config.quantization_config), pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
            if trains and getattr(quantizer.quantization_config, "dequantize", False):
                _note(
                    f"{key}: {path}: the `quantization_config` in its config.json is used to load it, and not kept: plain weights "
                    "are trained and saved"
                )
    except Exception as error:  # a package or a GPU is missing, or the entry is damaged
        raise UserError(
            f"{key}: {path}: cannot be loaded with the `quantization_config` in its config.json. {reason(error)} Name the model "
            "that is not quantized; method: qlora quantizes it as it is loaded."
        ) from error


def _load_without_storage(
    cls: Any, path: str, key: str, given: PretrainedConfig, tensors: Mapping[str, StoredTensor], new_head: bool,
    attn_implementation: str | None, num_labels: int | None,
) -> PreTrainedModel:  # fmt: skip
    """Load tensors without storage into a model without storage, and check what transformers reports of it."""
    model: PreTrainedModel
    # A missing package for an attention kernel is reported when the model is loaded.
    elsewhere = any(part in (attn_implementation or "") for part in ("flash", "/", "|"))
    kernel = None if elsewhere else attn_implementation
    try:
        config = copy.deepcopy(config_of(cls, given))
        if num_labels is not None:
            config.num_labels = num_labels
        empty = {
            name: torch.empty(tensor.shape, dtype=FLOATS.get(tensor.dtype, torch.float32), device="meta")
            for name, tensor in tensors.items()
        }
        model, report = cls.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map={"": "meta"},
            dtype=torch.float32,
            attn_implementation=kernel,
            ignore_mismatched_sizes=True,  # it then reports them
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers raises for these files
        raise UserError(f"{key}: {path}: its weights cannot be loaded with its config.json. {reason(error)}") from error
    left_out = check_report(model, report, f"{key}: {path}", new_head)
    if left_out and not new_head and config_of(cls, given) is given:  # otherwise the caller reports it
        _note(
            f"{key}: {path}: this {cls.__name__} has no place for some of the weights in its files, and leaves them out: "
            f"{', '.join(left_out[:4])}{f' and {len(left_out) - 4} more' * (len(left_out) > 4)}"
        )
    return model


def _check_adapter(model: PreTrainedModel, path: str, key: str) -> None:
    """Load the adapter in `path` onto its base model without storage; the model is as before afterwards.

    Raises:
        UserError: weights of it are missing or misshapen.
    """
    try:
        if bottleneck_settings(path) is not None:
            insert_bottlenecks(copy.deepcopy(model), path)
            return
        config = PeftConfig.from_pretrained(path)
        config.task_type = None
        if not config.is_prompt_learning:
            load_adapter(model, path, config, without_storage=True).unload()
    except Exception as error:  # whatever PEFT raises for these files
        raise UserError(f"{key}: {path}: the adapter does not fit its base model. {reason(error)}") from error


def check_embeddings(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, path: str, key: str) -> None:
    """Check that the model has an embedding for every token of its tokenizer; it may have more, as padded ones do.

    Raises:
        UserError: it has not.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    # Text never holds them: the tokenizer of a text model may be that of its multimodal siblings, as Gemma 3's is.
    media = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    beyond = {
        index: token
        for token, index in tokenizer.get_vocab().items()
        if size is not None and index >= size and token not in media
    }
    if beyond:
        count, some = max(beyond) + 1, ", ".join(repr(token) for _, token in sorted(beyond.items())[:3])
        raise UserError(
            f"{key}: {path}: the tokenizer has {count} tokens, and the model {size} embeddings (vocab_size), none for {some}"
            f"{' and others' * (len(beyond) > 3)}; copy the model's own tokenizer, or resize the model once in Python, by "
            f"`model.resize_token_embeddings({count})`, and save it."
        )
