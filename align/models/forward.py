"""Forward passes: token ids in, log-probabilities, losses or values of responses out.

A batch is a left-padded prompt followed by a right-padded response: `ids [B, S]` and `mask [B, S]` (True =
real token), of which the last T columns are the response.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from align.compat.transformers import keeps_state, known_rows
from align.maths.losses import token_logprobs
from align.models.lm_head import (
    Objective,
    full_logits_loss,
    head_is_last,
    logprobs_head,
    loss_head,
    output_head,
    replaced_head,
)
from reward_models.heads import hf_model


def position_ids(mask: Tensor) -> Tensor:
    """Position of each real token in its own sequence, [B, S] int64, 0 on left padding."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def response_logits(model: Callable[..., Any], ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """Logits that predict the last `length` tokens, [B, length, V]; the head runs on those positions only.

    A model with a recurrent state, which may take padding for tokens, reads rows without padding before them.
    """
    if keeps_state(hf_model(model).config):  # type: ignore[arg-type]
        stripped, *_ = strip_padding(ids, mask, length)
        first = mask[:, :-length].sum(dim=1, keepdim=True)  # column of the first of the last `length` tokens
        columns = (first + torch.arange(-1, length - 1, device=ids.device)).clamp(max=stripped.shape[1] - 1)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        kept: Tensor = model(input_ids=stripped, use_cache=False).logits[rows, columns]
        return kept
    output = model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=length + 1,
    )
    logits: Tensor = output.logits
    return logits[:, -length - 1 : -1]


def strip_padding(ids: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Move the real tokens of each row to its left end, which removes the padding before and between them.

    With padding on the right only, causal attention needs no mask, since no token attends to later ones. Most padding
    of a batch of prompts and responses is dropped, too.

    Returns:
        ids [B, S'], padded with token 0; indices [N] into the flattened [B * S'] positions, of the states that
        predict the real tokens among the last `length` of each row; those N tokens.
    """
    real = mask.cpu()  # places are found there, since each question to a GPU makes Python wait for it
    sizes = real.sum(dim=1, keepdim=True)
    columns = torch.arange(int(sizes.max()))
    stripped = torch.zeros(len(ids), len(columns), dtype=ids.dtype, device=ids.device)
    response = real[:, -length:]
    first = sizes - response.sum(dim=1, keepdim=True)  # column of the first response token of a row
    masks = (real, columns < sizes, response, (columns >= first - 1) & (columns < sizes - 1))
    sources, places, answers, indices = (to_device(mask.flatten().nonzero().squeeze(1), ids.device) for mask in masks)
    stripped.view(-1)[places] = ids.flatten()[sources]
    return stripped, indices, ids[:, -length:].flatten()[answers]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU, without waiting for a GPU: from pinned memory, without which Python waits all the same."""
    if device.type in ("cpu", "mps"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def scatter_to_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Values [N], one for each True of `mask` [B, T] in row-major order -> [B, T] float32, 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values.float())


def response_logprobs(model: Callable[..., Any], ids: Tensor, mask: Tensor, length: int, temperature: float) -> Tensor:
    """Log-probability of each of the last `length` tokens at `temperature`, [B, length] float32, nats; 0 at padding."""
    stripped, indices, tokens = strip_padding(ids, mask, length)
    if head_is_last(model):
        with replaced_head(output_head(model), logprobs_head(indices, tokens, temperature)):
            logprobs = _run(model, stripped)
    else:
        logprobs = token_logprobs(all_logits(model, stripped)[indices], tokens, temperature)
    return scatter_to_mask(logprobs, mask[:, -length:])


def response_loss(
    model: Callable[..., Any], ids: Tensor, mask: Tensor, length: int, temperature: float, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss over the N real tokens among the last `length` of each row.

    Args:
        objective: maps log-probabilities and entropies [n] (float32, nats) of a slice of the N tokens, in row-major
            order, and that slice, to its share of the loss.

    Returns:
        the loss, a scalar with gradient; log-probabilities and entropies [N], float32, without.
    """
    stripped, indices, tokens = strip_padding(ids, mask, length)
    return token_loss(model, stripped, indices, tokens, temperature, objective)


def label_loss(model: Callable[..., Any], ids: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`scale` times the negative log-likelihood of the N labels, nats, summed.

    Args:
        ids: [B, S] int64, padded on the right with any token.
        labels: [B, S] int64, -100 where there is none; the first column has no prediction and is left out.

    Returns:
        the loss, which carries the gradient; the labels' log-probabilities [N] float32 without gradients.
    """
    labels = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # at the place of the state that predicts each
    indices = (labels != -100).nonzero().squeeze(1)

    def objective(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
        return -scale * logprobs.sum()

    loss, logprobs, _ = token_loss(model, ids, indices, labels[indices], 1.0, objective)
    return loss, logprobs


def token_loss(
    model: Callable[..., Any], ids: Tensor, indices: Tensor, tokens: Tensor, temperature: float, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of `tokens` [N], each predicted from the state at its place [N] in the flattened batch `ids`."""
    outputs = torch.zeros(2, len(tokens), device=ids.device)
    if head_is_last(model):
        with replaced_head(output_head(model), loss_head(indices, tokens, temperature, objective, outputs)):
            loss = _run(model, ids)
    else:
        loss = full_logits_loss(all_logits(model, ids)[indices], tokens, temperature, objective, outputs)
    return loss, outputs[0], outputs[1]


def all_logits(model: Callable[..., Any], stripped: Tensor) -> Tensor:
    """The head's output at every position of rows without padding before or between tokens, [B * S, V]."""
    return _run(model, stripped).flatten(0, 1)


def _run(model: Callable[..., Any], stripped: Tensor) -> Tensor:
    """What the model's head returns for rows without padding before or between their tokens."""
    with known_rows(padded=False):
        output: Tensor = model(input_ids=stripped, use_cache=False).logits
    return output


def response_values(model: Callable[..., Any], ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """Value of the state before each of the last `length` tokens, [B, length] float32; 0 at padding."""
    stripped, indices, _ = strip_padding(ids, mask, length)
    return scatter_to_mask(all_logits(model, stripped)[indices, 0], mask[:, -length:])
