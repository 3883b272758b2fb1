"""Checks before the first update: do this run's own models have the properties that PPO relies on?

A wrong reference, active dropout, a temperature or mask that differs between sampling and training, a reward folder with
other weights than were evaluated: none of them crashes, all of them ruin a run. A few sampled responses reveal them.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch

from align.config.ensemble import models_by_place
from align.data.batches import PromptLoader
from align.data.end_tokens import end_ids
from align.engine.distributed import World
from align.engine.engine import NoUpdateEngine
from align.errors import UserError
from align.generation.responses import unpadded
from align.generation.sampler import PromptBatch
from align.generation.scoring import score_ids
from align.maths.masked import masked_mean
from align.ppo.kl_permitted import describe_kl_coef, score_stds
from align.ppo.ppo_run import PPORun, Progress
from align.ppo.rollout import Rollout, gather_rollout
from align.ppo.sample import sample_responses, score_responses
from align.ppo.self_check_limits import (
    Check,
    Limits,
    all_finite,
    beats_chance,
    below_ceiling,
    describe_endings,
    entropy_sufficient,
    generation_matches_training,
    limits_of,
    matches_manifest,
    reference_matches_policy,
    responses_terminate,
    scores_vary,
    training_matches_rollout,
    values_match_rollout,
    values_match_scores,
)
from align.ppo.update import optimize
from align.runs.manifest import read_manifest
from align.runs.own_files import MANIFEST
from align.runs.records import NUMBER, Record, check_record
from align.runs.tracker import Tracker
from reward_models.trained import ModelReward

MAX_RESPONSES = 32  # over all ranks
RESPONSES_PER_PROMPT = 2  # responses to a prompt
MAX_VALUES = 8  # compared with scores
CHECK_NAMES = "KL 0, ratio 1, generation against training, finite numbers, EOS rate, scores, the reward model's record"


def check_start(run: PPORun, tracker: Tracker, start: int) -> dict[str, float]:
    """Check a run before its first update, on all ranks. The checks do not change its weights.

    Reward functions are called once more than without the checks.

    Args:
        start: updates done before; a resumed run is not checked again.

    Returns:
        Metrics under their documented names; empty if nothing was checked.

    Raises:
        UserError: a check failed. The message has the value found and expected, likely causes, and the stage to go back to.
    """
    if start > 0 or run.recipe.skip_self_checks:
        why = f"not repeated on resuming at update {start + 1}" if start else f"skipped: {CHECK_NAMES}"
        tracker.say(f"self-checks: {why}")
        return {}
    began = time.perf_counter()
    checks, metrics = run_checks(run)
    seconds = time.perf_counter() - began
    if failed := [check for check in checks if not check.passed and check.required]:
        listed = "\n".join(f"({number}) {check}" for number, check in enumerate(failed, 1))
        raise UserError(
            f"self-checks: {len(failed)} of {len(checks)} failed before the first update.\n{listed}\n"
            "Nothing has been trained. To train nevertheless, add --skip_self_checks."
        )
    for number, check in enumerate(checks):
        if not check.passed:
            tracker.warn(0, f"self-check {number}", f"warning: self-check: {check}")
    spread = [metrics[f"self_check/score_std{which}"] for which in ("", "_within_prompt")]
    about_kl, remedy = describe_kl_coef(run.recipe, *spread)
    if remedy:
        tracker.warn(0, "kl_coef", about_kl + remedy)
    else:
        tracker.say(about_kl)
    tracker.say(f"self-checks: {', '.join(check.found for check in checks if check.passed)}; in {seconds:.1f} s")
    return {**metrics, "time/self_checks": seconds}


def run_checks(run: PPORun) -> tuple[list[Check], dict[str, float]]:
    """Run all checks; returns them and their metrics, the same on every rank."""
    checks: list[Check] = []
    metrics: dict[str, float] = {}
    limits = limits_of(run.recipe.bf16, run.world.tf32)
    try:
        paths = list(models_by_place("reward_model_path", run.recipe.reward_model_path).values())
        for path, model in zip(paths, run.models.rewards.models, strict=True):
            of = f" of {path}" if len(paths) > 1 else ""
            checks += check_reward_model(path, model, run.world, limits, metrics, of)
        rollout = check_rollout(run)
    except ValueError as error:  # a reward model that gives NaN; the message shows the row
        raise UserError(f"self-checks: {error}") from error
    measured = ("sampled_logprobs", "old_logprobs", "ref_logprobs", "values", "scores")
    not_finite = [name for name in measured if not getattr(rollout, name).isfinite().all()]
    checks.append(all_finite(not_finite))
    if not not_finite:  # else all that follows would be NaN
        checks += check_policy(run, rollout, limits, metrics)
    metrics["self_check/eos_rate"] = float(rollout.ended.float().mean())
    checks.append(check_endings(run, rollout))
    metrics["self_check/score_std"], metrics["self_check/score_std_within_prompt"] = score_stds(
        rollout.scores, RESPONSES_PER_PROMPT
    )
    checks += [scores_vary(name, rollout.source_scores[:, i]) for i, name in enumerate(run.models.reward_names)]
    return checks, metrics


def check_rollout(run: PPORun) -> Rollout:
    """A small rollout with its own noise; the same on every rank and for any number of ranks."""
    share = max(min(MAX_RESPONSES, run.recipe.rollout_batch_size) // run.world.size, 1)
    indexes = range(run.world.rank * share, (run.world.rank + 1) * share)
    loader = PromptLoader(len(run.prompts), run.recipe.seed)
    first = loader.batch(0, run.recipe.rollout_batch_size // run.recipe.num_generations)
    prompts = [run.prompts[first[index // RESPONSES_PER_PROMPT % len(first)]] for index in indexes]
    batch = PromptBatch([prompt for prompt, _ in prompts], [ids for _, ids in prompts], "self-check", indexes)
    counters = run.models.rewards.models
    truncated = [source.truncated for source in counters]
    raw = replace(run, replay=None, recipe=replace(run.recipe, missing_eos_penalty=None, missing_eos_score=None))
    scored = score_responses(raw, sample_responses(run, batch))
    for source, count in zip(counters, truncated, strict=True):
        source.truncated = count
    return gather_rollout(scored, run.world, run.sampler.pad_token_id)


def check_policy(run: PPORun, rollout: Rollout, limits: Limits, metrics: dict[str, float]) -> list[Check]:
    """Whether policy, reference, generation and training agree on the sampled tokens."""
    kl = masked_mean((rollout.old_logprobs - rollout.ref_logprobs).abs(), rollout.mask)
    sampler_gap = (rollout.sampled_logprobs - rollout.old_logprobs).abs()
    mean = masked_mean(sampler_gap, rollout.mask)
    trained = metrics_without_update(run, rollout)
    ratio_gap = (2 * trained["policy/approx_kl"]) ** 0.5  # approx_kl is half the mean square
    metrics |= {
        "self_check/kl": float(kl),
        "self_check/ratio_gap": ratio_gap,
        "self_check/sampler_gap": float(mean),
    }
    checks = [
        reference_matches_policy(float(kl), run.recipe),
        training_matches_rollout(ratio_gap, trained["policy/ratio"], limits),
        generation_matches_training(float(mean), float(sampler_gap[rollout.mask].max()), limits),
        entropy_sufficient(trained["objective/entropy"]),
    ]
    if run.models.value is not None:
        size = max(1.0, float(masked_mean(rollout.values**2, rollout.mask)) ** 0.5)
        checks.insert(2, values_match_rollout((2 * trained["value/loss"]) ** 0.5 / size, limits))
        if checks[2].passed and run.models.values_are_scores:
            checks += check_first_values(run, rollout, limits, metrics)
    return checks


def metrics_without_update(run: PPORun, rollout: Rollout) -> dict[str, float]:
    """The metrics of one epoch of PPO's own optimization over the rollout, in which no weight changes.

    Rows are shuffled and cut into the microbatches of training, so that padding and neighbors differ from the rollout.
    Without gradients, because under ZeRO-3 a forward pass that no backward pass follows leaves its hooks waiting. The
    returns are the values, so that the value loss is half the mean square of the difference between the two passes.
    """
    recipe = replace(
        run.recipe,
        objective="ppo",
        minibatch_size=len(rollout),
        num_ppo_epochs=1,
        value_warmup_updates=0,
        max_approx_kl=None,
    )
    value = run.models.value and NoUpdateEngine(run.models.value)
    models = replace(run.models, policy=NoUpdateEngine(run.models.policy), value=value)
    fixed = replace(
        run,
        recipe=recipe,
        models=models,
        ptx=None,
        replay=None,
        progress=Progress(kl_coef=0.0),
        learning_rates=[(0.0, 0.0)],
    )
    with torch.no_grad():
        metrics = optimize(fixed, rollout, torch.zeros_like(rollout.values), rollout.values, 0)
    names = ("policy/approx_kl", "policy/ratio", "objective/entropy", "value/loss")
    return {name: metrics.get(name, math.nan) for name in names}  # a loss that is not finite has no metrics


def check_first_values(run: PPORun, rollout: Rollout, limits: Limits, metrics: dict[str, float]) -> list[Check]:
    """Whether the values of a value model that starts as the reward model are the scores of the same tokens."""
    source = _ids_only(run.models.rewards.models[0])
    last = rollout.values.gather(1, rollout.lengths[:, None] - 1).squeeze(1)  # [B], of all but the last token
    rows = [row[:-1] for row in unpadded(*rollout.sequences())]
    short = [index for index, row in enumerate(rows) if source.max_length is None or len(row) <= source.max_length]
    if not (short := short[:MAX_VALUES]):
        return []
    scores = score_ids(source, run.world, [rows[index] for index in short])
    gap = float((last[short].cpu() - scores).abs().mean())
    metrics["self_check/value_gap"] = gap
    return [values_match_scores(gap, scores, limits)]


def _ids_only(source: ModelReward) -> ModelReward:
    """The same reward model as a source that scores token ids directly and has its own count of truncated rows."""
    return ModelReward(source.name, source.model, batch_size=source.batch_size, max_length=source.max_length)


def check_endings(run: PPORun, rollout: Rollout) -> Check:
    """Whether responses end by themselves, and with which end tokens."""
    tokenizer, recipe = run.sampler.tokenizer, run.recipe
    ends, special = end_ids(tokenizer), {*tokenizer.added_tokens_decoder}

    def name(token: int) -> tuple[str, bool]:
        return f"{tokenizer.convert_ids_to_tokens(token)} ({token})", token in special

    seen = describe_endings(unpadded(rollout.response_ids, rollout.mask), rollout.ended.tolist(), ends, name)
    several = len(ends) > 1 or bool(recipe.stop_strings)
    rate = float(rollout.ended.float().mean())
    return responses_terminate(rate, len(rollout), recipe.response_length, seen, several)


def check_reward_model(
    path: str, source: ModelReward, world: World, limits: Limits, metrics: dict[str, float], of: str = ""
) -> list[Check]:
    """Whether the reward model is the one that its stage evaluated, and was better than chance there.

    `metrics` keeps the worst values of several reward models, and `of` says in the checks which of them it is.
    """
    manifest = read_manifest(path) or {}
    if "score_check" not in manifest:
        return [Check(True, f"reward model{of} not checked (no record in its folder)")]
    if "eval_accuracy" in manifest["results"]:
        names = ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high")
        check_record(manifest["results"], Record(dict.fromkeys(names, NUMBER)), f"{path}/{MANIFEST}: results")
    embedding = source.model.get_input_embeddings()
    vocabulary = getattr(embedding, "base_layer", embedding).num_embeddings  # beneath an adapter
    largest = max(map(max, manifest["score_check"]["ids"]))
    if largest >= vocabulary:
        raise UserError(
            f"{path}/{MANIFEST}: score_check: expected token ids below {vocabulary}, got {largest}; go back to the reward stage."
        )
    scores = score_ids(_ids_only(source), world, manifest["score_check"]["ids"])
    recorded = torch.tensor(manifest["score_check"]["scores"])
    gap = float((scores - recorded).abs().max())
    metrics["self_check/reward_gap"] = max(gap, metrics.get("self_check/reward_gap", 0.0))
    if "eval_accuracy" in manifest["results"]:
        accuracy = manifest["results"]["eval_accuracy"]
        metrics["self_check/reward_accuracy"] = min(accuracy, metrics.get("self_check/reward_accuracy", 1.0))
    results = manifest["results"]
    record = matches_manifest(path, scores, manifest, limits)
    return [record, beats_chance(scores, results, of), *below_ceiling(results, of)]
