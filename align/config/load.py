"""From a YAML file and command-line overrides to a checked recipe, and from a recipe to its batch plan."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from align.config.base import (
    _DATASET_KEYS,
    DEEPSPEED_KEYS,
    SCHEDULES,
    StageRecipe,
    TrainerRecipe,
    _check_best,
    _check_deepspeed,
    _check_method,
)
from align.config.convert import build
from align.config.data_source import DataSource, _check_source
from align.config.evaluate import EVALUATE, EvaluateRecipe, _check_evaluate
from align.config.keys import _check_function, _check_ranges
from align.config.ppo import PPORecipe, _check_ppo
from align.config.read import _apply, _read
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe, _check_sft, check_retention
from align.config.stages import INPUTS, RECIPES
from align.config.unknown_keys import METHODS_ELSEWHERE, explain
from align.errors import UserError, nearest

_PATH_KEYS = {*(name for names in INPUTS.values() for name in names), "chat_template_path", *DEEPSPEED_KEYS}
AnyRecipe = TypeVar("AnyRecipe", StageRecipe, EvaluateRecipe)


def load_recipe(stage: str, path: str, overrides: Sequence[str] = ()) -> StageRecipe:
    """The recipe for `stage` in the YAML file `path`, checked, with `stage` filled in.

    Args:
        overrides: command-line words: `--key value`, `--key=value`, `--flag`, `--list_key a b`,
            `--mapping_key.name value`. Values are YAML.

    Relative paths in the recipe are looked up from the current directory and then from the recipe's folder,
    which is also appended to `sys.path`, so that `module:function` can name a file beside the recipe.

    Raises:
        UserError: an unreadable file, an unknown key, a value of another type or out of range, keys that
            exclude one another, a DeepSpeed JSON or chat template that is not there.
    """
    return _load(RECIPES[stage], stage, path, overrides)


def load_evaluation(path: str, overrides: Sequence[str] = ()) -> EvaluateRecipe:
    """The recipe for `align evaluate` in the YAML file `path`; all else as in `load_recipe`."""
    return _load(EvaluateRecipe, EVALUATE, path, overrides)


def load_any(stage: str, path: str, overrides: Sequence[str] = ()) -> StageRecipe | EvaluateRecipe:
    """`load_recipe`, or `load_evaluation` when that is the stage."""
    return load_evaluation(path, overrides) if stage == EVALUATE else load_recipe(stage, path, overrides)


def _load(cls: type[AnyRecipe], stage: str, path: str, overrides: Sequence[str]) -> AnyRecipe:
    values, lines = _read(path)
    changed = _apply(values, overrides, get_type_hints(cls))
    if cls is EvaluateRecipe and "models" in values:
        values["models"] = _named(values["models"])
    if values.get("stage") is None:
        values["stage"] = stage

    def where(name: str) -> str:
        if name in changed:
            return f"--{name}"
        return f"{path}:{lines[name]}: {name}" if name in lines else f"{path}: {name}"

    method = values.get("method")
    if "method" in get_type_hints(cls) and isinstance(method, str) and method in METHODS_ELSEWHERE:
        raise UserError(f"{where('method')}: {method} is {METHODS_ELSEWHERE[method]}")
    recipe = build(cls, values, where, lambda name: explain(stage, name))
    if recipe.stage != stage:
        raise UserError(
            f"{where('stage')}: expected {stage!r}, got {recipe.stage!r}; run `align {recipe.stage} {path}`."
        )
    folder = Path(path).resolve().parent
    recipe = _find_files(recipe, folder)
    check_values(recipe, where)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return recipe


def _named(models: Any) -> Any:
    """One model, or a list of them, as a mapping of names to paths; a model is called by its last name where that is enough."""
    paths = [models] if isinstance(models, str) else models
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return models
    short = [Path(path).name for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    return dict(zip(names, paths, strict=True))


def _find_files(recipe: AnyRecipe, folder: Path) -> AnyRecipe:
    """The recipe with its relative paths resolved: from here, else from `folder`, else as they are (hub ids)."""

    def find(path: str) -> str:
        path = os.path.expanduser(path)
        return str(folder / path) if not glob(path) and glob(str(folder / path)) else path

    changes: dict[str, Any] = {
        field.name: find(value)
        for field in dataclasses.fields(recipe)
        if field.name in _PATH_KEYS and (value := getattr(recipe, field.name))
    }
    if isinstance(recipe, EvaluateRecipe):
        changes["models"] = {name: find(model) for name, model in recipe.models.items()}
    for key in ("metrics", "eval_metrics"):
        if names := getattr(recipe, key, None):
            changes[key] = [find(name) if name.endswith(".py") else name for name in names]
    for name in _DATASET_KEYS:
        sources: list[DataSource] = getattr(recipe, name, [])
        if sources:
            changes[name] = [dataclasses.replace(s, path=find(s.path)) if s.path else s for s in sources]
    return dataclasses.replace(recipe, **changes)


def resolve_function(spec: str, key: str) -> Callable[..., Any]:
    """The function that `module:function` names; the module is installed or lies beside the recipe.

    Raises:
        UserError: begins with `key`; no such module, an error inside it, no such function.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{key}: expected `module:function`, got {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises, it is theirs to mend
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            raise UserError(f"{key}: no module {module_name!r}; put {module_name}.py beside the recipe.") from error
        raise UserError(f"{key}: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value)]
        problem = "no function" if function is None else "not a function:"
        raise UserError(f"{key}: {problem} {function_name!r} in {module.__file__}{nearest(function_name, callables)}")
    return function  # type: ignore[no-any-return]  # callable() has just said so


def check_values(recipe: StageRecipe | EvaluateRecipe, where: Callable[[str], str]) -> None:
    """Refuse values out of range, keys that exclude one another, and named files that are not there.

    Args:
        where: key to its place in words, with which an error begins.

    Raises:
        UserError: the first thing that is wrong.
    """
    for name in ("train_dataset", "eval_dataset", "ptx_dataset", "retention"):
        for index, source in enumerate(getattr(recipe, name, [])):
            _check_source(source, f"{where(name)}[{index}]")
            if source.templates and isinstance(recipe, RewardRecipe):
                raise UserError(
                    f"{where(name)}[{index}].templates: they make prompts and completions, and this stage reads pairs with "
                    "`chosen` and `rejected`; leave them out."
                )
    if recipe.chat_template_path and not Path(recipe.chat_template_path).is_file():
        raise UserError(f"{where('chat_template_path')}: no file {recipe.chat_template_path}; name a Jinja file.")
    if isinstance(recipe, EvaluateRecipe):
        _check_evaluate(recipe, where)
        return
    _check_ranges(recipe, where)
    if recipe.lr_scheduler_type not in SCHEDULES:
        hint = nearest(recipe.lr_scheduler_type, SCHEDULES)
        raise UserError(
            f"{where('lr_scheduler_type')}: expected one of {', '.join(SCHEDULES)}, got {recipe.lr_scheduler_type!r}{hint}"
        )
    if not recipe.train_dataset:
        raise UserError(
            f"{where('train_dataset')}: expected a path, a hub id or a mapping, got nothing; name the training rows."
        )
    for name in ("deepspeed", "value_deepspeed", "reference_deepspeed", "reward_deepspeed"):
        if path := getattr(recipe, name, None):
            _check_deepspeed(Path(path), where(name))
    for name in ("reward_funcs", "eval_reward_funcs"):
        for index, spec in enumerate(getattr(recipe, name, [])):
            _check_function(spec, f"{where(name)}[{index}]")
    _check_method(recipe, where)
    if isinstance(recipe, TrainerRecipe):
        _check_best(recipe, where)
    if isinstance(recipe, SFTRecipe):
        _check_sft(recipe, where)
        check_retention(recipe, where)
    elif isinstance(recipe, PPORecipe):
        _check_ppo(recipe, where)
