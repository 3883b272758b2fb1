"""Settings for all tests and the processes they start (one thread each, no network), and folders that workers share."""

from __future__ import annotations

import fcntl
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and these models gain nothing from threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Right answers here hold to the CPU's rounding, and ranks that are forked cannot share a GPU. Tests of a GPU say so.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


# Modules with the longest tests, which begin: a worker that is done takes half of what another has left, from the end, so
# that none is left alone with minutes of work.
SLOWEST = ("ppo/test_optimum.py", "recipes/test_quickstart.py", "runs/test_resume.py", "encoders/test_classify.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        module = item.nodeid.partition("::")[0].removeprefix("tests/")
        return SLOWEST.index(module) if module in SLOWEST else len(SLOWEST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Leave the libraries, imported by now, out of each later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`shared_folder(name, make)`: a folder that `make(folder)` fills once, for all workers of pytest."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # that of the worker is within that of the run

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = root / "shared" / name, root / "shared" / f"{name}.made"
        folder.parent.mkdir(exist_ok=True)
        with open(folder.with_name(f"{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # `make` may have failed in another worker
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get
