"""Stage 3: PPO against the reward, with a KL penalty against the frozen SFT reference.

    align ppo recipes/quickstart/3_ppo.yaml
    deepspeed --num_gpus 8 --module align.ppo recipes/hh-rlhf/3_ppo.yaml

Four models: the policy and the value model train, the reference and the reward model are frozen. Each update
samples one rollout batch, turns scores into advantages, and takes `num_ppo_epochs` passes over the batch
(arXiv 1707.06347, 1909.08593, 2009.01325, 2203.02155). Every rank holds the whole rollout once it is scored,
so that whitening and minibatches are those of one process; only forward and backward passes are shared out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.checkpoint import open_stage
from align.collapse import CollapseWatch
from align.config import PPORecipe, SFTRecipe
from align.data import Demonstration, Prompt, load_rows
from align.ema import EMA
from align.engine import connect, disconnect
from align.maths.advantages import CRITIC_FREE, gae, token_rewards
from align.maths.kl import adapted_kl_coef, k1
from align.maths.masked import masked_mean, masked_var, masked_whiten
from align.optimizer import learning_rates
from align.ppo_checkpoint import Progress, load_checkpoint, save_checkpoint, save_policy
from align.ppo_evaluation import SAMPLE_COLUMNS, Evaluation, response_kl, summary
from align.ppo_setup import Models, check_inputs, check_room, functions, load_models
from align.ppo_update import Updater
from align.recipes import batch_plan, stage_inputs
from align.rollout import Rollout, Sampler, collect, gather_rollout
from align.self_checks import check_start
from align.stage import already_finished, finish, last_checkpoint, step_of
from align.tokenization import PromptLoader, tokenize_demonstrations, tokenize_prompts
from align.tracking import Tracker, quiet
from align.world import World

# Log-probabilities this close (nats) are the same but for rounding; they are compared in every so many updates.
SAME_LOGPROB, COMPARE_EVERY = 1e-5, 16


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
    ptx = load_rows(text_recipe(recipe), Demonstration) if recipe.ptx_dataset else None
    text, skipped_text = (
        tokenize_demonstrations(ptx.train, inputs.tokenizer, text_recipe(recipe)) if ptx else (None, {})
    )
    loader = PromptLoader(len(prompts), recipe.seed)
    updates = recipe.total_episodes // recipe.rollout_batch_size
    rates = learning_rates(recipe, updates)

    checkpoint = last_checkpoint(recipe, world)
    start = step_of(checkpoint)
    with Tracker(recipe, "ppo", updates, resume_step=start) as tracker:
        tracker.say(plan.describe())
        models = load_models(recipe, inputs, plan, world)
        ema = EMA(models.policy, recipe.ema_decay) if recipe.ema_decay is not None else None
        progress = load_checkpoint(recipe, models, ema, checkpoint)
        updater = Updater(recipe, plan, world, models, text)
        sampler = Sampler(
            tokenizer=inputs.tokenizer,
            temperature=recipe.temperature,
            response_length=recipe.response_length,
            batch_size=recipe.per_device_eval_batch_size,
            seed=recipe.seed,
            gather=recipe.ds3_gather_for_generation,
        )
        first = [prompts[index] for index in loader.batch(0, recipe.rollout_batch_size // recipe.num_generations)]
        checked = check_start(recipe, plan, world, tracker, sampler, models, first, start)
        watch = CollapseWatch(recipe)
        evaluation = None
        measured: dict[str, float] = {}
        samples: list[list[Any]] = []
        if held_out:
            truths = functions(recipe.eval_reward_funcs, "eval_reward_funcs")
            evaluation = Evaluation(world, sampler, models, held_out, truths, lambda s, e: missing_eos(recipe, s, e))
        for update in range(start, updates):
            world.clock.take()
            began = time.perf_counter()
            rollout = sample_rollout(recipe, world, sampler, models, prompts, loader, update, progress)
            kl_coef, scores = progress.kl_coef, shape_scores(recipe, rollout, progress)
            advantages, returns = estimate_advantages(recipe, rollout, scores, kl_coef)
            metrics = rollout_metrics(rollout, kl_coef, models.reward_names)
            metrics["policy/sampler_gap"] = progress.sampler_gap
            if models.value is not None:
                metrics |= value_metrics(rollout, returns)
            metrics |= updater.run(rollout, advantages, returns, kl_coef, update, rates[update])
            if ema is not None and update >= recipe.value_warmup_updates:
                ema.update()
            if recipe.kl_target is not None:
                progress.kl_coef = adapted_kl_coef(
                    kl_coef, metrics["objective/kl"], recipe.kl_target, len(rollout), recipe.kl_horizon
                )
            elapsed = time.perf_counter() - began
            phases = world.clock.take()
            metrics |= {
                "objective/truncated": models.truncated(world),
                "episode": (update + 1) * recipe.rollout_batch_size,
                "epoch": (update + 1) * recipe.rollout_batch_size / recipe.num_generations / len(prompts),
                "time/communication": 0.0,
                **{f"time/{phase}": seconds for phase, seconds in phases.items()},
                "time/other": elapsed - sum(phases.values()),
                "time/total": elapsed,
                "time/tokens_per_second": float(rollout.mask.sum()) / elapsed,
            }
            step, last = update + 1, update + 1 == updates
            if step == 1:
                metrics |= checked
            for warning in watch.warnings(step, metrics):
                tracker.say(warning)
            if step % recipe.logging_steps == 0 or last or step == 1:
                tracker.log(step, metrics)
            tracker.progress(step, score=metrics["objective/score"], kl=metrics["objective/kl"])
            if evaluation is not None and (last or (recipe.eval_steps and step % recipe.eval_steps == 0)):
                measured, samples = evaluation.run()
                tracker.log(step, measured)
                tracker.table(step, "samples", SAMPLE_COLUMNS, samples[: recipe.num_sample_rows])
                within = recipe.max_kl is None or measured["eval/kl"] <= recipe.max_kl
                if within and (progress.best is None or measured["eval/score"] > progress.best["eval/score"]):
                    progress.best = {"update": step, **measured}
                    save_policy(models.policy, inputs.tokenizer, world, Path(recipe.output_dir) / "best")
            if recipe.save_steps and step % recipe.save_steps == 0 and not last:
                save_checkpoint(recipe, world, models, ema, step, progress)

        results: dict[str, Any] = {"updates": updates, "best": progress.best, "table": []}
        if evaluation is not None:  # the last update has been evaluated
            results |= {**measured, "table": evaluation.table(measured)}
            results["samples"] = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in samples[:3]]
        save_policy(models.policy, inputs.tokenizer, world, Path(recipe.output_dir), whole_folder=False)
        if models.value is not None:
            save_policy(models.value, inputs.tokenizer, world, Path(recipe.output_dir) / "value")
        if ema is not None:
            save_policy(ema, inputs.tokenizer, world, Path(recipe.output_dir) / "ema")
        if world.is_main:
            data = {**rows.report, "skipped": {"train": skipped, "evaluation": skipped_held_out, "ptx": skipped_text}}
            if ptx is not None:
                data["ptx"] = ptx.report
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


def text_recipe(recipe: PPORecipe) -> SFTRecipe:
    """How the rows of `ptx_dataset` are read: as the SFT stage would, none of them held out."""
    return SFTRecipe(
        output_dir=recipe.output_dir,
        train_dataset=recipe.ptx_dataset,
        eval_fraction=0.0,
        seed=recipe.seed,
        mixture_temperature=recipe.mixture_temperature,
        on_bad_row=recipe.on_bad_row,
        max_length=recipe.max_prompt_length + recipe.response_length,
    )


def sample_rollout(
    recipe: PPORecipe, world: World, sampler: Sampler, models: Models, prompts: Sequence[tuple[Prompt, list[int]]],
    loader: PromptLoader, update: int, progress: Progress,
) -> Rollout:  # fmt: skip
    """Sample and score this rank's share of the rollout batch; returns everyone's, on every rank.

    The `num_generations` responses to a prompt are rows in succession. Where the generation loop's log-probabilities
    proved to be those of training (float32), the policy's own scoring pass is left out, but for a comparison now and then.
    """
    size, each = recipe.rollout_batch_size, recipe.num_generations
    drawn = [index for index in loader.batch(update, size // each) for _ in range(each)]
    share = size // world.size
    mine = slice(world.rank * share, (world.rank + 1) * share)
    episodes = range(update * size, (update + 1) * size)[mine]
    trusted = progress.sampler_gap <= SAME_LOGPROB and update % COMPARE_EVERY != 0
    rollout = collect(
        world, sampler, models.policy, models.policy, models.reference, models.value, models.rewards,
        [prompts[index] for index in drawn[mine]], "train", list(episodes), lambda s, e: missing_eos(recipe, s, e), trusted,
    )  # fmt: skip
    rollout = gather_rollout(rollout, world, int(sampler.tokenizer.pad_token_id))
    if not trusted:
        gap = (rollout.sampled_logprobs - rollout.old_logprobs).abs()
        progress.sampler_gap = float(gap.masked_fill(~rollout.mask, 0.0).max())
    return rollout


def shape_scores(recipe: PPORecipe, rollout: Rollout, progress: Progress) -> Tensor:
    """Scores as they enter the rewards, [B]: normalised by their running moments, then clipped, as the recipe says."""
    scores = rollout.scores
    if recipe.normalize_scores:
        moments = progress.score_moments = progress.score_moments.include(scores)
        scores = (scores - moments.mean) / max(moments.std, 1e-8)
    if recipe.score_clip is not None:
        scores = scores.clamp(-recipe.score_clip, recipe.score_clip)
    return scores


def estimate_advantages(recipe: PPORecipe, rollout: Rollout, scores: Tensor, kl_coef: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [B, T]; those of GAE whitened, and returns 0 where there is no value model.

    What single tokens were given stays on them; the last one gets the rest of the response's score.
    """
    kl = k1(rollout.old_logprobs, rollout.ref_logprobs)
    rest = scores - rollout.token_scores.sum(dim=1)
    rewards = token_rewards(rest, kl, rollout.mask, 0.0 if recipe.use_kl_loss else kl_coef) + rollout.token_scores
    if recipe.whiten_rewards:
        rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
    if recipe.advantage_estimator == "gae":
        advantages, returns = gae(rewards, rollout.values, rollout.mask, recipe.gamma, recipe.lam)
        return masked_whiten(advantages, rollout.mask), returns
    estimate = CRITIC_FREE[recipe.advantage_estimator]
    advantages = estimate(rewards, rollout.mask, recipe.num_generations, recipe.gamma)
    return advantages, torch.zeros_like(advantages)


def rollout_metrics(rollout: Rollout, kl_coef: float, sources: list[str]) -> dict[str, float]:
    """What is known before the update."""
    kl = response_kl(rollout)
    return {
        **summary(rollout, sources, ""),
        "objective/score_std": float(rollout.scores.std(correction=0)),
        "objective/kl": float(kl.mean()),
        "objective/kl_coef": kl_coef,
        "objective/reward": float((rollout.scores - kl_coef * kl).mean()),
    }


def value_metrics(rollout: Rollout, returns: Tensor) -> dict[str, float]:
    """How well the value model foresaw the returns [B, T]."""
    unexplained = masked_var(returns - rollout.values, rollout.mask)
    return {
        "value/mean": float(masked_mean(rollout.values, rollout.mask)),
        "value/explained_variance": 1.0 - float(unexplained / masked_var(returns, rollout.mask).clamp(min=1e-8)),
        "advantage/std": float(unexplained.sqrt()),
    }


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
