"""Before the first update of a run: does what PPO takes for granted hold for this run's own models?

A wrong reference, dropout, a temperature or mask that differs between sampling and training, a reward folder with
other weights than were judged: none of them crashes, all of them ruin a run. A few responses, sampled once, show them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from align.config.ppo import PPORecipe
from align.data.rows import Prompt
from align.engine.batch_plan import BatchPlan
from align.engine.distributed import World
from align.engine.torch_engine import Engine
from align.errors import UserError
from align.generation.sampler import Sampler
from align.generation.scoring import score_ids
from align.maths.masked import masked_mean
from align.ppo.rollout import Rollout, collect, gather_rollout
from align.ppo.self_check_limits import (
    BFLOAT16,
    FLOAT32,
    Check,
    as_recorded,
    can_explore,
    ends,
    finite,
    knows_something,
    same_reference,
    same_sampling,
    same_training,
    same_values,
    tells_apart,
)
from align.ppo.setup import Models
from align.ppo.update import Updater
from align.runs.manifest import read_manifest
from align.runs.tracker import Tracker
from reward_models.trained import ModelReward

MOST_RESPONSES = 32  # over all ranks
NAMES = "KL 0, ratio 1, generation against training, finite numbers, EOS rate, scores, the reward model's record"


class Still(Engine):
    """An engine that training can call like any other, and that never moves."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.module = engine.module

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        pass

    def step(self, learning_rate: float) -> float:
        return 0.0

    def discard(self) -> None:
        pass


def check_start(
    recipe: PPORecipe, plan: BatchPlan, world: World, tracker: Tracker, sampler: Sampler, models: Models,
    prompts: Sequence[tuple[Prompt, list[int]]], start: int,
) -> dict[str, float]:  # fmt: skip
    """Check a fresh run, in seconds; all ranks take part. Nothing of the run changes, whether it is checked or not.

    Reward functions are called once more than without the checks.

    Args:
        prompts: those of the first rollout.
        start: updates done. A resumed run is not checked again.

    Returns:
        metrics under their documented names; none when nothing was checked.

    Raises:
        UserError: a check failed. The message lists what was seen and expected, likely causes, and where to go back to.
    """
    if start > 0 or recipe.skip_self_checks:
        why = f"not repeated on resuming at update {start + 1}" if start else f"skipped: {NAMES}"
        tracker.say(f"self-checks: {why}")
        return {}
    began = time.perf_counter()
    checks, metrics = measure(recipe, plan, world, sampler, models, prompts)
    seconds = time.perf_counter() - began
    if failed := [check for check in checks if not check.good and check.stops]:
        listed = "\n".join(f"({number}) {check}" for number, check in enumerate(failed, 1))
        raise UserError(
            f"self-checks: {len(failed)} of {len(checks)} failed before the first update.\n{listed}\n"
            "Nothing has been trained. To go on all the same, add --skip_self_checks."
        )
    for check in checks:
        if not check.good:
            tracker.say(f"self-check: {check}")
    tracker.say(f"self-checks: {', '.join(check.seen for check in checks if check.good)}; in {seconds:.1f} s")
    return {**metrics, "time/self_checks": seconds}


def measure(
    recipe: PPORecipe, plan: BatchPlan, world: World, sampler: Sampler, models: Models,
    prompts: Sequence[tuple[Prompt, list[int]]],
) -> tuple[list[Check], dict[str, float]]:  # fmt: skip
    """All checks, the same on every rank, and their numbers as metrics."""
    checks: list[Check] = []
    metrics: dict[str, float] = {}
    try:
        if (path := recipe.reward_model_path) is not None:
            checks += check_reward(path, recipe, world, models, metrics)
        rollout = sample(recipe, world, sampler, models, prompts)
    except ValueError as error:  # a reward model that gives NaN; the message shows the row
        raise UserError(f"self-checks: {error}") from error
    measured = ("sampled_logprobs", "old_logprobs", "ref_logprobs", "values", "scores")
    unsound = [name for name in measured if not getattr(rollout, name).isfinite().all()]
    checks.append(finite(unsound))
    if not unsound:  # else all that follows would be NaN
        checks += check_policy(recipe, plan, world, models, rollout, metrics)
    rate = metrics["self_check/eos_rate"] = float(rollout.ended.float().mean())
    checks.append(ends(rate, len(rollout), recipe))
    checks += [tells_apart(name, rollout.source_scores[:, i]) for i, name in enumerate(models.reward_names)]
    return checks, metrics


