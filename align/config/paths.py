"""The paths in a recipe: expand `~` and variables, resolve relative paths, and check that output and inputs do not overlap."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from glob import glob, has_magic
from pathlib import Path
from typing import Any, get_type_hints

from align.config.base import DEEPSPEED_KEYS
from align.config.data_source import DataSource
from align.config.keys import Where
from align.config.stages import Stage
from align.errors import UserError

MAX_PATH, MAX_NAME = 4095, 255  # bytes of a path and of a name in it, on Linux
VARIABLE = re.compile(r"\$(?:(\w+)|\{([^{}]*)\})", re.ASCII)
WRITTEN = (
    "metrics.jsonl",
    "samples.jsonl",
    "predictions.jsonl",
    "responses.jsonl",
    "best.jsonl",
    "random.jsonl",
    "pairs.jsonl",
    "run.json",
    "results.json",
)  # what rows could be taken for


def expand(path: str, where: str) -> str:
    """A path with `~` and environment variables (`$DATA`, `${DATA}`) in it replaced.

    Raises:
        UserError: it is empty, no file can have it, or there is no such variable or user; begins with `where`.
    """
    if not path.strip():
        raise UserError(f"{where}: expected a path, got an empty one")
    if "\0" in path:
        raise UserError(f"{where}: expected a path, got {path!r}, which has a NUL character in it")

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ and not os.path.lexists(path):
            raise UserError(
                f"{where}: no environment variable {name}, which {path} names; set it, or write the path out"
            )
        return os.environ.get(name, found[0])

    expanded = VARIABLE.sub(value, os.path.expanduser(path))
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise UserError(f"{where}: no home folder {expanded.split('/')[0]}; write the path out")
    if len(expanded.encode(errors="replace")) > MAX_PATH:
        raise UserError(
            f"{where}: expected a path, got one of {len(expanded)} characters; the system takes {MAX_PATH} bytes."
        )
    longest = max(map(len, (part.encode(errors="replace") for part in expanded.split("/"))))
    if longest > MAX_NAME:
        raise UserError(f"{where}: expected a path, got a name of {longest} bytes in it; {MAX_NAME} bytes fit.")
    return expanded


def expand_output(path: str, where: str) -> str:
    """As `expand`, of a file or folder that is written.

    Raises:
        UserError: as `expand`; or a folder before `..` does not exist, so that the meaning of the path would depend on it.
    """
    expanded = expand(path, where)
    parts = Path(expanded).parts
    for index, part in enumerate(parts):
        if part == ".." and not Path(*parts[:index]).is_dir():
            raise UserError(
                f"{where}: {expanded} has `..` after {Path(*parts[:index])}, which is no folder; leave both out."
            )
    return expanded


def dataset_keys(cls: type[Any]) -> list[str]:
    """The keys of a recipe class that hold data sources."""
    return [name for name, annotation in get_type_hints(cls).items() if annotation == list[DataSource]]


def resolve_paths(recipe: Any, stage: Stage, folder: Path, where: Where) -> Any:
    """The recipe with its paths expanded, and relative ones of inputs found: from here, else from `folder`, else as they are.

    A path that is found nowhere may be a hub id.

    Raises:
        UserError: as `expand`.
    """

    def find(path: str, key: str) -> str:
        path = expand(path, key)
        return str(folder / path) if not glob(path) and glob(str(folder / path)) else path

    found = _map_inputs(recipe, stage, where, find)
    return dataclasses.replace(found, output_dir=expand_output(recipe.output_dir, where("output_dir")))


def check_overlap(recipe: Any, stage: Stage, where: Where, recipe_file: str) -> None:
    """Check that no input lies in the output folder, and the output folder in none.

    What a run reads would change while it runs, or be overwritten, otherwise.

    Args:
        recipe_file: is an input too, if there is such a file.

    Raises:
        UserError: the first that does.
    """
    inputs: list[tuple[str, str]] = [("the recipe", recipe_file)] if os.path.isfile(recipe_file) else []

    def collect(path: str, key: str) -> str:
        inputs.append((key, path))
        return path

    _map_inputs(recipe, stage, lambda name: name, collect)
    for key, path in inputs:
        if problem := overlap(recipe.output_dir, path):
            raise UserError(
                f"{where('output_dir')}: {recipe.output_dir} {problem} {path} ({key}), which the run reads; choose a folder "
                "that neither holds inputs nor lies in one."
            )


def overlap(output: str, path: str) -> str | None:
    """How the folder `output` and a path overlap, in words; None if they do not. Globs are looked through."""
    if has_magic(path) and not os.path.lexists(path):
        inside = any(_lies_in(os.path.realpath(file), os.path.realpath(output)) for file in glob(path, recursive=True))
        return "holds files of" if inside or _would_match(path, Path(os.path.realpath(output))) else None
    there, folder = os.path.realpath(path), os.path.realpath(output)
    if _lies_in(there, folder) and _lies_in(folder, there):
        return "is"
    if _lies_in(there, folder):
        return "holds"
    return "lies in" if _lies_in(folder, there) and not os.path.isfile(there) else None


def _lies_in(path: str, folder: str) -> bool:
    """Whether a path without links is a folder or lies in it, also where two names of a folder differ in case."""
    if Path(path).is_relative_to(folder):
        return True
    if not os.path.exists(folder):
        return False
    return any(each.exists() and each.samefile(folder) for each in (Path(path), *Path(path).parents))


def _would_match(pattern: str, output: Path) -> bool:
    """Whether a glob would match files that a run writes into `output`."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if has_magic(part))
    base, rest = Path(os.path.realpath(Path(*parts[:first]))), parts[first:]
    if not any(fnmatch(name, rest[-1]) for name in WRITTEN):
        return False
    if base.is_relative_to(output):
        return True
    if not output.is_relative_to(base):
        return False
    inner = output.relative_to(base).parts
    for folder, part in zip(inner, rest, strict=False):
        if part == "**":
            return True
        if not fnmatch(folder, part):
            return False
    return len(inner) < len(rest)


def _map_inputs(recipe: Any, stage: Stage, where: Where, change: Callable[[str, str], str]) -> Any:
    """The recipe with every path of an input changed by `change(path, key)`."""

    def changed() -> Iterator[tuple[str, Any]]:
        for name in (*stage.input_models, "chat_template_path", *DEEPSPEED_KEYS):
            value = getattr(recipe, name, None)
            if isinstance(value, dict):
                yield name, {each: change(path, where(name)) for each, path in value.items()}
            elif isinstance(value, list):
                yield name, [change(path, where(name)) for path in value]
            elif value is not None:
                yield name, change(value, where(name))
        for name in ("metrics", "eval_metrics"):
            if metrics := getattr(recipe, name, None):
                yield name, [change(each, where(name)) if each.endswith(".py") else each for each in metrics]
        for name in dataset_keys(stage.recipe):
            yield (
                name,
                [
                    dataclasses.replace(source, path=change(source.path, f"{where(name)}[{index}]"))
                    if source.path is not None
                    else source
                    for index, source in enumerate(getattr(recipe, name))
                ],
            )

    return dataclasses.replace(recipe, **dict(changed()))
