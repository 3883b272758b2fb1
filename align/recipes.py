"""From a YAML file and command-line overrides to a checked recipe, and from a recipe to its batch plan."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from align.config import (
    CLASSES,
    EVALUATE,
    RECIPES,
    DataSource,
    EvaluateRecipe,
    PPORecipe,
    StageRecipe,
    TrainerRecipe,
    UserError,
)
from align.foreign_keys import METHODS_ELSEWHERE, explain
from align.limits import check_values
from align.strict import build, nearest

# The models that each stage starts from, by recipe key: a stage is made anew when one of them was.
INPUTS = {
    "sft": ("model_name_or_path",),
    "reward": ("model_name_or_path", "sft_model_path"),
    "ppo": ("sft_model_path", "reward_model_path", "value_model_path"),
    "classify": ("model_name_or_path",),
    "mlm": ("model_name_or_path",),
}
DEEPSPEED_KEYS = ("deepspeed", "value_deepspeed", "reference_deepspeed", "reward_deepspeed")
_DATASET_KEYS = ("train_dataset", "eval_dataset", "ptx_dataset", "retention")
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
    """The models a stage starts from by recipe key, as `align.checkpoint` wants them."""
    stage = next(name for name, cls in RECIPES.items() if isinstance(recipe, cls))
    return {name: getattr(recipe, name) for name in INPUTS[stage]}


def _named(models: Any) -> Any:
    """One model, or a list of them, as a mapping of names to paths; a model is called by its last name where that is enough."""
    paths = [models] if isinstance(models, str) else models
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return models
    short = [Path(path).name for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    return dict(zip(names, paths, strict=True))


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in lines:
                first = lines[str(key.value)]
                raise UserError(f"{self.name}:{line}: {key.value}: written twice, first in line {first}; keep one.")
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


def _read(path: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line (from 1) of each of its keys."""
    if Path(path).is_dir():
        raise UserError(f"{path}: expected a recipe file, got a folder; `align run {path}` runs its numbered recipes.")
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        loader.name = path
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else None
    except FileNotFoundError:
        there = sorted(glob(os.path.join(os.path.dirname(path) or ".", "*.y*ml")))
        raise UserError(f"{path}: no such recipe{nearest(path, map(os.path.normpath, there))}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{place}: not readable as YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    if not isinstance(values, dict):
        got = "an empty file" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{path}: expected lines of `key: value`, got {got}")
    assert isinstance(node, yaml.MappingNode)
    return values, {str(key.value): key.start_mark.line + 1 for key, _ in node.value}


def _apply(values: dict[str, Any], overrides: Sequence[str], annotations: dict[str, Any]) -> set[str]:
    """Write the overrides into `values`; returns the keys they touch."""
    words: list[tuple[str, list[str]]] = []
    for word in overrides:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            words.append((name.replace("-", "_"), [value] if equals else []))
        elif words:
            words[-1][1].append(word)
        else:
            raise UserError(f"{word}: expected `--key value` after the recipe, got this word alone")
    for dotted, tokens in words:
        top, *inner = dotted.split(".")
        if inner:
            _descend(values, [top, *inner[:-1]])[inner[-1]] = _value(tokens, Any, dotted)
        else:
            values[top] = _value(tokens, annotations.get(top, Any), top)
    return {dotted.split(".")[0] for dotted, _ in words}


def _descend(values: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for depth, name in enumerate(names, start=1):
        inner = values.get(name) or {}
        if isinstance(inner, list) and len(inner) == 1:
            (inner,) = inner
        if isinstance(inner, str) and name in _DATASET_KEYS:
            inner = {"path": inner}
        if not isinstance(inner, dict):
            raise UserError(
                f"--{'.'.join(names[:depth])}: expected one mapping to change a part of, got {inner!r}; give it whole"
            )
        values[name] = inner
        values = inner
    return values


def _value(tokens: list[str], annotation: Any, name: str) -> Any:
    """What the words after `--name` mean where `annotation` is expected; `align.strict` checks it."""
    kinds = get_args(annotation) if NoneType in get_args(annotation) else (annotation,)
    if not tokens and bool in kinds:
        return True
    if len(tokens) > 1 and get_origin(annotation) is list:
        return [_value([token], get_args(annotation)[0], name) for token in tokens]
    if len(tokens) != 1:
        raise UserError(
            f"--{name}: expected one value, got {' '.join(tokens) or 'none'}; quote a value that has spaces"
        )
    try:
        parsed = yaml.load(tokens[0], _Loader)
    except yaml.YAMLError:
        return tokens[0]
    takes_text = any(kind in (str, list[str], DataSource) or get_origin(kind) is Literal for kind in kinds)
    return tokens[0] if takes_text and not isinstance(parsed, str | list | dict | None) else parsed


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


@dataclasses.dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a global batch is laid out; `batch_size == world_size * micro_batch_size * accumulation`."""

    world_size: int  # processes
    batch_size: int  # sequences per optimiser step over all processes
    micro_batch_size: int  # sequences of one forward-backward pass on one process
    accumulation: int  # such passes per optimiser step
    rollout_per_rank: int | None = None  # PPO: prompts per update on one process
    updates: int | None = None  # PPO: rollouts in the whole run
    ptx_per_rank: int = 0  # PPO-ptx: rows per optimiser step on one process

    @property
    def policy_passes(self) -> int:
        """Forward-backward passes of the policy per optimiser step: those of the batch, and those of PPO-ptx."""
        return self.accumulation + -(-self.ptx_per_rank // self.micro_batch_size)

    def describe(self) -> str:
        """The plan in one line."""
        line = (
            f"{self.batch_size} sequences per step = {self.world_size} x {self.micro_batch_size} x {self.accumulation}"
        )
        line += " (processes x micro-batch x accumulation)"
        if self.updates is not None:
            line += f", {self.updates} updates of {self.world_size} x {self.rollout_per_rank} responses"
        return line


def batch_plan(recipe: StageRecipe, world_size: int) -> BatchPlan:
    """Lay the recipe's global sizes out over `world_size` processes.

    The micro-batch is the largest that divides a process's share and is at most `per_device_train_batch_size`.

    Raises:
        UserError: a global size does not divide by `world_size`, or the DeepSpeed JSON fixes another size.
    """

    def share(name: str) -> int:
        size: int = getattr(recipe, name)
        if size % world_size:
            near = [n for n in (size - size % world_size, size + world_size - size % world_size) if n]
            raise UserError(
                f"{name}: expected a multiple of the {world_size} processes, got {size}; "
                f"use {' or '.join(map(str, near))}, or another number of processes."
            )
        return size // world_size

    name = "train_batch_size" if isinstance(recipe, TrainerRecipe) else "minibatch_size"
    own = share(name)
    micro = next(size for size in range(min(own, recipe.per_device_train_batch_size), 0, -1) if own % size == 0)
    plan = BatchPlan(world_size, own * world_size, micro, own // micro)
    if isinstance(recipe, PPORecipe):
        updates = recipe.total_episodes // recipe.rollout_batch_size
        plan = dataclasses.replace(plan, rollout_per_rank=share("rollout_batch_size"), updates=updates)
        if recipe.ptx_dataset:
            plan = dataclasses.replace(plan, ptx_per_rank=share("ptx_batch_size"))
    for name in DEEPSPEED_KEYS:
        if not (path := getattr(recipe, name, None)):
            continue
        sizes = json.loads(Path(path).read_text(encoding="utf-8"))
        for key, planned in (
            ("train_batch_size", plan.batch_size),
            ("train_micro_batch_size_per_gpu", plan.micro_batch_size),
            ("gradient_accumulation_steps", plan.accumulation),
        ):
            if sizes.get(key, "auto") not in ("auto", planned):
                raise UserError(f'{path}: {key}: expected "auto" or {planned} ({plan.describe()}), got {sizes[key]!r}')
    return plan
