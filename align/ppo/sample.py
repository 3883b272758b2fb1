"""Sample responses and score them: the first half of an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from align.engine.batch_plan import pack_by_length
from align.engine.engine import Engine
from align.errors import UserError
from align.evaluate.statistics import repetition
from align.generation.responses import decode_responses
from align.generation.sampler import PromptBatch, Samples
from align.maths.advantages import missing_eos_scores
from align.models.forward import response_logprobs, response_values, to_device
from align.ppo.ppo_run import PPORun
from align.ppo.rollout import Rollout
from reward_models.responses import passes


def sample_responses(run: PPORun, batch: PromptBatch) -> Samples:
    """Responses of the policy to this rank's b prompts, up to T tokens each."""
    with run.world.clock.phase("generate"):
        return run.sampler.sample(run.models.policy, run.world, batch)


@torch.no_grad()
def score_responses(run: PPORun, samples: Samples, recompute: bool = True) -> Rollout:
    """Log-probabilities under policy and reference, values and scores of this rank's b responses.

    Policy and reference run the same forward pass as in training, not the decoding loop, so that the first ratio of an
    update is exactly 1.

    Args:
        recompute: run that pass for the policy too; false takes the log-probabilities of the decoding loop.

    Raises:
        UserError: a reward function failed; the message shows the row.
    """
    models, sampler, world = run.models, run.sampler, run.world
    ids = torch.cat([samples.prompt_ids, samples.response_ids], dim=1)  # [b, S]
    real = torch.cat([samples.prompt_mask, samples.mask], dim=1)  # [b, S]
    mask, length = samples.mask, samples.mask.shape[1]
    parts = scoring_parts(run, real.sum(dim=1).tolist())

    def in_passes(phase: str, forward: Callable[..., Tensor], engine: Engine) -> Tensor:
        measured = torch.zeros(mask.shape, device=world.device)
        with world.clock.phase(phase):
            for part in parts:
                rows = to_device(torch.tensor(part), world.device)
                measured[rows] = forward(engine, ids[rows], real[rows], length)
        return measured  # [b, T]

    def logprobs(engine: Engine, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        return response_logprobs(engine, ids, mask, length, sampler.temperature)

    responses = decode_responses(sampler.tokenizer, samples.prompts, samples)
    try:
        with world.clock.phase("score_reward"):
            scores, sources, token_scores = models.rewards.score(responses)
    except ValueError as error:
        raise UserError(str(error)) from error
    recipe = run.recipe
    return Rollout(
        prompt_ids=samples.prompt_ids,
        prompt_mask=samples.prompt_mask,
        response_ids=samples.response_ids,
        mask=mask,
        ended=samples.ended,
        sampled_logprobs=samples.logprobs,
        old_logprobs=in_passes("score_policy", logprobs, models.policy) if recompute else samples.logprobs,
        ref_logprobs=in_passes("score_reference", logprobs, models.reference),
        values=torch.zeros_like(samples.logprobs)
        if models.value is None or run.replay is not None  # then minibatches ask the value model of their time
        else in_passes("score_value", response_values, models.value),
        scores=missing_eos_scores(
            scores.to(world.device), samples.ended, recipe.missing_eos_penalty, recipe.missing_eos_score
        ),
        token_scores=F.pad(token_scores, (0, length - token_scores.shape[1])).to(world.device),
        source_scores=torch.stack([score.to(world.device) for score in sources.values()], dim=1),
        repetition=torch.tensor(
            [repetition(text) for text in map("".join, zip(responses.reasoning, responses.texts, strict=True))],
            device=world.device,
        ),
    )


def scoring_parts(run: PPORun, lengths: Sequence[int]) -> list[list[int]]:
    """Rows of each forward pass without gradients over this rank's responses; all ranks have equally many passes.

    Args:
        lengths: tokens of each prompt with its response.
    """
    max_tokens, world = run.plan.max_tokens, run.world
    if max_tokens is None:
        return passes(lengths, run.recipe.per_device_eval_batch_size, run.scoring_passes)
    rows = range(len(lengths))
    needed = torch.tensor(len(pack_by_length(rows, lengths, max_tokens)), device=world.device)
    return pack_by_length(rows, lengths, max_tokens, int(world.max(needed)))
