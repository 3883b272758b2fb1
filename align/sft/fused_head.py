"""What the SFT stage asks of TRL's fused LM head: label tokens alone; and whole logits where there is no such head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import trl.trainer.utils
from torch import Tensor

from align.data.tokenize import IGNORE_INDEX

FUSED = hasattr(trl.trainer.utils, "add_fused_lm_head")  # not in 1.14, the last TRL for Python 3.10


@contextlib.contextmanager
def labels_alone() -> Iterator[None]:
    """Inside, TRL's fused head sees the label tokens alone.

    By itself it does so where Triton is, and elsewhere sees every position, prompts and padding too: on a CPU most of the
    time of a step. That is for devices that compile for each number of tokens, which a CPU does not.
    """
    before = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True  # asked for this alone; the kernels ask a name of their own
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = before


def token_scores(logits: Tensor, labels: Tensor) -> SimpleNamespace:
    """What the fused head of TRL 1.16 returns about the predicted tokens.

    Args:
        logits: [m, S, V].
        labels: [m, S], -100 where nothing is to be predicted.

    Returns:
        `log_probs` and `entropy`, float32, and `is_top1` and `label_mask`, bool; each [m, S - 1], and 0 where nothing is
        to be predicted. Only `log_probs` has a gradient.
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
