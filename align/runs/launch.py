"""Run a stage from the command line, alone or under the `deepspeed` launcher."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from align.config.load import load_any
from align.config.stages import stage_help
from align.errors import UserError
from align.runs.quiet import quiet

PIPELINE = "ALIGN_PIPELINE"  # set in the stages that `align run` starts, which end when it is gone
MODULES = {
    "sft": "align.sft.train",
    "reward": "align.reward.train",
    "ppo": "align.ppo.train",
    "classify": "align.encoders.classify",
    "mlm": "align.encoders.mlm",
    "evaluate": "align.evaluate.compare",
}


def run_stage_cli(stage: str, argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m align.<stage>`, alone or under the `deepspeed` launcher; exits the process."""
    words = launched_words(sys.argv[1:] if argv is None else argv)
    sys.exit(_guard(lambda: _stage(stage, words)))


def launched_words(argv: Sequence[str]) -> list[str]:
    """The command line without the launcher's `--local_rank`; from then on this process ends when what started it is gone."""
    words = list(argv)
    launched = bool(words) and words[0].startswith(("--local_rank=", "--local-rank="))
    if launched:
        words = words[1:]  # the launcher says it in LOCAL_RANK too
    _end_with_parents((2 if launched else 0) + (PIPELINE in os.environ))
    return words


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
    importlib.import_module(MODULES[stage]).run(recipe)
    return 0


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
