"""CPU settings of the process: they change how fast it runs, not what it computes."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

import torch

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def configure_cpu() -> None:
    """Flush denormals to zero in this thread and those it starts; keep freed memory. Call it before any computation.

    CPUs compute with denormals (numbers below 1e-38) in microcode, many times slower than usual; gradients of unlikely
    tokens, and their squares in Adam's second moment, are such numbers.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor; does nothing with another C library.

    By default glibc returns each tensor of more than 32 MiB, and the activations of each pass, to the system, which
    then has to map and zero the memory again, a page of 4 KiB at a time. That can take longer than the arithmetic on
    it.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    malloc = ctypes.CDLL(None)
    malloc.mallopt(M_MMAP_THRESHOLD, 2**30)
    malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    malloc.mallopt(M_TOP_PAD, 2**26)


@contextlib.contextmanager
def without_keeping() -> Iterator[None]:
    """Inside, what is freed of a tensor goes back to the system at once: for set-up, whose tensors are not those of steps."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
    try:
        yield
    finally:
        keep_freed_memory()


def return_freed_memory() -> None:
    """Give what `keep_freed_memory` has kept back to the system: what setting up a model freed fits few of the tensors of a step.

    Without it a process under ZeRO-3 stays at one and a half times what it needs.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
