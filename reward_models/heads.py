"""Scalar heads on decoder and encoder backbones: find, initialize, score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Float32Linear(nn.Linear):
    """`nn.Linear` that computes in float32, whatever the dtype of its input and weights.

    bfloat16 values in [4, 8) are 0.031 apart, so that close scores would tie and differences would be rounded.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] of any float dtype to [..., out_features] float32."""
        with torch.autocast(device_type=input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(input.float(), self.weight.float(), bias)


def hf_model(model: nn.Module) -> Any:
    """The transformers model inside a DeepSpeed, DDP or PEFT wrapper."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def score_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """The scalar head of a sequence or token classifier: its name in the transformers model, and the module.

    It is the only linear layer outside the backbone with a single output, whatever its name in the architecture
    (`score`, `classifier`, `classifier.out_proj`, ...).

    Raises:
        ValueError: the model has no such layer, or several.
    """
    inner = hf_model(model)
    backbone = f"{inner.base_model_prefix}."
    found = [
        (name, module)
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == 1
        and not name.startswith(backbone)
        and "original_module" not in name.split(".")  # PEFT's frozen copy of a module in `modules_to_save`
    ]
    if len(found) != 1:
        several = f", but several: {', '.join(name for name, _ in found)}" if found else ""
        raise ValueError(
            f"no scalar head in {type(inner).__name__}{several}; expected a sequence or token classification "
            "model loaded with num_labels=1."
        )
    return found[0]


def keep_head_float32(model: nn.Module) -> None:
    """Make the scalar head compute in float32, also with bfloat16 weights and under autocast. In place.

    Parameters and their names do not change, so checkpoints and ZeRO-3 are unaffected.

    Raises:
        ValueError: the model has no scalar head.
    """
    score_head(model)[1].__class__ = Float32Linear


def init_head(model: nn.Module, generator_seed: int) -> None:
    """Draw the scalar head's weight from N(0, variance 1/(d+1)) with d its input width, and set its bias to 0.

    Hidden states of unit variance then give scores of unit variance, at any width. Call it before DeepSpeed shards the
    model. The weight depends on the seed alone, not on device, dtype or torch's global generator.

    Raises:
        ValueError: the model has no scalar head.
    """
    head = score_head(model)[1]
    generator = torch.Generator().manual_seed(generator_seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5)
        if head.bias is not None:
            head.bias.zero_()


def score_sequences(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Score each sequence at its last real token (encoders: as they pool), less `config.score_mean`.

    Only the mask determines which tokens are real: the side of the padding, the pad id (which may equal end-of-text) and
    the ids of masked tokens do not matter. transformers' decoders would use the last id other than `pad_token_id`.

    The real tokens of each row are moved to the left, where default positions count them from 0 and encoders find their
    first token. During this call, hooks give a head that is applied to every position (in decoders) the hidden state of
    the last real token alone, and repeat its output at all positions, so it does not matter which one the model selects.
    The model's own `forward` is called, as ZeRO-3 and DDP require.

    Args:
        model: a sequence classifier with one label, bare or wrapped. Gradients flow; train or evaluation mode is kept.
        ids: [B, S] int64.
        mask: [B, S] bool, True where a token is real.

    Returns:
        Scores [B], float32.

    Raises:
        ValueError: a row without a real token, or a model without a scalar head.
    """
    lengths = mask.sum(dim=1)  # [B]
    if not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())}: no real token to score.")
    inner, head = hf_model(model), score_head(model)[1]
    config = inner.config
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(lengths.max())]
    mask = mask.gather(1, order)
    ids = ids.gather(1, order).masked_fill(~mask, config.get_text_config().pad_token_id or 0)
    rows, width = torch.arange(len(ids), device=ids.device), ids.shape[1]

    def keep_last(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        hidden = args[0]  # [B, S, H] from a decoder, [B, H] from an encoder
        return (hidden[rows, lengths - 1].unsqueeze(1),) if hidden.dim() == 3 else None

    def repeat(_: nn.Module, args: tuple[Tensor], score: Tensor) -> Tensor:
        return score.expand(-1, width, -1) if score.dim() == 3 else score

    hooks = [head.register_forward_pre_hook(keep_last), head.register_forward_hook(repeat)]
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=mask.long()).logits  # [B, 1]
    finally:
        for hook in hooks:
            hook.remove()
    return logits.squeeze(-1).float() - float(getattr(config, "score_mean", 0.0))
