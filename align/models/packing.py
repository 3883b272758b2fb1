"""Whether an architecture keeps the examples of a packed row apart; tried on a small model of its configuration.

A packed or padding-free row is several examples one after another, told apart by position ids that begin at 0 again.
Models that build their mask from these ids compute each example as if it were alone. Others attend to the examples before
(OPT, BLOOM, MPT, gpt-oss), carry a recurrent state over (Mamba, RWKV, hybrids) or round positions that are
far from 0 (Falcon with ALiBi), without an error: their losses are then off by up to several nats.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from align.errors import UserError, reason
from align.models.context_length import max_positions
from align.models.small_model import small_model

LENGTHS = (400, 9, 1, 12)  # of the examples; behind the long one, positions that bfloat16 rounds
TOLERANCE = 1e-3  # nats; rounding gives 1e-5, examples that are not kept apart 0.03 to 14
VOCABULARY = 64


def check_packing(
    config: PretrainedConfig, key: str, trust_remote_code: bool, attention: str | None = None, tokens: int = 0
) -> None:
    """Check that a model of this configuration gives the tokens of packed examples the log-probabilities that it gives alone.

    Args:
        key: of the recipe that packs, `packing` or `padding_free`.
        attention: the recipe's `attn_implementation`.
        tokens: that a batch, which is one row to the model, may have.

    Raises:
        UserError: it does not, it cannot be tried, or it reads no row of so many tokens, however short their examples are.
    """
    kernel = attention if attention in ("eager", "sdpa") else None  # others need a GPU
    try:
        model = small_model(config, VOCABULARY, trust_remote_code=trust_remote_code, attn_implementation=kernel)
        gap = packing_gap(model, example_rows(LENGTHS, VOCABULARY))
    except Exception as error:  # of any architecture that knows no packed rows
        why = f"cannot be computed: {reason(error)}"
    else:
        if gap <= TOLERANCE:
            limit = max_positions(config)
            if limit is not None and tokens > limit:
                _check_long_rows(config, key, trust_remote_code, kernel, tokens, limit)
            return
        why = f"get log-probabilities that are off by up to {gap:.2g} nats, because it does not keep them apart"
    raise UserError(
        f"{key}: packed examples in a model of type {config.model_type} {why} (tried on a small random model); "
        f"set {key}: false."
    )


def _check_long_rows(
    config: PretrainedConfig, key: str, trust_remote_code: bool, kernel: str | None, tokens: int, limit: int
) -> None:
    """Check that a model reads rows of more tokens than it has positions; GPT-Neo's mask is no longer than these."""
    try:
        model = small_model(
            config,
            VOCABULARY,
            positions=sum(LENGTHS) - 1,
            trust_remote_code=trust_remote_code,
            attn_implementation=kernel,
        )
        packing_gap(model, example_rows(LENGTHS, VOCABULARY))
    except Exception as error:
        raise UserError(
            f"{key}: a batch of packed examples may have {tokens} tokens (max_length times the larger of "
            f"per_device_train_batch_size and per_device_eval_batch_size), and a model of type {config.model_type} reads at most "
            f"its {limit} positions at once; lower them, or set {key}: false."
        ) from error


def example_rows(lengths: tuple[int, ...], vocabulary: int) -> list[list[int]]:
    """Rows of random ids."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def packing_gap(model: PreTrainedModel, rows: list[list[int]]) -> float:
    """Largest difference in any log-probability between rows that are packed as in training and rows alone, nats."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling  # only here: it imports all of TRL's trainer

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": row, "labels": row} for row in rows])
    del batch["labels"]
    batch = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    packed = model(**batch, use_cache=False).logits[0].float().log_softmax(dim=-1)
    alone = [
        model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0].float() for row in rows
    ]
    return float((packed - torch.cat(alone).log_softmax(dim=-1)).abs().max())
