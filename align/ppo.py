"""Stage 3: PPO against the reward, with a KL penalty against the frozen SFT reference.

    align ppo recipes/quickstart/3_ppo.yaml
    deepspeed --num_gpus 8 --module align.ppo recipes/hh-rlhf/3_ppo.yaml

Four models: the policy and the value model train, the reference and the reward model are frozen. Each update
samples one rollout batch, turns scores into advantages, and takes `num_ppo_epochs` passes over the batch
(arXiv 1707.06347, 1909.08593, 2009.01325, 2203.02155). Every rank holds the whole rollout once it is scored,
so that whitening and minibatches are those of one process; only forward and backward passes are shared out.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.checkpoint import open_stage
from align.config import PPORecipe, UserError
from align.data import Prompt, load_rows
from align.engine import connect, disconnect
from align.maths.advantages import gae, token_rewards
from align.maths.kl import k1
from align.maths.losses import policy_loss, token_entropy, token_logprobs, value_loss
from align.maths.masked import masked_mean, masked_var, masked_whiten
from align.models import response_logits, response_values
from align.optimizer import learning_rates
from align.ppo_checkpoint import check_layout, load_checkpoint, save_checkpoint, save_policy
from align.ppo_evaluation import SAMPLE_COLUMNS, Evaluation, response_kl, summary
from align.ppo_setup import Models, check_inputs, check_room, functions, load_models
from align.recipes import BatchPlan, batch_plan, stage_inputs
from align.rollout import Rollout, Sampler, chunks, collect, gather_rollout, generator
from align.stage import already_finished, finish, last_checkpoint, step_of
from align.tokenization import PromptLoader, tokenize_prompts
from align.tracking import Tracker, quiet
from align.world import World


def run(recipe: PPORecipe) -> dict[str, Any]:
    """Train a policy by PPO; returns the closing numbers, also in `stage.json`."""
    quiet()
    sources = stage_inputs(recipe)
    if open_stage(recipe, "ppo", sources):
        return already_finished(recipe)
    world = connect(recipe)
    plan = batch_plan(recipe, world.size)
    inputs = check_inputs(recipe)
    rows = load_rows(recipe, Prompt)
    prompts, skipped = tokenize_prompts(rows.train, inputs.tokenizer, recipe.max_prompt_length, recipe.on_bad_row)
    held_out, skipped_held_out = tokenize_prompts(
        rows.evaluation, inputs.tokenizer, recipe.max_prompt_length, recipe.on_bad_row
    )
    world.check_rows(len(prompts))
    check_room([ids for _, ids in (*prompts, *held_out)], recipe, inputs.config)
    loader = PromptLoader(len(prompts), recipe.seed)
    updates = recipe.total_episodes // recipe.rollout_batch_size
    rates = learning_rates(recipe, updates)

    checkpoint = last_checkpoint(recipe, world)
    check_layout(recipe, world, checkpoint)
    start = step_of(checkpoint)
    with Tracker(recipe, "ppo", updates, resume_step=start) as tracker:
        tracker.say(plan.describe())
        models = load_models(recipe, inputs, plan, world)
        best = load_checkpoint(models, checkpoint)
        sampler = Sampler(
            tokenizer=inputs.tokenizer,
            temperature=recipe.temperature,
            response_length=recipe.response_length,
            batch_size=recipe.per_device_eval_batch_size,
            seed=recipe.seed,
            gather=recipe.ds3_gather_for_generation,
        )
        evaluation = None
        measured: dict[str, float] = {}
        samples: list[list[Any]] = []
        if held_out:
            truths = functions(recipe.eval_reward_funcs, "eval_reward_funcs")
            evaluation = Evaluation(world, sampler, models, held_out, truths, lambda s, e: missing_eos(recipe, s, e))
        for update in range(start, updates):
            began = time.perf_counter()
            indexes = loader.batch(update, recipe.rollout_batch_size)
            rollout = sample_rollout(recipe, world, sampler, models, prompts, indexes, update)
            sampled = time.perf_counter()
            advantages, returns = estimate_advantages(recipe, rollout)
            metrics = rollout_metrics(recipe, rollout, advantages, returns, models.reward_names)
            metrics |= optimise(recipe, plan, world, models, rollout, advantages, returns, update, rates[update])
            done = time.perf_counter()
            metrics |= {
                "objective/truncated": models.truncated(world),
                "episode": (update + 1) * recipe.rollout_batch_size,
                "epoch": (update + 1) * recipe.rollout_batch_size / len(prompts),
                "time/rollout": sampled - began,
                "time/update": done - sampled,
                "time/total": done - began,
                "time/tokens_per_second": float(rollout.mask.sum()) / (done - began),
            }
            step, last = update + 1, update + 1 == updates
            if step % recipe.logging_steps == 0 or last or step == 1:
                tracker.log(step, metrics)
            tracker.progress(step, score=metrics["objective/score"], kl=metrics["objective/kl"])
            if evaluation is not None and (last or (recipe.eval_steps and step % recipe.eval_steps == 0)):
                measured, samples = evaluation.run()
                tracker.log(step, measured)
                tracker.table(step, "samples", SAMPLE_COLUMNS, samples[: recipe.num_sample_rows])
                within = recipe.max_kl is None or measured["eval/kl"] <= recipe.max_kl
                if within and (best is None or measured["eval/score"] > best["eval/score"]):
                    best = {"update": step, **measured}
                    save_policy(models.policy, inputs.tokenizer, world, Path(recipe.output_dir) / "best")
            if recipe.save_steps and step % recipe.save_steps == 0 and not last:
                save_checkpoint(recipe, world, models, step, best)

        results: dict[str, Any] = {"updates": updates, "best": best, "table": []}
        if evaluation is not None:  # the last update has been evaluated
            results |= {**measured, "table": evaluation.table(measured)}
            results["samples"] = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in samples[:3]]
        save_policy(models.policy, inputs.tokenizer, world, Path(recipe.output_dir), whole_folder=False)
        save_policy(models.value, inputs.tokenizer, world, Path(recipe.output_dir) / "value")
        if world.is_main:
            data = {**rows.report, "skipped": {"train": skipped, "evaluation": skipped_held_out}}
            card = CARD.format(folder=recipe.output_dir, base=recipe.sft_model_path, kl_coef=recipe.kl_coef)
            finish(recipe, "ppo", sources, inputs.tokenizer, data, results, card)
    world.barrier()
    disconnect()
    return results


def missing_eos(recipe: PPORecipe, scores: Tensor, ended: Tensor) -> Tensor:
    """What a response that does not end is worth: its score less a penalty, or a constant in its place. All [B]."""
    if recipe.missing_eos_score is not None:
        return scores.masked_fill(~ended, recipe.missing_eos_score)
    return scores - (recipe.missing_eos_penalty or 0.0) * ~ended


def sample_rollout(
    recipe: PPORecipe, world: World, sampler: Sampler, models: Models, prompts: list[tuple[Prompt, list[int]]],
    indexes: list[int], update: int,
) -> Rollout:  # fmt: skip
    """Sample and score this rank's share of the rollout batch; returns everyone's, on every rank."""
    share = len(indexes) // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    episodes = range(update * recipe.rollout_batch_size, (update + 1) * recipe.rollout_batch_size)[mine]
    rollout = collect(
        world, sampler, models.policy, models.policy, models.reference, models.value, models.rewards,
        [prompts[index] for index in indexes[mine]], "train", list(episodes), lambda s, e: missing_eos(recipe, s, e),
    )  # fmt: skip
    return gather_rollout(rollout, world, int(sampler.tokenizer.pad_token_id))


def estimate_advantages(recipe: PPORecipe, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Whitened advantages and unwhitened returns, both [B, T]."""
    kl = k1(rollout.old_logprobs, rollout.ref_logprobs)
    rewards = token_rewards(rollout.scores, kl, rollout.mask, recipe.kl_coef)
    if recipe.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
    advantages, returns = gae(rewards, rollout.values, rollout.mask, recipe.gamma, recipe.lam)
    return masked_whiten(advantages, rollout.mask), returns


