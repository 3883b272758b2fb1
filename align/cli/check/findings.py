"""How `align check` tells what it finds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.errors import UserError


class Report:
    """Prints findings as they come, and counts the mistakes."""

    def __init__(self, console: Console):
        self.console = console
        self.mistakes = 0
        self.stand_ins: dict[str, str] = {}  # folder to what it stands for, which is what the user knows

    def say(self, text: str, good: bool = True) -> None:
        for folder, name in self.stand_ins.items():
            text = text.replace(folder, name)
        mark = Text("  ok     " if good else "  error  ", style="green" if good else "bold red")
        self.console.print(mark + Text(text), soft_wrap=True)

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """A part of the check: a mistake in it is told, and the check goes on behind it."""
        try:
            yield
        except UserError as error:
            self.mistakes += 1
            self.say(str(error), good=False)


def writable(folder: Path) -> str:
    """The words for a folder that can be made and written.

    Raises:
        UserError: it cannot.
    """
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"output_dir: cannot write to {folder}, because of {there}; choose another folder.")
    return str(folder)


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer in a few words."""
    return f"tokenizer of {len(tokenizer)} tokens, with{'' if tokenizer.chat_template else 'out'} a chat template"
