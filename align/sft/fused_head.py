"""Whether TRL has a fused LM head, and the scores it returns, computed from logits for TRL versions without one."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from align.compat.trl import has_fused_head
from align.data.tokenize import IGNORE_INDEX

HAS_FUSED_HEAD = has_fused_head()


def token_scores(logits: Tensor, labels: Tensor) -> SimpleNamespace:
    """The scores of predicted tokens that the fused head of TRL 1.16 returns.

    Args:
        logits: [m, S, V].
        labels: [m, S], -100 where the loss ignores a token.

    Returns:
        `log_probs` and `entropy`, float32, and `is_top1` and `label_mask`, bool; each [m, S - 1], and 0 at
        ignored tokens. Only `log_probs` has a gradient.
    """
    labels = labels[:, 1:]
    mask = labels != IGNORE_INDEX
    all_log_probs = logits[:, :-1].float().log_softmax(dim=-1)
    log_probs = all_log_probs.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    with torch.no_grad():
        entropy = torch.special.entr(all_log_probs.exp()).sum(dim=-1)
        is_top1 = (all_log_probs.argmax(dim=-1) == labels) & mask
    return SimpleNamespace(
        log_probs=log_probs.masked_fill(~mask, 0),
        is_top1=is_top1,
        label_mask=mask,
        entropy=entropy.masked_fill(~mask, 0),
    )