def sample(
    recipe: PPORecipe, world: World, sampler: Sampler, models: Models, prompts: Sequence[tuple[Prompt, list[int]]]
) -> Rollout:
    """A small rollout, on every rank, the same however many there are, with noise that nothing else uses."""
    share = max(min(MOST_RESPONSES, recipe.rollout_batch_size) // world.size, 1)
    indexes = list(range(world.rank * share, (world.rank + 1) * share))
    counters = [source for source in models.rewards.sources if isinstance(source, ModelReward)]
    before = [source.truncated for source in counters]
    mine = collect(
        world, sampler, models.policy, models.policy, models.reference, models.value, models.rewards,
        [prompts[index % len(prompts)] for index in indexes], "self-check", indexes, lambda scores, ended: scores,
    )  # fmt: skip
    for source, count in zip(counters, before, strict=True):
        source.truncated = count
    return gather_rollout(mine, world, int(sampler.tokenizer.pad_token_id))


def check_policy(
    recipe: PPORecipe, plan: BatchPlan, world: World, models: Models, rollout: Rollout, metrics: dict[str, float]
) -> list[Check]:
    """Whether policy, reference, generation and training agree on the sampled tokens."""
    limits = BFLOAT16 if recipe.bf16 else FLOAT32
    kl = masked_mean((rollout.old_logprobs - rollout.ref_logprobs).abs(), rollout.mask)
    sampler_gap = (rollout.sampled_logprobs - rollout.old_logprobs).abs()
    mean = masked_mean(sampler_gap, rollout.mask)
    trained = train_still(recipe, plan, world, models, rollout)
    ratio_gap = (2 * trained["policy/approx_kl"]) ** 0.5  # approx_kl is half the mean square
    metrics |= {
        "self_check/kl": float(kl),
        "self_check/ratio_gap": ratio_gap,
        "self_check/sampler_gap": float(mean),
    }
    checks = [
        same_reference(float(kl), recipe),
        same_training(ratio_gap, trained["policy/ratio"], limits),
        same_sampling(float(mean), float(sampler_gap[rollout.mask].max()), limits),
        can_explore(trained["objective/entropy"]),
    ]
    if models.value is not None:
        size = max(1.0, float(masked_mean(rollout.values**2, rollout.mask)) ** 0.5)
        checks.insert(2, same_values((2 * trained["value/loss"]) ** 0.5 / size, limits))
    return checks


def train_still(recipe: PPORecipe, plan: BatchPlan, world: World, models: Models, rollout: Rollout) -> dict[str, float]:
    """The metrics of one pass of PPO's own update over the rollout, with nothing moved.

    Rows are shuffled and cut into the microbatches of training, so padding and neighbours are others than at rollout.
    Without gradients, because under ZeRO-3 a forward pass that no backward pass follows leaves its hooks waiting.
    The returns are the values, so that the value loss is half the mean square of what the value model gives otherwise.
    """
    one = replace(recipe, minibatch_size=len(rollout), num_ppo_epochs=1, value_warmup_updates=0, max_approx_kl=None)
    still = replace(models, policy=Still(models.policy), value=models.value and Still(models.value))
    advantages = torch.zeros_like(rollout.values)
    with torch.no_grad():
        metrics = Updater(one, plan, world, still).run(rollout, advantages, rollout.values, 0.0, 0, (0.0, 0.0))
    names = ("policy/approx_kl", "policy/ratio", "objective/entropy", "value/loss")
    return {name: metrics.get(name, math.nan) for name in names}  # a loss that is not finite has no metrics


def check_reward(path: str, recipe: PPORecipe, world: World, models: Models, metrics: dict[str, float]) -> list[Check]:
    """Whether the reward model is the one that its stage judged, and was found to know something."""
    manifest = read_manifest(path) or {}
    if "score_check" not in manifest:
        return [Check(True, "reward model not checked (no record in its folder)")]
    source = next(source for source in models.rewards.sources if isinstance(source, ModelReward))
    plain = ModelReward(source.name, source.model, batch_size=source.batch_size, max_length=source.max_length)
    scores = score_ids(plain, world, manifest["score_check"]["ids"])
    recorded = torch.tensor(manifest["score_check"]["scores"])
    metrics["self_check/reward_gap"] = float((scores - recorded).abs().max())
    if "eval_accuracy" in manifest["results"]:
        metrics["self_check/reward_accuracy"] = manifest["results"]["eval_accuracy"]
    return [as_recorded(path, scores, manifest, recipe.bf16), knows_something(scores, manifest["results"])]
