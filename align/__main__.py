"""The `align` command: parse, load the recipe, hand over to a stage."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from align.cli import run as pipeline
from align.config.stages import CLASSES
from align.errors import UserError, nearest
from align.runs.launch import _guard, _stage, launched_words
from align.runs.quiet import quiet

USAGE = """\
usage: align sft|reward|ppo|classify|mlm RECIPE [--key value ...]
                                                        run one stage; `align ppo --help` lists its keys
       align evaluate RECIPE [--key value ...]          compare models, and examples in the prompt, on the same rows
       align run DIR [--num_gpus N] [--key value ...]   run a folder's numbered recipes in order
       align check RECIPE|DIR [--num_gpus N] [--key value ...]
                                                        say whether it would run, and in how much memory
       align merge ADAPTER OUTPUT                       make an adapter part of the model it was trained on
       align verify [--num_gpus N] [--json [FILE]] [--key value ...]
                                                        train PPO on languages with a known optimum, and compare
       align --version | --help

A stage also runs under the launcher: deepspeed --num_gpus N --module align.ppo RECIPE [--key value ...]
The same command continues a run that was cut off.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for an error that the user can mend, 130 when interrupted."""
    words = launched_words(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else None
    if command in CLASSES:
        return _guard(lambda: _stage(command, words[1:]))
    if command in ("run", "check"):
        return _guard(lambda: _folder_command(command, words[1:]))
    if command == "merge":
        return _guard(lambda: _merge(words[1:]))
    if command == "verify":
        return _guard(lambda: _verify(words[1:]))
    if command == "--version":
        print(f"align {_version()}")
        return 0
    if command in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    known = [*CLASSES, "run", "check", "merge", "verify", "--version", "--help"]
    got = f"unknown command {command!r}{nearest(command, known)}" if command else "no command given"
    print(f"error: {got}\n{USAGE}", end="", file=sys.stderr)
    return 2


def _folder_command(command: str, words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(USAGE, end="")
        return 0
    if not words or words[0].startswith("-"):
        what = "folder of numbered recipes" if command == "run" else "recipe or a folder of them"
        raise UserError(f"align {command}: expected a {what} first, as in `align {command} recipes/quickstart`.")
    num_gpus, overrides = _take_num_gpus(words[1:])
    if command == "run":
        return pipeline.run(words[0], num_gpus, overrides)
    return int(importlib.import_module("align.cli.check.check").run(words[0], num_gpus, overrides))


def _merge(words: list[str]) -> int:
    if len(words) != 2 or words[0].startswith("-"):
        raise UserError(
            "align merge: expected an adapter's folder and a new folder, as in `align merge out/adapter merged`."
        )
    print(importlib.import_module("align.cli.merge").run(*words))
    return 0


def _verify(words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(USAGE, end="")
        return 0
    num_gpus, words = _take_num_gpus(words)
    path = None
    if "--json" in words:
        at = words.index("--json")
        has_path = len(words) > at + 1 and not words[at + 1].startswith("--")
        path = words.pop(at + 1) if has_path else "-"
        words.pop(at)
    quiet()
    return int(importlib.import_module("align.cli.verify").run(num_gpus, path, words))


def _take_num_gpus(words: list[str]) -> tuple[int | None, list[str]]:
    """`--num_gpus N` (or `--num_accelerators N`, `=N`) out of `words`, and the rest."""
    rest: list[str] = []
    found = None
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name.replace("-", "_") in ("__num_gpus", "__num_accelerators"):
            found = value if equals else next(left, "")
            if not found.isdigit() or int(found) < 1:
                raise UserError(f"{name}: expected a number of processes from 1, got {found or 'nothing'}")
        else:
            rest.append(word)
    return int(found) if found else None, rest


def _version() -> str:
    try:
        return importlib.metadata.version("align")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
