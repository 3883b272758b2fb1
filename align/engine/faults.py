"""Turn out-of-memory and disk errors into user errors that name the phase and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from align.errors import UserError, is_out_of_memory

REMEDIES = "set gradient_checkpointing: true or bf16: true, or shard over more GPUs (deepspeed)"
TRAINING = f"per_device_train_batch_size, {REMEDIES}"
UPDATING = f"per_device_train_batch_size or max_tokens_per_device, {REMEDIES}"
SCORING = "per_device_eval_batch_size"
PASSES = f"{SCORING} or max_tokens_per_device"
# Phase -> its description in errors, and what to lower when memory runs out.
PHASES = {
    "generate": (
        "generating responses",
        f"per_device_generation_batch_size in PPO, elsewhere {SCORING}; or response_length",
    ),
    "send_weights": ("sending weights to the rollout server", "what the server takes (vllm_gpu_memory_utilization)"),
    "score_policy": ("scoring responses by the policy", PASSES),
    "score_reference": ("scoring responses by the reference model", PASSES),
    "score_value": ("scoring responses by the value model", PASSES),
    "score_reward": ("scoring responses by the reward", f"{SCORING}, or what the reward functions take"),
    "update_policy": ("updating the policy", UPDATING),
    "update_value": ("updating the value model", UPDATING),
    "communication": ("exchanging numbers between processes", f"rollout_batch_size or {TRAINING}"),
    "training": ("training", f"max_length or {TRAINING}"),
    "evaluation": ("evaluating", SCORING),
    "checkpoint": ("writing a checkpoint", "the size of the model, or set a method with an adapter (lora)"),
    "model": ("writing the trained model", "the size of the model, or set a method with an adapter (lora)"),
    "records": ("writing the record of the run", "the number of rows that are evaluated (max_eval_rows)"),
    "start": (
        "preparing rows and models",
        "the number of rows or the size of the models, set bf16: true, or shard models over more GPUs (deepspeed, ZeRO 3)",
    ),
}

ERROR_NUMBER = re.compile(r"os error (\d+)|\[Errno (\d+)\]")  # in messages of Rust and of Arrow
TORCH_WRITES = re.compile(r"PytorchStreamWriter|iostream error|inline_container")
# Errors of writing that can only come from the file system, and what to do about each.
DISK = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there, or have the quota raised",
    errno.EFBIG: "raise the limit of file sizes (`ulimit -f`), or use another file system",
    errno.EROFS: "make the file system writable again",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the network file system again",
}


@contextlib.contextmanager
def during(phase: str, target: Path | None = None) -> Iterator[None]:
    """Turn errors of disk and memory in the block into errors that say what the run was doing.

    Args:
        phase: one of `PHASES`.
        target: the file or folder that the block writes, if it only writes: every OSError then is one of writing.

    Raises:
        UserError: memory ran out, or a file could not be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        explained = _memory(error, phase) or _disk(error, phase, target)
        if explained is None:
            raise
        raise UserError(explained) from error


@contextlib.contextmanager
def unless_removed(folder: Path) -> Iterator[None]:
    """Turn missing-file errors into one that names the output folder, if the folder was removed.

    Raises:
        UserError: it was removed during the block.
    """
    try:
        yield
    except OSError as error:
        path = Path(error.filename or "").absolute()
        if error.errno == errno.ENOENT and folder.absolute() in (path, *path.parents) and not folder.is_dir():
            raise removed(folder) from error
        raise


def removed(folder: Path) -> UserError:
    """The error of a run whose output folder is not the one that it began in."""
    return UserError(
        f"{folder}: the output folder was removed or renamed while the stage ran. Delete what is left of it, and start the "
        "stage again."
    )


def _memory(error: Exception, phase: str) -> str | None:
    found = next((each for each in _causes(error) if is_out_of_memory(each)), None)
    if found is None:
        return None
    doing, lower = PHASES.get(phase, PHASES["start"])
    kind = "GPU memory" if re.search(r"CUDA|HIP|GPU", str(found)) else "memory"
    detail = " ".join(re.split(r"(?<=\w)\. |\n", str(error))[:2]).strip()
    return (
        f"out of {kind} while {doing}{f' ({detail})' if detail else ''}. Lower {lower}. The last checkpoint is continued if "
        "only per_device sizes or gradient_checkpointing change."
    )


def _disk(error: Exception, phase: str, target: Path | None) -> str | None:
    number, place = _error_number(error)
    if number is None or (number not in DISK and target is None):
        return None
    path = Path(place or target or Path.cwd())
    folder = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    if number in (errno.ENOENT, errno.ENOTDIR):
        if path.parent.is_dir():
            return None  # a file that somebody counted on, not one to be written
        problem, remedy = "its folder was removed while the stage ran", "start the stage again"
    else:
        free = shutil.disk_usage(folder).free
        problem = (
            f"{os.strerror(number) if number else 'the file could not be written'}, {free / 1e6:,.1f} MB are free there"
        )
        remedy = (
            f"{DISK.get(number, 'make it writable again')}; the same command then continues from the last checkpoint"
        )
    return f"{path}: error while {PHASES.get(phase, PHASES['start'])[0]}: {problem}. {remedy[0].upper()}{remedy[1:]}."


def _error_number(error: Exception) -> tuple[int | None, str | None]:
    """The errno of an OSError, its own or that in a library's message, and the file; 0 where the library gives none."""
    for each in _causes(error):
        if isinstance(each, OSError) and each.errno is not None:
            return each.errno, each.filename2 or each.filename
        if found := ERROR_NUMBER.search(str(each)):
            return int(found[1] or found[2]), None
    return (0, None) if any(TORCH_WRITES.search(str(each)) for each in _causes(error)) else (None, None)


def _causes(error: BaseException) -> list[BaseException]:
    """An error and those that it was raised from."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return found
