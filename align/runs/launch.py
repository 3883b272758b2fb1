"""Run a stage: from the command line, alone or under the `deepspeed` launcher, or from Python."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.config.base import DEEPSPEED_KEYS
from align.config.load import load_recipe
from align.config.recipe import Recipe
from align.config.stages import STAGES, stage_of
from align.engine.faults import during, unless_removed
from align.engine.rank_errors import reported
from align.engine.stopping import ask_to_stop
from align.errors import UserError
from align.runs import lock
from align.runs.command_line import INTERRUPTED, CommandParser, exit_code, stage_arguments
from align.runs.launchers import adopt_ranks
from align.runs.quiet import quiet

PIPELINE = "ALIGN_PIPELINE"  # set in the stages that `align run` starts, which end when it is gone


def run_stage_cli(stage: str, argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m align.<stage>`, alone or under the `deepspeed` launcher; exits the process."""
    words = command_arguments(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        arguments, overrides = CommandParser(**stage_arguments(STAGES[stage])).parse_known_args(words)
        return run_stage(stage, arguments.path, overrides)

    sys.exit(exit_code(command))


def run_stage(stage: str, path: str, overrides: Sequence[str]) -> int:
    """Load the recipe in `path` and run its stage, as one of several ranks if it was started so; returns 0.

    A second Ctrl-C ends the process wherever it is.

    Raises:
        UserError: a wrong recipe, or whatever stops the stage.
    """
    adopt_ranks()
    end_on_signals()
    run_recipe(load_recipe(stage, path, overrides), import_frozen)
    return 0


def run_recipe(recipe: Recipe, import_module: Callable[[str], Any] = importlib.import_module) -> Any:
    """Run a checked recipe in this process; returns what the stage's own `run` does. Only now is torch imported."""
    if "WORLD_SIZE" not in os.environ:
        # Alone on a machine with several GPUs, Trainer would use them all by DataParallel.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    quiet()  # before torch and its company are imported: some read their settings only then
    stage = import_module(stage_of(recipe).module)
    with reported(), unless_removed(Path(recipe.output_dir)), during("start"):
        return stage.run(recipe)


def import_frozen(name: str) -> Any:
    """Import a module with its libraries, and leave all that is there by then out of every garbage collection.

    For a process of our own. Collections would walk through a million objects again and again: a quarter of the time of
    a short stage.
    """
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def run_from_python(recipe: Recipe) -> Any:
    """`run_recipe` for a program that goes on afterwards: its environment and warnings are restored.

    Raises:
        UserError: the recipe needs DeepSpeed, which cannot be started a second time in a process, or torch uses several
            GPUs already, over which a Trainer would spread one batch.
    """
    adopt_ranks()
    end_on_signals()
    if "WORLD_SIZE" not in os.environ:
        for key in DEEPSPEED_KEYS:
            if getattr(recipe, key, None):
                raise UserError(
                    f"{key}: a stage that is called from Python runs without DeepSpeed; run `align {stage_of(recipe).name}`, "
                    "or this program under the `deepspeed` launcher."
                )
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized() and torch.cuda.device_count() > 1:
            raise UserError(
                f"a stage that is called from Python uses one GPU, and torch already sees {torch.cuda.device_count()} of them; "
                "set CUDA_VISIBLE_DEVICES to one before torch is used."
            )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    with warnings.catch_warnings():
        try:
            return run_recipe(recipe)
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            if visible is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible


def command_arguments(argv: Sequence[str]) -> list[str]:
    """The command line without the launcher's `--local_rank`; from then on this process ends with its parents."""
    words = list(argv)
    launched = bool(words) and words[0].startswith(("--local_rank=", "--local-rank="))
    if launched:
        words = words[1:]  # the launcher sets LOCAL_RANK too
    end_with_parents((2 if launched else 0) + (PIPELINE in os.environ))
    return words


def end_on_signals() -> None:
    """End this process at the second SIGINT, should the first not have done so, and at SIGTERM once it has given up its locks.

    A loop of training steps ends itself at the first SIGTERM (`align/engine/stopping.py`).

    A Python handler never runs while the main thread waits in C, for a collective or in a user's function. In another
    thread than the main one, signals are left to the program.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(
        writer, warn_on_full_buffer=False
    )  # gets the number of each signal that has a handler, at once
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)

    def watch() -> None:
        interrupts = 0
        while interrupts < 2:
            signals = os.read(reader, 64)
            if signal.SIGTERM in signals and signal.getsignal(signal.SIGTERM) is _on_sigterm and not ask_to_stop():
                lock.release_all()
                os._exit(128 + signal.SIGTERM)
            interrupts += signals.count(signal.SIGINT)
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)

    threading.Thread(target=watch, daemon=True, name="signals").start()
    _watch_forks()


def _on_sigterm(signum: int, frame: Any) -> None:
    """A handler that does nothing: with it, SIGTERM reaches the thread that watches signals."""


@functools.cache
def _watch_forks() -> None:
    """Let signals end a forked worker itself, rather than reach its parent, from its first moment on."""

    def leave() -> None:
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) is _on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mask(signal.SIG_UNBLOCK)

    def mask(operation: int) -> None:
        signal.pthread_sigmask(operation, {signal.SIGTERM})

    os.register_at_fork(
        before=lambda: mask(signal.SIG_BLOCK), after_in_parent=lambda: mask(signal.SIG_UNBLOCK), after_in_child=leave
    )


def end_with_parents(depth: int) -> None:
    """End this process when one of its `depth` nearest ancestors is gone.

    The `deepspeed` command and its launcher, and `align run`, cannot pass on a SIGKILL: without this their
    ranks would train on, unseen, and write into the folder that the next start resumes.
    """
    if not depth:
        return
    import psutil  # comes with deepspeed and accelerate

    parents = psutil.Process().parents()[:depth]

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while all(parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE for parent in parents):
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os._exit(128 + signal.SIGTERM)  # a Python handler never runs while the main thread waits in a collective

    threading.Thread(target=watch, daemon=True, name="end-with-parents").start()
