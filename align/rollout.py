"""Sample responses and score them: the Rollout record that everything after it is computed from.

Randomness belongs to the row, not to the process: the noise of response i is a function of the seed and i
alone. A batch may be cut over any number of ranks, sorted, or resumed, and the same responses come out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from align.config import UserError
from align.data import Prompt, as_response
from align.engine import Engine
from align.evaluation import repetition
from align.kv_cache import closed_ranks, roomy_cache
from align.models import position_ids, response_logprobs, response_values
from align.world import World
from reward_models import Responses, RewardSum, passes


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


def uniforms(seed: int, purpose: str, indexes: Sequence[int], length: int) -> Tensor:
    """Noise in [0, 1) for the responses numbered `indexes`, [B, length] float32, a pure function of its arguments."""
    return torch.stack([torch.rand(length, generator=generator(seed, purpose, index)) for index in indexes])


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A random generator of its own for everything that has a name."""
    digest = hashlib.sha256("/".join(map(str, (seed, *name))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> ids [B, Q] int64 padded on the left, and their mask [B, Q] bool."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return ids, mask


def pad_right(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Rows of numbers -> [B, S] int64 padded on the right, and their mask [B, S] bool."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row) + [filler] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


BLOCK = 256


def sample(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row by inverse transform sampling: the first whose cumulative probability exceeds the noise.

    Cumulative sums of blocks of the vocabulary find the block, and those inside it the token: one sum over everything
    would take longer than all else here.

    Args:
        logits: [B, V].
        noise: [B] in [0, 1).
        temperature: 0 takes the likeliest token, whatever the noise.

    Returns:
        tokens [B]; their log-probabilities [B] float32, nats, at temperature 1 if it is 0.
    """
    scaled = logits.float()
    if temperature not in (0, 1):
        scaled = scaled / temperature
    rows, vocabulary = scaled.shape
    top = scaled.amax(dim=-1, keepdim=True)
    weights = scaled.new_zeros(rows, -(-vocabulary // BLOCK) * BLOCK)
    torch.sub(scaled, top, out=weights[:, :vocabulary]).exp_()
    weights = weights.view(rows, -1, BLOCK)
    ends = weights.sum(dim=-1).cumsum(dim=-1)
    total = ends[:, -1:]
    if temperature == 0:
        tokens = scaled.argmax(dim=-1, keepdim=True)
    else:
        threshold = noise[:, None] * total
        block = (ends <= threshold).sum(dim=-1, keepdim=True).clamp(max=ends.shape[1] - 1)
        inside = weights.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1)
        before = ends.gather(1, block) - inside.sum(dim=-1, keepdim=True)
        beyond = (inside.cumsum(dim=-1) + before > threshold) & (inside > 0)
        # Rounding may leave none beyond the threshold: then the block's likeliest.
        place = torch.where(beyond.any(dim=-1), beyond.int().argmax(dim=-1), inside.argmax(dim=-1))
        tokens = block * BLOCK + place[:, None]
    logprobs = scaled.gather(1, tokens) - top - total.log()
    return tokens.squeeze(1), logprobs.squeeze(1)


@torch.no_grad()
def generate(
    model: nn.Module | Engine,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    noise: Tensor,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    anyone: Callable[[bool], bool] = bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample a response to each prompt from softmax(logits / temperature), the whole distribution.

    At temperature 0 the likeliest tokens, with their log-probabilities at temperature 1.

    Args:
        model: a causal language model that takes a key-value cache.
        prompt_ids, prompt_mask: [B, Q], padded on the left.
        noise: [B, T]; T is the most tokens of a response.
        anyone: given whether this rank has unfinished rows, tells whether any rank has. Under a sharded model
            all ranks must take the same number of steps.

    Returns:
        response_ids, mask and logprobs [B, T'] with T' <= T: up to and including end-of-text, padded on the right;
        log-probabilities (float32, nats) are those of the distributions that were sampled from.
    """
    count, width = prompt_ids.shape
    rows = torch.arange(count, device=prompt_ids.device)  # which response each row of the batch is
    responses = torch.full(noise.shape, pad_token_id, device=prompt_ids.device)
    mask = torch.zeros(noise.shape, dtype=torch.bool, device=prompt_ids.device)
    logprobs = torch.zeros(noise.shape, device=prompt_ids.device)
    cache = roomy_cache((model.module if isinstance(model, Engine) else model).config, width + noise.shape[1])
    ids, positions = prompt_ids, position_ids(prompt_mask)
    real = F.pad(prompt_mask, (0, noise.shape[1]), value=True)
    done = False
    for step in range(noise.shape[1]):
        output = model(
            input_ids=ids,
            attention_mask=real[:, : width + step].long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        positions = positions[:, -1:] + 1
        if not done:
            tokens, chances = sample(output.logits[:, -1], noise[rows, step], temperature)
            responses[rows, step], logprobs[rows, step], mask[rows, step] = tokens, chances, True
            ids, alive = tokens[:, None], tokens != eos_token_id
            done = not alive.any()
            if not alive.all():  # rows that have ended stop costing anything, but for one that others may wait with
                alive[0] |= done
                order = closed_ranks(alive)
                cache.batch_select_indices(order)
                rows, ids, positions, real = (tensor[order] for tensor in (rows, ids, positions, real))
        if not anyone(not done):
            break
    length = int(mask.sum(dim=1).max())
    return responses[:, :length], mask[:, :length], logprobs[:, :length]


def chunks(count: int, size: int) -> list[slice]:
    """`count` rows in pieces of at most `size`; the pieces depend on nothing else, so ranks stay in step."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True, slots=True)
class Sampler:
    """How responses are drawn: the settings that training, evaluation and every log-probability share."""

    tokenizer: PreTrainedTokenizerBase
    temperature: float
    response_length: int
    batch_size: int
    seed: int
    gather: bool = True

    def respond(
        self, engine: Engine, world: World, prompts: Sequence[Sequence[int]], purpose: str, indexes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Responses of `engine` to this rank's prompts.

        Returns:
            prompt_ids, prompt_mask [B, Q], response_ids, mask, logprobs [B, T'].
        """
        pad = int(self.tokenizer.pad_token_id)
        prompt_ids, prompt_mask = (tensor.to(world.device) for tensor in pad_left(prompts, pad))
        noise = uniforms(self.seed, purpose, indexes, self.response_length).to(world.device)
        responses = torch.full(noise.shape, pad, device=world.device)
        mask = torch.zeros(noise.shape, dtype=torch.bool, device=world.device)
        logprobs = torch.zeros(noise.shape, device=world.device)

        def anyone(unfinished: bool) -> bool:
            return bool(world.max(torch.tensor(float(unfinished), device=world.device)))

        def fill(model: nn.Module | Engine, together: Callable[[bool], bool]) -> None:
            for part in chunks(len(prompts), self.batch_size):
                ids, real, chances = generate(
                    model, prompt_ids[part], prompt_mask[part], noise[part], self.temperature,
                    int(self.tokenizer.eos_token_id), pad, together,
                )  # fmt: skip
                for whole, piece in ((responses, ids), (mask, real), (logprobs, chances)):
                    whole[part, : ids.shape[1]] = piece

        if self.gather:
            with engine.whole() as model:
                fill(model, bool)
        else:
            fill(engine, anyone)
        length = int(mask.sum(dim=1).max())
        return prompt_ids, prompt_mask, responses[:, :length], mask[:, :length], logprobs[:, :length]


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
