"""The table of stages: what the rest of the package knows about each. A new stage is one entry and its own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.config.best_of_n import BestOfNRecipe, check_best_of_n_rules
from align.config.encoders import ClassifyRecipe, MLMRecipe, check_classify_rules, check_mlm_rules
from align.config.ensemble import models_by_place
from align.config.evaluate import EvaluateRecipe, check_evaluate_rules
from align.config.extraction import (
    QuestionAnsweringRecipe,
    TokenClassificationRecipe,
    check_question_answering_rules,
    check_token_classification_rules,
)
from align.config.judge_reward import JudgeRewardRecipe, check_judge_reward_rules
from align.config.keys import Where
from align.config.ppo import PPORecipe, check_ppo_rules
from align.config.read import read_yaml
from align.config.recipe import Recipe
from align.config.reward import RewardRecipe, check_reward_rules
from align.config.sft import SFTRecipe, check_sft_rules
from align.errors import UserError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage. Modules are named rather than imported: the command line starts without torch."""

    name: str  # the command, and `stage:` in a recipe
    recipe: type[Any]  # the dataclass of its keys; `--help` begins with its docstring
    check_rules: Callable[[Any, Where], None]  # raises UserError for values that exclude one another
    module: str  # its `run(recipe)` runs the stage
    check_module: str  # its `check(recipe, context)` is what `align check` does for the stage
    input_models: tuple[str, ...]  # keys that name the models it starts from; it runs again once one was trained again
    methods: tuple[str, ...] = ()  # values of `method` that it takes; none: it trains nothing
    generates: bool = False  # whether what it trains is a language model that continues a prompt


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            name="sft",
            recipe=SFTRecipe,
            check_rules=check_sft_rules,
            module="align.sft.train",
            check_module="align.cli.check.sft",
            input_models=("model_name_or_path",),
            methods=("full", "freeze", "head", "lora", "dora", "qlora", "ia3", "prompt", "prefix", "bottleneck"),
            generates=True,
        ),
        Stage(
            name="reward",
            recipe=RewardRecipe,
            check_rules=check_reward_rules,
            module="align.reward.train",
            check_module="align.cli.check.reward",
            input_models=("model_name_or_path", "sft_model_path"),
            methods=("full", "freeze", "head", "lora", "dora", "ia3", "bottleneck"),
        ),
        Stage(
            name="ppo",
            recipe=PPORecipe,
            check_rules=check_ppo_rules,
            module="align.ppo.train",
            check_module="align.cli.check.ppo",
            input_models=("sft_model_path", "reward_model_path", "value_model_path", "judge_reward_model_path"),
            methods=("full", "lora", "dora", "ia3", "bottleneck"),
            generates=True,
        ),
        Stage(
            name="classify",
            recipe=ClassifyRecipe,
            check_rules=check_classify_rules,
            module="align.encoders.classify",
            check_module="align.cli.check.classify",
            input_models=("model_name_or_path",),
            methods=("full", "freeze", "head", "lora", "dora", "ia3", "bottleneck"),
        ),
        Stage(
            name="token-classification",
            recipe=TokenClassificationRecipe,
            check_rules=check_token_classification_rules,
            module="align.encoders.token_classification",
            check_module="align.cli.check.token_classification",
            input_models=("model_name_or_path",),
            methods=("full", "freeze", "head", "lora", "dora", "ia3", "bottleneck"),
        ),
        Stage(
            name="question-answering",
            recipe=QuestionAnsweringRecipe,
            check_rules=check_question_answering_rules,
            module="align.encoders.question_answering",
            check_module="align.cli.check.question_answering",
            input_models=("model_name_or_path",),
            methods=("full", "freeze", "head", "lora", "dora", "ia3", "bottleneck"),
        ),
        Stage(
            name="mlm",
            recipe=MLMRecipe,
            check_rules=check_mlm_rules,
            module="align.encoders.mlm",
            check_module="align.cli.check.mlm",
            input_models=("model_name_or_path",),
            methods=("full", "freeze", "head", "lora", "dora", "ia3", "bottleneck"),
        ),
        Stage(
            name="evaluate",
            recipe=EvaluateRecipe,
            check_rules=check_evaluate_rules,
            module="align.evaluate.compare",
            check_module="align.cli.check.evaluation",
            input_models=("models",),
        ),
        Stage(
            name="judge-reward",
            recipe=JudgeRewardRecipe,
            check_rules=check_judge_reward_rules,
            module="align.judge.judge",
            check_module="align.cli.check.judge",
            input_models=("reward_model_path", "second_reward_model_path", "policy_path"),
        ),
        Stage(
            name="bon",
            recipe=BestOfNRecipe,
            check_rules=check_best_of_n_rules,
            module="align.best_of_n.sample",
            check_module="align.cli.check.best_of_n",
            input_models=("model_name_or_path", "reward_model_path", "judge_reward_model_path"),
        ),
    )
}


def stage_of(recipe: Recipe) -> Stage:
    """The stage that a recipe is for."""
    return next(stage for stage in STAGES.values() if type(recipe) is stage.recipe)


def read_stage(path: str) -> str:
    """The `stage:` key of a recipe, which `align run` and `align check` need.

    Raises:
        UserError: the file cannot be read, or names no stage.
    """
    name = read_yaml(path)[0].get("stage")
    if not isinstance(name, str) or name not in STAGES:
        got = f"{name!r}{nearest(str(name), STAGES)}" if name else "nothing; add a line such as `stage: sft`"
        raise UserError(f"{path}: stage: expected one of {', '.join(STAGES)}, got {got}")
    return name


def input_models(recipe: Recipe) -> dict[str, str]:
    """The models that a recipe starts from, by key, or by name where a key holds several; unset keys are left out."""
    found: dict[str, str] = {}
    for name in stage_of(recipe).input_models:
        value = getattr(recipe, name)
        if isinstance(value, list):
            found |= models_by_place(name, value)
        else:
            found |= value if isinstance(value, dict) else {name: value} if value else {}
    return found
