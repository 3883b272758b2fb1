"""The `align` command: parse, load the recipe, hand over to a stage."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from align import pipeline
from align.config import CLASSES, DataSource, UserError
from align.recipes import load_any
from align.strict import nearest, type_name
from align.tracking import quiet

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
    words = list(sys.argv[1:] if argv is None else argv)
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


def run_stage_cli(stage: str, argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m align.<stage>`, alone or under the `deepspeed` launcher; exits the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    launched = bool(words) and words[0].startswith(("--local_rank=", "--local-rank="))
    if launched:
        words = words[1:]  # the launcher says it in LOCAL_RANK too
    _end_with_parents((2 if launched else 0) + (pipeline.PIPELINE in os.environ))
    sys.exit(_guard(lambda: _stage(stage, words)))


def _guard(command: Callable[[], int]) -> int:
    """The command's exit code, with its errors said in one line."""
    try:
        return command()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            # All ranks usually fail alike: rank 0 tells, and the launcher ends this rank while it waits. When
            # the mistake is met on this rank only, nobody else tells.
            time.sleep(5)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130


def _stage(stage: str, words: list[str]) -> int:
    if "--help" in words or "-h" in words:
        print(stage_help(stage), end="")
        return 0
    if not words or words[0].startswith("-"):
        raise UserError(f"align {stage}: expected a recipe file first; `align {stage} --help` lists the keys.")
    recipe = load_any(stage, words[0], words[1:])
    if "WORLD_SIZE" not in os.environ:
        # Alone on a machine with several GPUs, Trainer would use them all by DataParallel.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    quiet()  # before torch and its company are imported: some read their settings only then
    importlib.import_module(f"align.{stage}").run(recipe)
    return 0


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
    return int(importlib.import_module("align.check").run(words[0], num_gpus, overrides))


def _merge(words: list[str]) -> int:
    if len(words) != 2 or words[0].startswith("-"):
        raise UserError(
            "align merge: expected an adapter's folder and a new folder, as in `align merge out/adapter merged`."
        )
    print(importlib.import_module("align.merge").run(*words))
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
    return int(importlib.import_module("align.verify").run(num_gpus, path, words))


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


def stage_help(stage: str) -> str:
    """Every key of a stage's recipe with its type, default and meaning, wrapped to the terminal."""
    cls: type[Any] = CLASSES[stage]
    head = [
        f"usage: align {stage} RECIPE [--key value ...]",
        f"       deepspeed --num_gpus N --module align.{stage} RECIPE [--key value ...]",
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


def _version() -> str:
    try:
        return importlib.metadata.version("align")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _end_with_parents(depth: int) -> None:
    """End this process when one of its `depth` nearest ancestors is gone.

    The `deepspeed` command and its launcher, and `align run`, cannot pass on a SIGKILL: without this their
    ranks would train on, unseen, and write into the folder that the next start resumes.
    """
    if not depth:
        return
    import psutil  # type: ignore[import-untyped]  # comes with deepspeed and accelerate

    parents = psutil.Process().parents()[:depth]

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while all(parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE for parent in parents):
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os._exit(128 + signal.SIGTERM)  # a Python handler never runs while the main thread waits in a collective

    threading.Thread(target=watch, daemon=True, name="end-with-parents").start()


if __name__ == "__main__":
    sys.exit(main())
