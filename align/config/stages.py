"""The table of stages: the recipe class of each, the models it starts from, and its `--help`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from typing import Any, get_type_hints

from align.config.base import StageRecipe
from align.config.convert import type_name
from align.config.data_source import DataSource
from align.config.encoders import ClassifyRecipe, MLMRecipe
from align.config.evaluate import EVALUATE, EvaluateRecipe
from align.config.ppo import PPORecipe
from align.config.read import _read
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.errors import UserError, nearest

RECIPES: dict[str, type[StageRecipe]] = {
    "sft": SFTRecipe,
    "reward": RewardRecipe,
    "ppo": PPORecipe,
    "classify": ClassifyRecipe,
    "mlm": MLMRecipe,
}

# The models that each stage starts from, by recipe key: a stage is made anew when one of them was.
INPUTS = {
    "sft": ("model_name_or_path",),
    "reward": ("model_name_or_path", "sft_model_path"),
    "ppo": ("sft_model_path", "reward_model_path", "value_model_path"),
    "classify": ("model_name_or_path",),
    "mlm": ("model_name_or_path",),
}


def stage_help(stage: str) -> str:
    """Every key of a stage's recipe with its type, default and meaning, wrapped to the terminal."""
    cls: type[Any] = CLASSES[stage]
    head = [
        f"usage: align {stage} RECIPE [--key value ...]",
        f"       deepspeed --num_gpus N --module align {stage} RECIPE [--key value ...]",
        "",
        *_wrapped(cls.__doc__ or "", ""),
        *_wrapped("Each key may stand in the YAML recipe or be given as --key value (--mapping.name value).", ""),
        "",
    ]
    source = ["", "keys of a data source:", *_keys(DataSource, "")]
    return "\n".join([*head, "keys:", *_keys(cls, "--"), *source]) + "\n"


def _keys(cls: type[Any], prefix: str) -> list[str]:
    annotations = get_type_hints(cls)
    lines = []
    for field in dataclasses.fields(cls):
        if field.metadata.get("required"):
            default = "required"
        elif field.default is not dataclasses.MISSING:
            default = f"default {json.dumps(field.default)}"
        else:
            default = "default empty"
        lines += _wrapped(f"{prefix}{field.name}  <{type_name(annotations[field.name])}>  {default}", "  ")
        lines += _wrapped(field.metadata["help"], "        ")
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


CLASSES: dict[str, type[StageRecipe] | type[EvaluateRecipe]] = {**RECIPES, EVALUATE: EvaluateRecipe}


def read_stage(path: str) -> str:
    """The `stage:` key of a recipe, which `align run` and `align check` need.

    Raises:
        UserError: the file cannot be read, or names no stage.
    """
    stage = _read(path)[0].get("stage")
    if not isinstance(stage, str) or stage not in CLASSES:
        stages = ", ".join(CLASSES)
        got = f"{stage!r}{nearest(str(stage), CLASSES)}" if stage else "nothing; add a line such as `stage: sft`"
        raise UserError(f"{path}: stage: expected one of {stages}, got {got}")
    return stage


def stage_inputs(recipe: StageRecipe) -> dict[str, str | None]:
    """The models a stage starts from by recipe key, as `align.runs.manifest` wants them."""
    stage = next(name for name, cls in RECIPES.items() if isinstance(recipe, cls))
    return {name: getattr(recipe, name) for name in INPUTS[stage]}
