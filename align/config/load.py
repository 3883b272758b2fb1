"""From a YAML file and command-line overrides, or from Python, to a checked recipe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from align.config.base import DEEPSPEED_KEYS, FUNCTION_KEYS, StageRecipe, check_training_rules
from align.config.convert import build
from align.config.data_source import check_source
from align.config.functions import make_importable
from align.config.keys import Where
from align.config.method import check_method
from align.config.paths import check_overlap, dataset_keys, expand, resolve_paths
from align.config.read import apply_overrides, read_yaml
from align.config.recipe import Recipe
from align.config.stages import STAGES, Stage
from align.config.unknown_keys import METHODS_ELSEWHERE, explain
from align.errors import UserError, nearest, run_all

T = TypeVar("T", bound=Recipe)

FILE_KEYS = (
    "chat_template_path",
    *FUNCTION_KEYS,
    "grader",
    "metrics",
    "eval_metrics",
    *DEEPSPEED_KEYS,
)
# What a stage gives to chat templates, and what else `apply_chat_template` would take for a setting of its own.
OF_TEMPLATES = {
    *("messages", "conversation", "conversations", "tools", "documents", "add_generation_prompt"),
    *("chat_template", "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
}
ACCEPTABLE_RECORDS = ("run.json", "metrics.jsonl", "samples.jsonl", "best")


def load_recipe(stage: str, path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe for `stage` in the YAML file `path`, checked, with `stage` filled in.

    Args:
        overrides: command-line words: `--key value`, `--key=value`, `--flag`, `--list_key a b`,
            `--mapping_key.name value`. Values are YAML.

    `~` and `$VARIABLE` are replaced in paths. Relative ones are looked up from the current directory and then from the
    recipe's folder, which is also added to `sys.path`, so that `module:function` can name a file beside the recipe.

    Raises:
        UserError: an unreadable file, an unknown key, a value of another type or out of range, keys that
            exclude one another, a DeepSpeed JSON or chat template that does not exist, an input in the output folder.
    """
    path = expand(path, "recipe")
    values, lines = read_yaml(path)
    changed = apply_overrides(values, overrides, get_type_hints(STAGES[stage].recipe))
    where = _places(path, lines, {name: f"--{name}" for name in changed})
    recipe: Recipe = _checked(STAGES[stage], values, where, Path(path).resolve().parent, path)
    return recipe


def as_recipe(cls: type[T], recipe: T | Mapping[str, Any] | str | os.PathLike[str], **keys: Any) -> T:
    """A checked recipe from what a Python program has: a recipe, a mapping of keys, or the path of a YAML file.

    Args:
        cls: the recipe class of the stage.
        keys: keys that override those of `recipe`.

    Relative paths are looked up from the current directory, and those in a YAML file then from its folder.

    Raises:
        UserError: as `load_recipe`; begins with the key that is wrong.
    """
    stage = next(each for each in STAGES.values() if each.recipe is cls)
    path, folder = "RECIPE", Path.cwd()
    where: Where = str  # a key by its name alone
    if isinstance(recipe, str | os.PathLike):
        path = expand(os.fspath(recipe), "recipe")
        folder = Path(path).resolve().parent
        values, lines = read_yaml(path)
        where = _places(path, lines, {name: name for name in keys})
    elif isinstance(recipe, cls):
        values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    elif isinstance(recipe, Mapping):
        values = dict(recipe)
    else:
        raise UserError(
            f"recipe: expected {cls.__name__}, a mapping of its keys or the path of a YAML file, got "
            f"{type(recipe).__name__}"
        )
    plain: dict[str, Any] = _plain({**values, **keys})
    checked: T = _checked(stage, plain, where, folder, path)
    return checked


