"""How a run uses the processor: settings of the whole process that change what its work costs, not what it gives."""

from __future__ import annotations

import ctypes
import platform

import torch

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def configure_cpu() -> None:
    """Flush denormals to zero in this thread and those that it starts, and keep freed memory. Call it before any work.

    Arithmetic on denormals, numbers under 1e-38, is done in microcode, at a small part of the usual speed; the gradients
    of unlikely tokens and their squares in Adam's second moment are such numbers.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor; elsewhere nothing.

    Otherwise each tensor of more than 32 MiB, and the activations of each pass, go back to the system and are fetched and
    zeroed anew, a page of 4 KiB at a time, which can take longer than the arithmetic on them.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    malloc = ctypes.CDLL(None)
    malloc.mallopt(M_MMAP_THRESHOLD, 2**30)
    malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    malloc.mallopt(M_TOP_PAD, 2**26)