def rollout_metrics(
    recipe: PPORecipe, rollout: Rollout, advantages: Tensor, returns: Tensor, sources: list[str]
) -> dict[str, float]:
    """What is known before the update."""
    kl = response_kl(rollout)
    unexplained = masked_var(returns - rollout.values, rollout.mask) / masked_var(returns, rollout.mask).clamp(min=1e-8)
    return {
        **summary(rollout, sources, ""),
        "objective/score_std": float(rollout.scores.std(correction=0)),
        "objective/kl": float(kl.mean()),
        "objective/reward": float((rollout.scores - recipe.kl_coef * kl).mean()),
        "value/mean": float(masked_mean(rollout.values, rollout.mask)),
        "value/explained_variance": 1.0 - float(unexplained),
        "advantage/std": float(masked_var(returns - rollout.values, rollout.mask).sqrt()),
    }


def optimise(
    recipe: PPORecipe, plan: BatchPlan, world: World, models: Models, rollout: Rollout, advantages: Tensor,
    returns: Tensor, update: int, rates: tuple[float, float],
) -> dict[str, float]:  # fmt: skip
    """`num_ppo_epochs` passes over the rollout, one optimiser step of policy and value per minibatch.

    Raises:
        UserError: a loss is NaN or infinite; nothing is stepped then.
    """
    totals = torch.zeros(8, device=world.device, dtype=torch.float64)
    norms, first_ratio = torch.zeros(2, dtype=torch.float64), None
    for epoch in range(recipe.num_ppo_epochs):
        order = torch.randperm(len(rollout), generator=generator(recipe.seed, "minibatches", update, epoch)).to(
            world.device
        )
        for minibatch in torch.split(order, recipe.minibatch_size):
            tokens = rollout.mask[minibatch].sum()  # of all ranks: every loss is a sum divided by it
            sums = torch.zeros_like(totals)
            for part in chunks(plan.micro_batch_size * plan.accumulation, plan.micro_batch_size):
                index = minibatch[world.rank :: world.size][part]
                sums += train_on(recipe, models, rollout.rows(index), advantages[index], returns[index], tokens)
            sums = world.sum(sums)
            if not bool(sums.isfinite().all()):
                raise UserError(
                    f"update {update + 1}: the loss is not finite (policy {float(sums[0])}, value {float(sums[1])}). "
                    "Lower learning_rate, check that scores are of order 1, or resume from the last checkpoint."
                )
            if first_ratio is None:
                first_ratio = float(sums[2] / sums[7])
            totals += sums
            norms += torch.tensor([models.policy.step(rates[0]), models.value.step(rates[1])], dtype=torch.float64)
    means = (totals / totals[7]).tolist()
    steps = recipe.num_ppo_epochs * (len(rollout) // recipe.minibatch_size)
    names = [
        "policy/loss",
        "value/loss",
        "policy/ratio",
        "policy/clipfrac",
        "policy/approx_kl",
        "value/clipfrac",
        "objective/entropy",
    ]
    return {
        **dict(zip(names, means, strict=False)),
        "policy/first_ratio": first_ratio or math.nan,
        "policy/grad_norm": float(norms[0]) / steps,
        "value/grad_norm": float(norms[1]) / steps,
        "policy/learning_rate": rates[0],
        "value/learning_rate": rates[1],
    }


def train_on(
    recipe: PPORecipe, models: Models, batch: Rollout, advantages: Tensor, returns: Tensor, tokens: Tensor
) -> Tensor:
    """Forward and backward of one microbatch. Returns its sums over real tokens, in the order of `optimise`, [8]."""
    length = batch.mask.shape[1]
    advantages, returns = advantages[:, :length], returns[:, :length]
    ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)
    mask = torch.cat([batch.prompt_mask, batch.mask], dim=1)

    logits = response_logits(models.policy, ids, mask, length)
    logprobs = token_logprobs(logits, batch.response_ids, recipe.temperature)
    policy = policy_loss(logprobs, batch.old_logprobs, advantages, batch.mask, recipe.cliprange)
    models.policy.backward(policy.loss / tokens)
    with torch.no_grad():
        entropy = token_entropy(logits, recipe.temperature).masked_fill(~batch.mask, 0.0).sum()
    del logits

    values = response_values(models.value, ids, mask, length)
    value = value_loss(values, batch.values, returns, batch.mask, recipe.cliprange_value)
    models.value.backward(value.loss / tokens)
    return torch.stack(
        [policy.loss.detach(), value.loss.detach(), policy.ratio, policy.clipped, policy.approx_kl, value.clipped,
         entropy, batch.mask.sum()]
    ).double()  # fmt: skip


CARD = """# Language model, trained by PPO

From the SFT model {base}, with a KL penalty of {kl_coef} per nat against it. This folder holds the last policy, `best/`
the one with the highest evaluation score, `value/` the value model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""

if __name__ == "__main__":
    from align.__main__ import run_stage_cli

    run_stage_cli("ppo")
