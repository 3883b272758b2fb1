"""Sample responses and score them: the Rollout record that everything after it is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from align.data.rows import Prompt, as_response
from align.engine.distributed import World
from align.engine.torch_engine import Engine
from align.errors import UserError
from align.evaluate.statistics import repetition
from align.generation.sampler import Sampler
from align.models.forward import response_logprobs, response_values
from reward_models.combine import RewardSum
from reward_models.responses import Responses, passes


@dataclass(slots=True)
class Rollout:
    """B responses and all that was measured of them at sampling time. Masks are True on real tokens.

    Prompts are padded on the left to Q, responses on the right to T. Log-probabilities are in nats at the
    sampling temperature. `values[:, t]` judges the state before response token t.
    """

    prompt_ids: Tensor  # [B, Q] int64
    prompt_mask: Tensor  # [B, Q] bool
    response_ids: Tensor  # [B, T] int64, the end-of-text token included
    mask: Tensor  # [B, T] bool
    ended: Tensor  # [B] bool, whether the response ends with end-of-text
    sampled_logprobs: Tensor  # [B, T] float32, as the generation loop had them
    old_logprobs: Tensor  # [B, T] float32, by the forward pass that training uses
    ref_logprobs: Tensor  # [B, T] float32
    values: Tensor  # [B, T] float32
    scores: Tensor  # [B] float32, weighted sum over the sources
    token_scores: Tensor  # [B, T] float32, the part of `scores` that sources gave to single tokens
    source_scores: Tensor  # [B, number of sources] float32
    repetition: Tensor  # [B] float32, share of repeated 3-grams

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Response tokens, [B] int64."""
        return self.mask.sum(dim=1)

    def rows(self, index: Tensor) -> Rollout:
        """The rows in `index`, without the padding columns that none of them needs."""
        picked = Rollout(**{field.name: getattr(self, field.name)[index] for field in fields(self)})
        first = int(picked.prompt_mask.float().argmax(dim=1).min())
        last = int(picked.lengths.max())
        for name in ("prompt_ids", "prompt_mask"):
            setattr(picked, name, getattr(picked, name)[:, first:])
        for name in (
            "response_ids",
            "mask",
            "sampled_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "values",
            "token_scores",
        ):
            setattr(picked, name, getattr(picked, name)[:, :last])
        return picked


@torch.no_grad()
def collect(
    world: World,
    sampler: Sampler,
    sampled: Engine,
    policy: Engine,
    reference: Engine,
    value: Engine | None,
    rewards: RewardSum,
    prompts: Sequence[tuple[Prompt, list[int]]],
    purpose: str,
    indexes: Sequence[int],
    missing_eos: Callable[[Tensor, Tensor], Tensor],
    trusted: bool = False,
) -> Rollout:
    """Sample from `sampled` and measure: this rank's share of a rollout batch.

    `policy` and `reference` judge the responses by the same forward pass that training uses, not by the
    numbers of the generation loop, so that the first ratio of an update is 1.

    Args:
        value: left out in evaluation; values are then 0.
        missing_eos: scores [B], ended [B] -> scores [B], what a response that does not end is worth.
        trusted: take the policy's log-probabilities from the generation loop after all, which saves a forward pass.
    """
    with world.clock.phase("generate"):
        prompt_ids, prompt_mask, response_ids, mask, sampled_logprobs = sampler.respond(
            sampled, world, [ids for _, ids in prompts], purpose, indexes
        )
    ids, real = torch.cat([prompt_ids, response_ids], dim=1), torch.cat([prompt_mask, mask], dim=1)
    ended = ((response_ids == sampler.tokenizer.eos_token_id) & mask).any(dim=1)
    length = mask.shape[1]

    def measure(name: str, forward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        measured = torch.zeros(mask.shape, device=world.device)
        with world.clock.phase(f"score_{name}"):
            for rows in passes(real.sum(dim=1).tolist(), sampler.batch_size):
                measured[rows] = forward(ids[rows], real[rows])
        return measured

    def logprobs(name: str, engine: Engine) -> Tensor:
        return measure(name, lambda i, m: response_logprobs(engine, i, m, length, sampler.temperature))

    batch = responses_of(
        sampler.tokenizer, [prompt for prompt, _ in prompts], prompt_ids, prompt_mask, response_ids, mask
    )
    try:
        with world.clock.phase("score_reward"):
            scores, sources, token_scores = rewards.score(batch)
    except ValueError as error:  # a reward function that fails; the message shows the row
        raise UserError(str(error)) from error
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        mask=mask,
        ended=ended,
        sampled_logprobs=sampled_logprobs,
        old_logprobs=sampled_logprobs if trusted else logprobs("policy", policy),
        ref_logprobs=logprobs("reference", reference),
        values=torch.zeros_like(mask, dtype=torch.float32)
        if value is None
        else measure("value", lambda i, m: response_values(value, i, m, length)),
        scores=missing_eos(scores.to(world.device), ended),
        token_scores=F.pad(token_scores, (0, length - token_scores.shape[1])).to(world.device),
        source_scores=torch.stack([score.to(world.device) for score in sources.values()], dim=1),
        repetition=torch.tensor([repetition(text) for text in batch.texts], device=world.device),
    )


def responses_of(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    mask: Tensor,
) -> Responses:
    """The batch as reward models and reward functions take it: ids without padding, and decoded text."""
    kept = [row[real].tolist() for row, real in zip(response_ids, mask, strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    columns: dict[str, list[Any]] = {
        name: [prompt.extra.get(name) for prompt in prompts]
        for name in dict.fromkeys(n for p in prompts for n in p.extra)
    }
    return Responses(
        prompts=[prompt.prompt for prompt in prompts],
        texts=texts,
        completions=[as_response(prompt.prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        prompt_ids=[row[real].tolist() for row, real in zip(prompt_ids, prompt_mask, strict=True)],
        response_ids=kept,
        columns=columns,
    )


def gather_rollout(rollout: Rollout, world: World, pad_token_id: int) -> Rollout:
    """All ranks' rows in rank order, on every rank: what follows is then computed on the whole batch by everyone.

    Ids, masks and per-token numbers are small beside the models, and global statistics need no further reduction.
    """
    if world.size == 1:
        return rollout
    widths = world.max(torch.tensor([rollout.prompt_ids.shape[1], rollout.mask.shape[1]], device=world.device)).tolist()
    gathered = {}
    for field in fields(rollout):
        tensor = getattr(rollout, field.name)
        if field.name.startswith("prompt"):
            tensor = F.pad(
                tensor, (widths[0] - tensor.shape[1], 0), value=pad_token_id if field.name == "prompt_ids" else 0
            )
        elif tensor.dim() == 2 and field.name != "source_scores":
            tensor = F.pad(
                tensor, (0, widths[1] - tensor.shape[1]), value=pad_token_id if field.name == "response_ids" else 0
            )
        gathered[field.name] = world.gather(tensor)
    return Rollout(**gathered)
