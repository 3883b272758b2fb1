"""Settings of the process, seen from inside one that a stage has connected."""

import ctypes
import json
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

# One process for all of it, since what MKL and the allocator do is decided when torch is loaded.
CONNECTED = """
import ctypes, json, resource
from align.engine.distributed import connect
import torch
connect(deepspeed_files=False)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
found = {"faults": [faults(), min(faults() for _ in range(16))]}

class Figures(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d mapped f g used i j".split()]
def used():
    figures = libc.mallinfo2()
    return figures.used + figures.mapped
libc = ctypes.CDLL(None)
if hasattr(libc, "mallinfo2"):
    libc.mallinfo2.restype = Figures
    matrix = torch.ones(1000, 1000)
    before = used()
    matrix @ matrix
    found["left"] = used() - before

torch.set_num_threads(2)
product = torch.full((2**20,), 1e-20) * torch.full((2**20,), 1e-20)
found["denormals"] = int((product.view(torch.int32) != 0).sum())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CONNECTED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "subnormal" not in done.stderr  # numpy's word on it
    return json.loads(done.stdout.splitlines()[-1])


def test_denormals_are_zero_in_every_thread(found):
    assert found["denormals"] == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept(found):
    first, later = found["faults"]
    assert later < 32 <= first  # 64 MiB are 16,384 pages of 4 KiB, 32 of 2 MiB


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="only MKL has a heap of its own")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc from 2.33 on tells what is in use")
def test_products_leave_no_memory_behind(found):
    assert found["left"] < 2**20  # MKL keeps 3 MiB a thread of such a product, unless told not to
