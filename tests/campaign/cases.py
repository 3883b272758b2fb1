"""A case, and the folder it runs in."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.campaign import world
from tests.campaign.judge import changed, refused, snapshot
from tests.campaign.process import Ended, run

Content = Any  # bytes, text, rows (JSON lines), another JSON value, None to delete, or a function of the path

MISSING = object()  # in place of a key's value: leave the key out


class Place:
    """A copy of the world that a case may change, with the working directory `folder`."""

    def __init__(self, folder: Path, template: Path, seed: str) -> None:
        self.root, self.folder, self.template = folder, folder / "work", template
        self.random = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(template, self.folder, symlinks=True)

    def write(self, files: Mapping[str, Content]) -> None:
        for name, content in files.items():
            path = self.folder / name
            if content is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            elif isinstance(content, list):
                path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
            else:
                path.write_text(json.dumps(content), encoding="utf-8")

    def recipe(self, stage: str, keys: Mapping[str, Any]) -> None:
        """Write the stage's recipe with some keys changed."""
        changes = {name: value for name, value in {**world.recipe(stage), **keys}.items() if value is not MISSING}
        (self.folder / f"{stage}.yaml").write_text(
            yaml.safe_dump(changes, sort_keys=False, allow_unicode=True), encoding="utf-8", errors="surrogatepass"
        )

    def run(self, *words: str, **settings: Any) -> Ended:
        return run(words, self.folder, self.root / "log", **settings)

    def snapshot(self) -> dict[str, str]:
        return snapshot(self.folder)


@dataclass(frozen=True)
class Case:
    """One line of a table.

    Attributes:
        check: runs it; returns the problems, each of which begins with its kind and a colon.
    """

    kind: str
    name: str
    check: Callable[[Place], list[str]]


@dataclass(frozen=True)
class Refusal:
    """Bad input: one error, exit code 2, nothing written, nothing run.

    Attributes:
        keys: changes to the recipe of `stage`.
        files: files of the world to write, delete, or make otherwise.
        words: the command line; by default the stage with its recipe.
        says: words of which the error has to have one; by default the changed keys and files.
        seconds: within which it has to end.
    """

    stage: str = "sft"
    keys: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Content] = field(default_factory=dict)
    words: Sequence[str] = ()
    says: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 180

    def __call__(self, place: Place) -> list[str]:
        place.write(self.files)
        if self.keys:
            place.recipe(self.stage, self.keys)
        before = place.snapshot()
        ended = place.run(*(self.words or (self.stage, f"{self.stage}.yaml")), seconds=self.seconds, env=self.env)
        says = self.says or [*self.keys, *self.files]
        problems, changes = refused(ended, says), changed(before, place.snapshot())
        if ended.code == 0:  # it ran: what it wrote is no further problem
            changes = [change for change in changes if not change.startswith("trace")]
        return [*problems, *changes]


def refusals(kind: str, table: Mapping[str, Refusal]) -> Iterator[Case]:
    yield from (Case(kind, name, refusal) for name, refusal in table.items())


def link_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir(exist_ok=True)


def cut(path: Path) -> None:
    """Keep the first half of a file."""
    os.truncate(path, path.stat().st_size // 2)
