"""Whether TRL's fused LM head serves a model, and the scores it returns, computed from logits where it does not.

The fused head multiplies the hidden states by the weight of the output embeddings, a chunk of tokens at a time. TRL versions
before 1.15 have none, and some models compute more than that (ModernBERT's decoder and BERT as one: a layer and a norm before).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from align.compat.trl import fused_log_probs, has_fused_head
from align.data.tokenize import IGNORE_INDEX
from align.maths.losses import token_logprobs
from align.models.packing import TOLERANCE, VOCABULARY, example_rows
from align.models.small_model import small_model

HAS_FUSED_HEAD = has_fused_head()


@torch.no_grad()
def fused_head_is_exact(config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether the fused head gives the log-probabilities of the model itself; tried on a small model of its configuration."""
    if not HAS_FUSED_HEAD:
        return False
    ids = torch.tensor(example_rows((12,), VOCABULARY))
    try:
        model = small_model(config, VOCABULARY, trust_remote_code=trust_remote_code)
        own = token_logprobs(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], 1.0)
        return bool((fused_log_probs(model, ids)[0] - own).abs().max() <= TOLERANCE)
    except Exception:  # of any architecture that it does not know; logits are right for all
        return False


@torch.no_grad()
def has_router_loss(config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether the model computes a loss of its router when asked to; tried on a small model of its configuration."""
    if not hasattr(config.get_text_config(), "output_router_logits"):
        return False
    try:
        model = small_model(config, VOCABULARY, trust_remote_code=trust_remote_code)
        output = model(
            input_ids=torch.tensor(example_rows((12,), VOCABULARY)), use_cache=False, output_router_logits=True
        )
    except Exception:  # as for the head
        return False
    return getattr(output, "aux_loss", None) is not None


def token_scores(logits: Tensor, labels: Tensor) -> SimpleNamespace:
    """The scores of predicted tokens that the fused head of TRL 1.16 returns, each [m, S - 1].

    Args:
        logits: [m, S, V].
        labels: [m, S], -100 where the loss ignores a token.
    """
    return label_scores(logits[:, :-1], labels[:, 1:])


def label_scores(logits: Tensor, labels: Tensor) -> SimpleNamespace:
    """The scores of labels by the logits at their own places.

    Args:
        logits: [m, T, V].
        labels: [m, T], -100 where the loss ignores a token.

    Returns:
        `log_probs` and `entropy`, float32, and `is_top1` and `label_mask`, bool; each [m, T], and 0 at ignored tokens.
        Only `log_probs` has a gradient.
    """
    mask = labels != IGNORE_INDEX
    all_log_probs = logits.float().log_softmax(dim=-1)
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
