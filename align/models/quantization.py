"""4-bit weights for `method: qlora`: how they are loaded, and what keeps their training exact."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from align.compat.deepspeed import is_sharded
from align.compat.others import keep_differentiable_kernel
from align.errors import UserError


def quantization_kwargs(method: str, bf16: bool) -> dict[str, Any]:
    """`from_pretrained` arguments for `method: qlora`: 4-bit NormalFloat, double quantization (arXiv 2305.14314).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if method != "qlora":
        return {}
    try:
        importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            "method: qlora needs bitsandbytes; install it by `pip install -e '.[qlora]'` in this repository, "
            "or use method: lora."
        ) from error
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
    }


def disable_inference_kernels(model: PreTrainedModel) -> None:
    """Keep a model's 4-bit layers on the CPU kernel that has a gradient; other models are left unchanged."""
    for module in model.modules():
        keep_differentiable_kernel(module)


def cast_trained_to_float32(model: nn.Module) -> None:
    """Convert trained parameters to float32: TRL casts a 4-bit model's adapter to bfloat16, which loses small steps.

    Not those that ZeRO-3 has sharded in bfloat16, which has float32 masters.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4 and not is_sharded(parameter):
            parameter.data = parameter.data.float()
