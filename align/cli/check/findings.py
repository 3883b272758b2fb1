"""How `align check` prints what it finds, and what the checks of a folder's recipes share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.config.recipe import Recipe
from align.config.stages import stage_of
from align.data.chat_template import TODAY, writes_date
from align.data.end_tokens import end_ids
from align.errors import UserError
from align.terminal import printable

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


class Report:
    """Prints findings as they come, and counts the mistakes."""

    def __init__(self, console: Console):
        self.console = console
        self.mistakes = 0
        self.names: dict[str, str] = {}  # of stand-in folders, as the user knows them

    def say(self, text: str, level: Literal["ok", "warning", "error"] = "ok") -> None:
        """Print one finding. Only errors change the exit code."""
        for folder, name in self.names.items():
            text = text.replace(folder, name)
        style = {"ok": "green", "warning": "bold yellow", "error": "bold red"}[level]
        mark = Text(f"  {level:<7}  ", style=style)
        self.console.print(mark + Text(printable(text)), soft_wrap=True)

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """A part of the check: a UserError in it, and those found with it, are printed and counted; the check goes on after it."""
        try:
            yield
        except UserError as error:
            for each in (error, *error.others):
                self.mistakes += 1
                self.say(str(each), "error")


@dataclass(frozen=True, slots=True)
class Context:
    """The context of a recipe's check."""

    report: Report
    stand_ins: dict[Path, Path]  # by output folder of earlier recipes: a folder with all but the weights
    num_gpus: int | None
    folder: Path  # where this recipe's stand-in goes
    name: str  # of the recipe


def writable(folder: Path) -> str:
    """The path of a folder that exists or can be created, and written to.

    Raises:
        UserError: it cannot.
    """
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"output_dir: cannot write to {folder}, because of {there}; choose another folder.")
    return str(folder)


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer in a few words, and the tokens that end a response where there are several."""
    ends = end_ids(tokenizer) if tokenizer.eos_token is not None else ()
    names = " or ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ends)
    template = f"with{'' if tokenizer.chat_template else 'out'} a chat template"
    if writes_date(tokenizer):
        template += f" that writes the date, in all stages {TODAY}"
    return f"tokenizer of {len(tokenizer)} tokens, {template}" + (f", responses end with {names}" if ends[1:] else "")


def with_stand_ins(recipe: AnyRecipe, stand_ins: dict[Path, Path], report: Report) -> AnyRecipe:
    """The recipe with folders of `stand_ins`, which hold all but the weights, in place of models not yet trained."""
    changes: dict[str, Any] = {}

    def replaced(key: str, path: str) -> str:
        if (stand_in := stand_ins.get(Path(path).resolve())) is None:
            return path
        report.say(f"{key}: {stand_in}")
        return str(stand_in)

    for key in stage_of(recipe).input_models:
        value = getattr(recipe, key)
        if isinstance(value, list):
            changes[key] = [replaced(key, path) for path in value]
        elif value:
            changes[key] = replaced(key, value)
    return dataclasses.replace(recipe, **changes)