def _plain(value: Any) -> Any:
    """A value from a Python program as YAML would give it: paths as text, tuples as lists, numbers of NumPy as numbers."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _places(path: str, lines: Mapping[str, int], overridden: Mapping[str, str]) -> Where:
    """How an error names a key: where it was overridden, else by file and line."""

    def where(name: str) -> str:
        if name in overridden:
            return overridden[name]
        return f"{path}:{lines[name]}: {name}" if name in lines else f"{path}: {name}"

    return where


def _checked(stage: Stage, values: dict[str, Any], where: Where, folder: Path, path: str) -> Any:
    """The stage's recipe with these values. `path` is that of the recipe, also for the command that an error suggests."""
    cls = stage.recipe
    annotations = get_type_hints(cls)
    other = values.get("stage")
    if isinstance(other, str) and other in STAGES and other != stage.name:
        raise UserError(f"{where('stage')}: expected {stage.name!r}, got {other!r}; run `align {other} {path}`.")
    for name in stage.input_models:
        if annotations[name] == dict[str, str] and name in values:
            values[name] = _named(values[name], where(name))
    if values.get("stage") is None:
        values["stage"] = stage.name
    method = values.get("method")
    if "method" in annotations and isinstance(method, str) and method in METHODS_ELSEWHERE:
        raise UserError(f"{where('method')}: {method} is {METHODS_ELSEWHERE[method]}")
    recipe = build(cls, values, where, lambda name: explain(stage.name, name))
    if recipe.stage != stage.name:
        instead = f"; run `align {recipe.stage} {path}`." if recipe.stage in STAGES else nearest(recipe.stage, STAGES)
        raise UserError(f"{where('stage')}: expected {stage.name!r}, got {recipe.stage!r}{instead}")
    recipe = resolve_paths(recipe, stage, folder, where)
    check_values(recipe, stage, where)
    check_overlap(recipe, stage, where, path)
    make_importable(folder, _function_modules(recipe, stage))
    return recipe


def _function_modules(recipe: Any, stage: Stage) -> set[str]:
    """The top-level modules of the functions that a recipe names."""
    sources = [source for name in dataset_keys(stage.recipe) for source in getattr(recipe, name)]
    names = [*(source.generator for source in sources), getattr(recipe, "grader", None)]
    names += [name for key in FUNCTION_KEYS for name in getattr(recipe, key, [])]
    return {name.partition(":")[0].partition(".")[0] for name in names if name}


def _named(models: Any, where: str) -> Any:
    """One model, or a list, as a mapping of names to paths; a name is the last part of its path if that is unique."""
    paths = [models] if isinstance(models, str) else models
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return models
    if repeated := next((path for path in paths if paths.count(path) > 1), None):
        raise UserError(
            f"{where}: {repeated!r} is written twice; keep one, or give both names, as in {{a: ..., b: ...}}."
        )
    short = [Path(path).name for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    return dict(zip(names, paths, strict=True))


def acceptable_keys(stage: Stage) -> list[str]:
    """The values that `accept_changes` takes: keys of files or rows that a run starts from, and records of the run."""
    keys = {*stage.input_models, *dataset_keys(stage.recipe), *FILE_KEYS}
    return [*(each.name for each in dataclasses.fields(stage.recipe) if each.name in keys), *ACCEPTABLE_RECORDS]


def check_values(recipe: Recipe, stage: Stage, where: Where) -> None:
    """Refuse values out of range, keys that exclude one another, and named files that do not exist.

    Args:
        where: from the name of a key to its place in words, with which an error begins.

    Raises:
        UserError: the first that is found, with the others.
    """
    checks: list[Callable[[], object]] = [partial(_check_named, recipe, stage, where)]
    named_templates = bool(getattr(recipe, "templates", None))
    for name in dataset_keys(stage.recipe):
        for index, source in enumerate(getattr(recipe, name)):
            checks.append(partial(check_source, source, f"{where(name)}[{index}]", named_templates))
    if isinstance(recipe, StageRecipe):
        checks += [partial(check_training_rules, recipe, where), partial(check_method, recipe, stage.methods, where)]
    run_all(*checks, partial(stage.check_rules, recipe, where))


def _check_named(recipe: Recipe, stage: Stage, where: Where) -> None:
    """Check what `accept_changes`, `chat_template_path` and `chat_template_kwargs` name.

    Raises:
        UserError: the first that is found.
    """
    for name in recipe.accept_changes:
        if name not in (known := acceptable_keys(stage)):
            raise UserError(
                f"{where('accept_changes')}: expected some of {', '.join(known)}, got {name!r}{nearest(name, known)}"
            )
    if recipe.chat_template_path and not Path(recipe.chat_template_path).is_file():
        raise UserError(f"{where('chat_template_path')}: no file {recipe.chat_template_path}; name a Jinja file.")
    for name in OF_TEMPLATES & recipe.chat_template_kwargs.keys():
        raise UserError(
            f"{where('chat_template_kwargs')}: {name} is given to every chat template by the stage itself; leave it out"
        )
