"""The optimization phase of an update: epochs over a rollout, an optimizer step of policy and value model per minibatch.

The loss of a microbatch is this rank's share of the loss of the whole minibatch, and shares are summed: how a minibatch is
cut into microbatches and spread over ranks does not change its gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from align.engine.split_passes import split_attention, split_response_loss, split_response_values
from align.generation.sampling import generator
from align.maths.kl import LOSS_ESTIMATORS
from align.maths.losses import loss_weights, policy_loss, value_loss
from align.maths.trajectory_balance import balance_loss, path_loss
from align.models.forward import response_loss, response_values, to_device
from align.ppo.bad_batches import skip_minibatch
from align.ppo.ppo_run import PPORun, Sums
from align.ppo.ptx import TextPass, ptx_gradient, ptx_passes
from align.ppo.rollout import RESPONSE_TOKEN, Rollout, per


@dataclass(slots=True)
class Experience(Rollout):
    """A rollout with advantages, returns and loss weights."""

    advantages: Tensor = per(RESPONSE_TOKEN)  # [B, T] float32
    returns: Tensor = per(RESPONSE_TOKEN)  # [B, T] float32
    weights: Tensor = per(RESPONSE_TOKEN)  # [B, T] float32, weight of each token in the minibatch's policy loss


def optimize(run: PPORun, rollout: Rollout, advantages: Tensor, returns: Tensor, update: int) -> dict[str, float]:
    """Train for `num_ppo_epochs` epochs on the rollout; returns metrics as `take_steps`.

    Args:
        advantages, returns: [B, T].
        update: index of the update, from 0.
    """
    return take_steps(run, minibatches(run, rollout, advantages, returns, update), update)


def take_steps(run: PPORun, batches: Iterable[Experience], update: int) -> dict[str, float]:
    """Take an optimizer step on each minibatch; returns metrics as means over the tokens of these minibatches.

    A minibatch whose loss is NaN or infinite is saved under `bad_batches/` and skipped.

    Args:
        batches: minibatches; the next one is requested after the step on the previous one.

    Raises:
        UserError: the losses of several minibatches in a row were not finite.
    """
    recipe, models, clock = run.recipe, run.models, run.world.clock
    policy_rate, value_rate = run.learning_rates[update]
    totals: dict[str, float] = defaultdict(float)
    first_ratio, steps, skipped = None, 0, 0
    for number, minibatch in enumerate(batches):
        sums = accumulate_gradients(run, minibatch, update, number)
        if not all(map(math.isfinite, sums.values())):
            skipped += 1
            skip_minibatch(run, minibatch, f"update-{update + 1}-minibatch-{number + 1}", sums)
            continue
        run.skipped_in_a_row = 0
        if first_ratio is None and "policy/ratio" in sums:
            first_ratio = sums["policy/ratio"] / sums["tokens"]
        if sums.get("policy/approx_kl", 0.0) / sums["tokens"] > (recipe.max_approx_kl or math.inf):
            models.discard()  # on every rank, since the sums are those of all ranks
            break
        if trains_policy(run, update):
            with clock.phase("update_policy"):
                sums["policy/grad_norm"] = models.policy.step(policy_rate) * sums["tokens"]
        if models.value is not None:
            with clock.phase("update_value"):
                sums["value/grad_norm"] = models.value.step(value_rate) * sums["tokens"]
        steps += 1
        for name, value in sums.items():
            totals[name] += value
    tokens = totals.pop("tokens", 1.0)
    ptx = {"ptx/loss": totals.pop("ptx/loss") / totals.pop("ptx/tokens")} if "ptx/loss" in totals else {}
    metrics = {name: total / tokens for name, total in totals.items()} | ptx
    metrics |= {"policy/steps": steps, "policy/skipped": skipped, "policy/learning_rate": policy_rate}
    if models.value is not None:
        metrics["value/learning_rate"] = value_rate
    if first_ratio is not None:
        metrics["policy/first_ratio"] = first_ratio
    return metrics


def trains_policy(run: PPORun, update: int) -> bool:
    """Whether this update trains the policy; the first `value_warmup_updates` train the value model only."""
    return update >= run.recipe.value_warmup_updates


def minibatches(
    run: PPORun, rollout: Rollout, advantages: Tensor, returns: Tensor, update: int
) -> Iterator[Experience]:
    """Minibatches of `minibatch_size` rows, from a new seeded permutation of the rollout in each of `num_ppo_epochs`."""
    recipe = run.recipe
    measured = {part.name: getattr(rollout, part.name) for part in fields(rollout)}
    experience = Experience(**measured, advantages=advantages, returns=returns, weights=torch.zeros_like(advantages))
    for epoch in range(recipe.num_ppo_epochs):
        order = torch.randperm(len(rollout), generator=generator(recipe.seed, "minibatches", update, epoch))
        for index in order.to(run.world.device).view(-1, recipe.minibatch_size):
            minibatch = experience.rows(index)
            minibatch.weights = loss_weights(minibatch.mask, recipe.estimator.aggregation, recipe.response_length)
            yield minibatch


def accumulate_gradients(run: PPORun, minibatch: Experience, update: int, number: int) -> dict[str, float]:
    """Forward and backward on this rank's rows of a minibatch, and on PPO-ptx's; returns sums over all ranks by metric.

    Ranks that share rows each count them whole, tokens too: what is logged are means over tokens.
    """
    tokens, device = minibatch.mask.sum(), run.world.device
    lengths = minibatch.sizes.tolist()
    passes = run.plan.passes(lengths)
    mine = passes[run.world.rank // run.plan.sequence_parallel_size]
    trains = trains_policy(run, update)
    texts: list[TextPass] = []
    if run.ptx is not None and trains:
        texts = ptx_passes(run, run.ptx, update * run.recipe.steps_per_update + number)
    run.models.policy.begin_step(len(mine) + len(texts))
    if run.models.value is not None:
        run.models.value.begin_step(len(mine))
    parts: list[Sums] = []
    with split_rows(run):
        for part in mine:
            batch = minibatch.rows(to_device(torch.tensor(part), device))
            sums = {"tokens": batch.mask.sum()}
            if trains:
                sums |= policy_gradient(run, batch, tokens) if run.replay is None else balance_gradient(run, batch)
            if run.models.value is not None:
                of_prompts = run.recipe.objective == "trajectory_balance"
                gradient = prompt_value_gradient if of_prompts else value_gradient
                sums |= gradient(run, batch, tokens)
            parts.append(sums)
    parts += ptx_gradient(run, texts)
    total = sum_over_ranks(run, parts)
    total["policy/padding"] = padding(passes, lengths) * total["tokens"]
    return total | balance_sums(run, minibatch, total["tokens"]) if run.replay is not None else total


def padding(passes: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int]) -> float:
    """Share of padding among the tokens of the passes of all ranks."""
    padded = sum(len(rows) * max(lengths[row] for row in rows) for each in passes for rows in each)
    return 1.0 - sum(lengths) / padded


def split_rows(run: PPORun) -> contextlib.AbstractContextManager[None]:
    """Inside, the models that train compute this rank's part of the rows that it shares with others, if it does."""
    trained = [engine for engine in (run.models.policy, run.models.value) if engine is not None]
    return contextlib.nullcontext() if run.sequence is None else split_attention(*trained)


