"""Keys that choose the objective of PPO's stage, and the rules between it and the keys that it reads.

Functions take the recipe of PPO, whose file imports this one.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from align.config.keys import AT_LEAST_1, Where, key
from align.errors import UserError

OF_PPO = (
    *("advantage_estimator", "num_ppo_epochs", "cliprange", "dual_clip", "max_approx_kl", "gamma", "lam"),
    *("whiten_rewards", "entropy_coef", "use_kl_loss", "kl_estimator", "cliprange_value"),
)
# Keys that an objective does not read.
UNREAD = {"ppo": ("replay_size", "gradient_steps"), "trajectory_balance": OF_PPO, "path_consistency": OF_PPO}
VALUE_KEYS = ("value_learning_rate", "value_model_path", "value_method", "value_deepspeed", "value_warmup_updates")


def objective() -> Any:
    """The key `objective` of PPO's stage."""
    return key(
        "ppo",
        "ppo, or trajectory_balance: the variance of score - kl_coef * log(policy / reference) over the responses to a prompt "
        "(VarGrad, arXiv 2503.18929), which is 0 at the optimum whatever policy sampled them, so that earlier rollouts are "
        "trained on again; with num_generations: 1 a value model estimates the mean that the responses to a prompt would have. "
        "path_consistency (arXiv 1702.08892): the same from every token on, against a value model.",
    )


def replay_size() -> Any:
    """The key `replay_size` of PPO's stage."""
    return key(10, "Without ppo: rollout batches that are kept and trained on, the newest included.", AT_LEAST_1)


def gradient_steps() -> Any:
    """The key `gradient_steps` of PPO's stage."""
    return key(8, "Without ppo: optimizer steps an update, each on minibatch_size kept responses.", AT_LEAST_1)


def unread_keys(objective: str, num_generations: int) -> tuple[str, ...]:
    """The keys that an objective does not read: trajectory balance has a value model for single responses only."""
    without_value = objective == "trajectory_balance" and num_generations > 1
    return (*UNREAD[objective], *(VALUE_KEYS if without_value else ()))


def check_objective(recipe: Any, where: Where) -> None:
    """The rules between the objective of PPO's stage and other keys.

    Raises:
        UserError: names the first broken rule.
    """
    unread = unread_keys(recipe.objective, recipe.num_generations)
    for each in fields(recipe):
        if each.name in unread and (got := getattr(recipe, each.name)) != each.default:
            when = " with num_generations of 2 or more" if each.name in VALUE_KEYS else ""
            raise UserError(
                f"{where(each.name)}: objective: {recipe.objective} does not read it{when}, got {got}; leave it out."
            )
    rules = _check_ppo if recipe.objective == "ppo" else _check_balance
    rules(recipe, where)
    if recipe.method != "full" and recipe.reference_deepspeed:
        raise UserError(
            f"{where('reference_deepspeed')}: with an adapter the reference is the policy with its adapter off, and "
            "has no engine of its own; leave it out."
        )


def _check_ppo(recipe: Any, where: Where) -> None:
    if recipe.rollout_batch_size % recipe.minibatch_size:
        raise UserError(
            f"{where('minibatch_size')}: expected a divisor of rollout_batch_size ({recipe.rollout_batch_size}), got "
            f"{recipe.minibatch_size}"
        )
    name, estimator = recipe.advantage_estimator, recipe.estimator
    if estimator.compares_group and recipe.num_generations < 2:
        raise UserError(
            f"{where('num_generations')}: expected 2 or more with advantage_estimator: {name}, which compares the "
            f"responses to one prompt, got {recipe.num_generations}"
        )
    if not estimator.value_model and (
        named := [n for n in ("value_model_path", "value_deepspeed") if getattr(recipe, n)]
    ):
        raise UserError(f"{where(named[0])}: advantage_estimator: {name} has no value model; leave it out.")
    if not estimator.value_model and recipe.value_warmup_updates:
        raise UserError(
            f"{where('value_warmup_updates')}: advantage_estimator: {name} has no value model; leave it out."
        )
    if not estimator.value_model and recipe.value_method != "full":
        raise UserError(f"{where('value_method')}: advantage_estimator: {name} has no value model; leave it out.")
    if recipe.use_kl_loss and recipe.kl_estimator == "k1":
        raise UserError(
            f"{where('kl_estimator')}: k1 as a loss has an expected gradient of 0, so nothing would hold the policy; "
            "use k2 (whose gradient is that of KL(policy || reference)) or k3, or use_kl_loss: false"
        )
    if not recipe.use_kl_loss and recipe.kl_estimator != "k1":
        reason = "is biased" if recipe.kl_estimator == "k2" else "has a gradient that vanishes near the reference"
        raise UserError(
            f"{where('kl_estimator')}: {recipe.kl_estimator} inside the reward {reason}; use k1, or use_kl_loss: true"
        )


def _check_balance(recipe: Any, where: Where) -> None:
    if recipe.minibatch_size % recipe.num_generations:
        raise UserError(
            f"{where('minibatch_size')}: expected a multiple of num_generations ({recipe.num_generations}) with objective: "
            f"{recipe.objective}, got {recipe.minibatch_size}"
        )
    if not recipe.kl_coef:
        raise UserError(
            f"{where('kl_coef')}: expected a number above 0 with objective: {recipe.objective}, whose optimum is the reference "
            "times exp(score / kl_coef), got 0"
        )
