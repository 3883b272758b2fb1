"""Command lines whose recipe keys are left to `align.config`: parsers, and errors in one line."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from align.config.help import describe_keys
from align.config.stages import Stage
from align.engine.faults import during
from align.engine.rank_errors import OtherRankFailed
from align.errors import UserError
from align.terminal import say


class Printed(SystemExit):
    """`--help` or `--version` has been printed."""


INTERRUPTED = "interrupted; the same command continues, from the last checkpoint if there is one (save_steps)"

BROKEN_PIPE = 128 + signal.SIGPIPE  # the exit code, as the shell gives it for Unix tools

USER_ERROR = 2  # the exit code after a UserError


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors. `parse_known_args` leaves the words that it does not know, `--key value`.

    Args:
        no_path: for a command that takes a path before any option, what the error says when it is missing.
        recipe: the recipe class of a stage, whose keys `--help` then explains.
    """

    def __init__(self, *, no_path: str | None = None, recipe: type[Any] | None = None, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False, **kwargs})
        self.no_path, self.recipe = no_path, recipe
        if no_path is not None:
            self.add_argument("path", help=argparse.SUPPRESS)  # the usage line names it

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words: Sequence[str] = sys.argv[1:] if args is None else args
        if "--" in words:
            self.error("--: expected `--key value`, got these two dashes alone; leave them out.")
        asks_for_help = "-h" in words or "--help" in words
        if self.no_path is not None and not asks_for_help and (not words or words[0].startswith("-")):
            self.error(self.no_path)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise Printed(status)

    def print_help(self, file: Any = None) -> None:
        sys.stdout.write(self.format_help())  # argparse's own hides that nobody reads it

    def format_help(self) -> str:
        if self.recipe is None:
            return super().format_help()
        return f"{self.format_usage()}\n{describe_keys(self.recipe)}"


def stage_arguments(stage: Stage) -> dict[str, Any]:
    """The arguments of `CommandParser` for a stage: a recipe, then any of its keys."""
    name = stage.name
    # Only a package with the stage's name is a module to launch: `align.ppo`, but `align mlm`.
    module = f"align.{name}" if stage.module.startswith(f"align.{name}.") else f"align {name}"
    launched = f"       deepspeed --num_gpus N --module {module} RECIPE"
    overrides = " [--key value ...]"
    return {
        "prog": f"align {name}",
        "usage": f"align {name} RECIPE{overrides}\n{launched}{overrides if len(launched + overrides) <= 80 else ' ...'}",
        "no_path": f"expected a recipe file first; `align {name} --help` lists the keys.",
        "recipe": stage.recipe,
    }


def exit_code(command: Callable[[], int]) -> int:
    """The exit code of `command`; 0 after `--help`, 2 after a UserError, printed in one line, and 130 after Ctrl-C.

    2 also if anything calls `sys.exit`: its code would be taken for that of the command. 141, and not a word, if nobody
    reads the output any more.
    """
    try:
        with during("start"):
            try:
                code = command()
            except Printed:
                code = 0
            sys.stdout.flush()  # now, since an error of writing would have a traceback at exit
            return code
    except BrokenPipeError:  # `align ... | head`: whoever read the output has seen enough
        if _is_read(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is not written at exit either
        return BROKEN_PIPE
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > 128:  # a signal's handler
            raise
        place = traceback.extract_tb(ended.__traceback__)[-1]
        say(
            f"error: sys.exit({ended.code!r}) in {place.filename}, line {place.lineno}, ended the command; raise an error there."
        )
        return USER_ERROR
    except OtherRankFailed as error:
        return error.code
    except UserError as error:
        if os.environ.get("RANK", "0") != "0" and not error.reported:
            # A wrong recipe. All ranks fail alike: rank 0 prints the error, and the launcher ends this rank while it waits.
            # An error on this rank alone is printed after the wait.
            time.sleep(5)
        rank = f"rank {os.environ['RANK']}: " if error.reported and os.environ["RANK"] != "0" else ""
        say(f"error: {rank}{' '.join(str(error).split())}")
        return USER_ERROR
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


def _is_read(pipe: int) -> bool:
    """Whether the other end of a pipe is open."""
    poll = select.poll()
    poll.register(pipe, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))