def policy_gradient(run: PPORun, batch: Experience, tokens: Tensor) -> Sums:
    """Forward and backward of the policy on m responses with n real tokens; the whole minibatch has `tokens`."""
    recipe, kl_coef = run.recipe, run.progress.kl_coef
    with run.world.clock.phase("update_policy"):
        ids, mask = batch.sequences()  # [m, S]
        real = batch.mask.flatten().nonzero().squeeze(1)  # [n]
        old, reference, advantage, weight = (
            numbers.flatten()[real]
            for numbers in (batch.old_logprobs, batch.ref_logprobs, batch.advantages, batch.weights)
        )  # [n]

        def objective(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
            loss = policy_loss(logprobs, old[part], advantage[part], recipe.cliprange, recipe.dual_clip).loss
            if recipe.entropy_coef > 0:
                loss = loss - recipe.entropy_coef * entropy
            if recipe.use_kl_loss:
                loss = loss + kl_coef * LOSS_ESTIMATORS[recipe.kl_estimator](logprobs, reference[part])
            return (loss * weight[part]).sum()

        length = batch.mask.shape[1]
        whole_or_part = response_loss if run.sequence is None else partial(split_response_loss, run.sequence)
        loss, logprobs, entropy = whole_or_part(run.models.policy, ids, mask, length, recipe.temperature, objective)
        run.models.policy.backward(loss)
        policy = policy_loss(logprobs, old, advantage, recipe.cliprange, recipe.dual_clip)
        sums = {
            "policy/loss": (policy.loss * weight).sum() * tokens,
            "policy/ratio": policy.ratio,
            "policy/clipfrac": policy.clipped,
            "policy/approx_kl": policy.approx_kl,
            "objective/entropy": entropy.sum(),
        }
        if recipe.use_kl_loss:
            sums["policy/kl_loss"] = LOSS_ESTIMATORS[recipe.kl_estimator](logprobs, reference).sum()
    return sums


def balance_gradient(run: PPORun, batch: Experience) -> Sums:
    """Forward and backward of the policy on m responses, for `trajectory_balance` and `path_consistency`."""
    with run.world.clock.phase("update_policy"):
        ids, mask = batch.sequences()  # [m, S]
        scaled = (batch.advantages * batch.weights)[batch.mask]  # [n]

        def objective(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
            return -(scaled[part] * logprobs).sum()

        length = batch.mask.shape[1]
        loss, _, entropy = response_loss(run.models.policy, ids, mask, length, run.recipe.temperature, objective)
        run.models.policy.backward(loss)
    return {"objective/entropy": entropy.sum()}


def balance_sums(run: PPORun, minibatch: Experience, tokens: float) -> dict[str, float]:
    """Loss and residual of a minibatch of a balance, times its tokens, since other metrics are sums over tokens."""
    recipe, kl_coef = run.recipe, run.progress.kl_coef
    if recipe.objective == "path_consistency":
        loss = float(path_loss(minibatch.returns - minibatch.values, minibatch.mask, kl_coef))
    else:
        loss = float(balance_loss(minibatch.advantages[:, 0], kl_coef, recipe.num_generations))
    return {
        "policy/loss": loss / recipe.response_length * tokens,
        "policy/residual": (2 * loss / kl_coef) ** 0.5 * tokens,
    }


def value_gradient(run: PPORun, batch: Experience, tokens: Tensor) -> Sums:
    """Forward and backward of the value model on m responses; the loss is a mean over the minibatch's `tokens`."""
    assert run.models.value is not None
    with run.world.clock.phase("update_value"):
        values = token_values(run, batch)
        value = value_loss(values, batch.values, batch.returns, batch.mask, run.recipe.cliprange_value)
        run.models.value.backward(value.loss.sum() / tokens)
    return {"value/loss": value.loss.detach().sum(), "value/clipfrac": value.clipped}


def prompt_value_gradient(run: PPORun, batch: Experience, tokens: Tensor) -> Sums:
    """Forward and backward of the value model on m prompts, for `trajectory_balance` with one response to a prompt."""
    assert run.models.value is not None
    with run.world.clock.phase("update_value"):
        loss = 0.5 * (prompt_values(run, batch) - batch.returns[:, 0]).square()  # [m]
        loss = loss.sum() / run.recipe.minibatch_size
        run.models.value.backward(loss)
    return {"value/loss": loss.detach() * tokens}


def token_values(run: PPORun, batch: Rollout) -> Tensor:
    """The value of the state before each response token, [m, T] float32; 0 at padding."""
    assert run.models.value is not None
    whole_or_part = response_values if run.sequence is None else partial(split_response_values, run.sequence)
    return whole_or_part(run.models.value, *batch.sequences(), batch.mask.shape[1])


def prompt_values(run: PPORun, batch: Rollout) -> Tensor:
    """The value of each prompt, before its response, [m] float32."""
    assert run.models.value is not None
    return response_values(run.models.value, *batch.sequences(1), 1)[:, 0]


def sum_over_ranks(run: PPORun, parts: list[Sums]) -> dict[str, float]:
    """The sums of all microbatches on all ranks, in one reduction."""
    names = list(dict.fromkeys(name for part in parts for name in part))
    zero = torch.zeros((), device=run.world.device)
    mine = [torch.stack([part.get(name, zero).double() for part in parts]).sum() for name in names]
    return dict(zip(names, run.world.sum(torch.stack(mine)).tolist(), strict=True))
