"""Saved states: loaded in the layout they were saved in to the bit, in any other to rounding; no pickle, no damage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.engine.distributed import World
from align.engine.parts import SavedParts
from tests import ranks
from tests.engine.state_worker import go_on_each, save_each

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
ONE = ["alone", "alone-bf16", "alone-lora"]
TWO = ["zero0", "zero0-bf16", "zero1-bf16", "zero2", "zero2-offload", "zero3", "zero3-bf16", "zero3-lora"]
# Those of the same name go on in the layout that they were saved in.
PAIRS = {
    1: [(name, name) for name in ONE]
    + [("zero0", "alone"), ("zero2", "alone"), ("zero3", "alone"), ("zero3-bf16", "alone-bf16"), ("zero3-lora", "alone-lora")],
    2: [(name, name) for name in TWO]
    + [("alone", "zero0"), ("alone", "zero2"), ("alone", "zero3"), ("zero3", "zero2"), ("zero2", "zero3")]
    + [("alone-bf16", "zero1-bf16"), ("zero1-bf16", "zero3-bf16"), ("zero3-bf16", "zero0-bf16"), ("alone-lora", "zero3-lora")],
    3: [("zero3", "zero1"), ("zero2", "zero3"), ("zero2-offload", "zero0")],
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(shared_folder) -> Path:
    """What `save_each` and `go_on_each` write for all layouts and pairs."""

    def write(folder: Path) -> None:
        for names, count in ((ONE, 1), (TWO, 2)):
            done = ranks.run(save_each, folder, names, ranks=count, log=folder / f"save{count}-")
            assert done.returncode == 0, done.stderr[-3000:]
        for count, pairs in PAIRS.items():
            done = ranks.run(go_on_each, folder, pairs, ranks=count, log=folder / f"go{count}-")
            assert done.returncode == 0, done.stderr[-3000:]

    return shared_folder("states", write)


def difference(ours: Path, theirs: Path) -> float:
    """The greatest of any weight or average."""
    greatest = 0.0
    for file in ("weights.safetensors", "ema/model.safetensors"):
        a, b = load_file(ours / file), load_file(theirs / file)
        assert a.keys() == b.keys()
        greatest = max(greatest, *(float((a[name].float() - b[name].float()).abs().max()) for name in a))
    return greatest


def assert_same_state(ours: Path, theirs: Path) -> None:
    """Of each parameter the same values, steps and shapes, to the bit; and the same note but for what DeepSpeed counts."""
    a, b = SavedParts(ours), SavedParts(theirs)
    assert a.shapes == b.shapes
    assert a.numbers == b.numbers
    for name, shape in a.shapes.items():
        assert sorted(a.kinds(name)) == sorted(b.kinds(name))
        for kind in a.kinds(name):
            values, expected = (part.read(name, kind, 0, math.prod(shape)) for part in (a, b))
            assert values.dtype == expected.dtype
            assert torch.equal(values, expected), (name, kind)
    assert (a.note or {}).get("groups") == (b.note or {}).get("groups")


@pytest.mark.parametrize(
    ("count", "source", "name"), [(count, *pair) for count, pairs in PAIRS.items() for pair in pairs]
)
def test_a_run_goes_on(saved, count, source, name):
    after = saved / f"{source} to {name} of {count}"
    assert_same_state(after / "again", saved / source / "saved")
    assert_same_state(after / "ema again", saved / source / "ema")
    found = difference(after, saved / source / "whole")
    if source == name:
        assert found == 0
    else:  # sums in another order
        assert found < (0.02 if "bf16" in name else 1e-5)
