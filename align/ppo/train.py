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
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.config.ppo import PPORecipe
from align.data.batches import PromptLoader
from align.data.load import DataSettings, load_rows
from align.data.rows import Demonstration, Prompt
from align.data.tokenize import Report, tokenize_demonstrations, tokenize_prompts
from align.engine.batch_plan import batch_plan
from align.engine.distributed import connect, disconnect
from align.engine.ema import EMA
from align.engine.optimizer import learning_rates
from align.generation.sampler import Sampler
from align.maths.kl import adapted_kl_coef
from align.models.context_length import check_responses_fit
from align.ppo.checkpoint import load_checkpoint, save_checkpoint, save_policy
from align.ppo.collapse import CollapseWatch
from align.ppo.evaluation import SAMPLE_COLUMNS, Evaluation
from align.ppo.metrics import rollout_metrics, value_metrics
from align.ppo.self_checks import check_start
from align.ppo.setup import check_inputs, functions, load_models
from align.ppo.step import estimate_advantages, missing_eos, sample_rollout, shape_scores
from align.ppo.update import Updater
from align.runs.manifest import open_stage
from align.runs.quiet import quiet
from align.runs.stage import finish, finished_results, last_checkpoint, step_of
from align.runs.tracker import Tracker


def run(recipe: PPORecipe) -> dict[str, Any]:
    """Train a policy by PPO; returns the closing numbers, also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return finished_results(recipe.output_dir)
    world = connect(recipe)
    plan = batch_plan(recipe, world.size)
    inputs = check_inputs(recipe)
    rows = load_rows(DataSettings.from_recipe(recipe), Prompt)
    prompts, skipped = tokenize_prompts(rows.train, inputs.tokenizer, recipe.max_prompt_length, recipe.on_bad_row)
    held_out, skipped_held_out = tokenize_prompts(
        rows.evaluation, inputs.tokenizer, recipe.max_prompt_length, recipe.on_bad_row
    )
    world.check_rows(len(prompts))
    check_responses_fit([ids for _, ids in (*prompts, *held_out)], recipe, inputs.config)
    ptx = load_rows(ptx_settings(recipe), Demonstration) if recipe.ptx_dataset else None
    text: Dataset | None = None
    skipped_text: Report = {}
    if ptx is not None:
        text, skipped_text = tokenize_demonstrations(
            ptx.train,
            inputs.tokenizer,
            max_length=recipe.max_prompt_length + recipe.response_length,
            on_bad_row=recipe.on_bad_row,
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
            finish(recipe, inputs.tokenizer, data, results, card)
    world.barrier()
    disconnect()
    return results


def ptx_settings(recipe: PPORecipe) -> DataSettings:
    """How the rows of `ptx_dataset` are read: all of them to train on."""
    return DataSettings(
        train_dataset=recipe.ptx_dataset,
        mixture_temperature=recipe.mixture_temperature,
        on_bad_row=recipe.on_bad_row,
        seed=recipe.seed,
    )


CARD = """# Language model, trained by PPO

From the SFT model {base}, with a KL penalty of {kl_coef} per nat against it. This folder holds the last policy, `best/`
the one with the highest evaluation score, `value/` the value model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""
