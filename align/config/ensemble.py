"""Keys of several reward models in PPO and best-of-n, the rules between them, and the folders of an ensemble's members.

Functions take the recipe of either, whose files import this one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from align.config.keys import AT_LEAST_0, Where, key
from align.errors import UserError

NUMBERED = re.compile(r"member_([1-9][0-9]{0,8})", re.ASCII)
MEMBER = "member_"  # and a number from 1: a member's folder in the `output_dir` of a reward stage with `ensemble_size`
JUDGE = "judge"  # the judge's folder there, with `train_judge`


def reward_model_path() -> Any:
    """The key `reward_model_path`."""
    return key(
        [],
        "Reward model of stage 2 (or any sequence classifier with one label); a list of them, or the output_dir of a "
        "reward stage with `ensemble_size`, is an ensemble, which counts as one reward.",
    )


def reward_ensemble() -> Any:
    """The key `reward_ensemble`."""
    return key(
        "mean",
        "Score of an ensemble (arXiv 2310.02743): mean of the members' scores, wco (worst case: their minimum) or uwo "
        "(uncertainty-weighted: mean - reward_variance_coef * variance among the members, divided by their number).",
    )


def reward_variance_coef() -> Any:
    """The key `reward_variance_coef`."""
    return key(None, "With `reward_ensemble: uwo`: weight of the variance, in 1 / score; often 0.1 to 0.5.", AT_LEAST_0)


def list_reward_models(recipe: Any) -> None:
    """Make a list of the one reward model, or None, that a recipe made in Python names."""
    if not isinstance(recipe.reward_model_path, list):
        object.__setattr__(recipe, "reward_model_path", [recipe.reward_model_path] if recipe.reward_model_path else [])


def reward_names(recipe: Any) -> list[str]:
    """The names of the rewards in errors, in the order of `reward_weights`."""
    models = recipe.reward_model_path
    return [*(models if len(models) < 2 else ["the ensemble"]), *recipe.reward_funcs]


def check_ensemble_rules(recipe: Any, where: Where) -> None:
    """The rules for the reward models.

    Raises:
        UserError: names the first broken rule.
    """
    paths = [each for path in recipe.reward_model_path for each in ensemble_members(path)]
    same = list(map(canonical_path, paths))
    if repeated := next((path for path, each in zip(paths, same, strict=True) if same.count(each) > 1), None):
        raise UserError(f"{where('reward_model_path')}: {repeated} is written twice; name each member once")
    if recipe.reward_ensemble != "mean" and not paths:
        raise UserError(f"{where('reward_ensemble')}: combines reward models, and reward_model_path names none")
    if recipe.reward_ensemble == "uwo" and recipe.reward_variance_coef is None:
        raise UserError(f"{where('reward_variance_coef')}: expected a number with reward_ensemble: uwo, got nothing")
    if recipe.reward_ensemble != "uwo" and recipe.reward_variance_coef is not None:
        raise UserError(
            f"{where('reward_variance_coef')}: is for reward_ensemble: uwo, got reward_ensemble: {recipe.reward_ensemble}"
        )


def check_normalized_rewards(recipe: Any, where: Where, sources: list[str]) -> None:
    """The rules for `multi_objective_aggregation: normalize_then_sum`.

    Args:
        sources: names of the rewards.

    Raises:
        UserError: names the first broken rule.
    """
    place = where("multi_objective_aggregation")
    if len(sources) < 2:
        raise UserError(f"{place}: normalize_then_sum is for several rewards, got {sources[0]} alone")
    if recipe.num_generations < 2:
        raise UserError(
            f"{where('num_generations')}: expected 2 or more with multi_objective_aggregation: normalize_then_sum, which compares "
            f"the responses to one prompt, got {recipe.num_generations}"
        )
    if recipe.advantage_estimator == "grpo":
        raise UserError(
            f"{place}: normalize_then_sum with advantage_estimator: grpo, which divides the sum by its spread in each group again; "
            "use reinforce_plus_plus, which whitens over the batch as GDPO does"
        )


def ensemble_members(path: str) -> list[str]:
    """The paths of the members in the `output_dir` of a reward stage with `ensemble_size`; any other path unchanged."""
    folder = Path(path)
    numbers = [
        found[1] for each in folder.glob(f"{MEMBER}*") if each.is_dir() and (found := NUMBERED.fullmatch(each.name))
    ]
    if not numbers or (folder / "config.json").exists():
        return [path]
    return [str(folder / f"{MEMBER}{number}") for number in sorted(map(int, numbers))]


def canonical_path(path: str) -> str:
    """The real path of a model folder, or the hub id: equal for two names of one model."""
    return os.path.realpath(path) if os.path.isdir(path) else path


def models_by_place(name: str, paths: list[str]) -> dict[str, str]:
    """The models in the list of a key, with the members of ensemble folders, by their place in the recipe."""
    found = [each for path in paths for each in ensemble_members(path)]
    return {name: found[0]} if len(found) == 1 else {f"{name}[{i}]": path for i, path in enumerate(found)}
