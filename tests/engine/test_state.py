"""Saved states: loaded in the layout they were saved in to the bit, in any other to rounding; no pickle, no damage."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.config.ppo import PPORecipe
from align.engine.distributed import World
from align.engine.ema import EMA
from align.engine.optimizer import make_optimizer
from align.engine.parts import SavedParts
from align.engine.state import load_state, save_state
from align.errors import UserError
from align.runs.files import fingerprints
from tests import ranks
from tests.engine.state_worker import engine_of, go_on_each, save_each, train

ADAFACTOR = PPORecipe(output_dir="out", sft_model_path="sft", optim="adafactor")
ALONE = World(rank=0, size=1, device=torch.device("cpu"))
ONE = ["alone", "alone-bf16", "alone-lora", "alone-adafactor-bf16", "alone-sgd"]
TWO = ["zero0-bf16", "zero1-bf16", "zero2-robin", "zero2-offload", "zero3", "zero3-bf16", "zero3-lora"]
TWO += ["zero3-offload-params"]
TWO += ["zero2-adagrad", "zero2-offload-sgd", "zero1-rmsprop-bf16", "zero0-adafactor-bf16"]
PAIRS = {  # by number of ranks, the layout that saved and the one that goes on
    1: [("zero2-robin", "alone"), ("zero3-bf16", "alone-bf16"), ("zero3-lora", "alone-lora")],
    2: [(name, name) for name in TWO]
    + [("alone", "zero3"), ("zero3", "zero2"), ("alone-lora", "zero3-lora")]
    + [("alone-bf16", "zero1-bf16"), ("zero1-bf16", "zero0-bf16")],
    3: [("zero3", "zero1"), ("zero2-offload", "zero3")],
}
OTHERS = {  # optimizers other than AdamW
    1: [("alone-adafactor-bf16", "alone-adafactor-bf16"), ("zero0-adafactor-bf16", "alone-adafactor-bf16")],
    2: [("alone-sgd", "zero2-offload-sgd"), ("zero2-adagrad", "zero3-adagrad")],
}


@pytest.fixture(scope="module")
def saved(shared_folder) -> Path:
    """What `save_each` and `go_on_each` write for all layouts and pairs."""

    def write(folder: Path) -> None:
        for names, count in ((ONE, 1), (TWO, 2)):
            done = ranks.run(save_each, folder, names, ranks=count, log=folder / f"save{count}-")
            assert done.returncode == 0, done.stderr[-3000:]
        for count in PAIRS:
            pairs = [*PAIRS[count], *OTHERS.get(count, ())]
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


def test_offloaded_parameters_have_the_same_averages(saved):
    """To the rounding of float32, 1.2e-7 of weights below 1."""
    assert difference(saved / "zero3-offload-params" / "whole", saved / "zero3" / "whole") < 1e-6


@pytest.mark.parametrize(
    ("count", "source", "name"),
    [(count, *pair) for table in (PAIRS, OTHERS) for count, pairs in table.items() for pair in pairs],
)
def test_a_run_goes_on(saved, count, source, name):
    after = saved / f"{source} to {name} of {count}"
    assert_same_state(after / "again", saved / source / "saved")
    assert_same_state(after / "ema again", saved / source / "ema")
    found = difference(after, saved / source / "whole")
    if source == name:
        assert found == 0
        assert (
            SavedParts(after / "again").note == SavedParts(saved / source / "saved").note
        )  # with DeepSpeed's counters
    else:  # sums in another order
        assert found < (0.02 if "bf16" in name else 1e-5)


def test_every_layout_has_the_recipes_optimizer(saved):
    classes = {"sgd": "SGD", "rmsprop": "RMSprop", "adagrad": "Adagrad", "adafactor": "Adafactor"}
    for name in [*ONE, *TWO]:
        expected = next((cls for part, cls in classes.items() if part in name), "AdamW")
        assert SavedParts(saved / name / "saved").note["optimizer"] == expected


def test_means_over_rows_and_columns_keep_their_shape(tmp_path):
    """Adafactor's of a head of one output: [1] and [4], neither a number nor of the weight's shape."""
    heads = [torch.nn.Linear(4, 1, bias=False) for _ in range(2)]
    optimizers = [make_optimizer(list(head.parameters()), ADAFACTOR, 0.1) for head in heads]

    def step(number: int) -> None:
        heads[number].weight.grad = torch.arange(4.0)[None]
        optimizers[number].step()

    step(0)
    save_state(tmp_path, heads[0], optimizers[0], ALONE)
    load_state(tmp_path, heads[1], optimizers[1])
    kept, loaded = (optimizer.state[head.weight] for optimizer, head in zip(optimizers, heads, strict=True))
    assert loaded["exp_avg_sq_row"].shape == (1,)
    assert all(torch.equal(loaded[name], kept[name]) for name in ("exp_avg_sq_row", "exp_avg_sq_col"))
    step(0)
    step(1)
    assert torch.equal(*(head.weight for head in heads))


def test_each_rank_writes_its_own_part_once_and_sums_it(saved):
    """All files together are as large as the state, and their sums are those of reading them."""
    for name in TWO:
        told = [json.loads((saved / name / f"sums{rank}.json").read_text()) for rank in (0, 1)]
        for rank, sums in enumerate(told):
            assert list(sums) == [f"rank-0000{rank}.safetensors", f"ema rank-0000{rank}.safetensors"]
            for file, sum_of_it in sums.items():
                folder, file = ("ema", file[4:]) if file.startswith("ema ") else ("saved", file)
                assert fingerprints(saved / name / folder)[file] == sum_of_it
        held = SavedParts(saved / name / "saved")
        values = sum(math.prod(shape) * len(held.kinds(part)) * 4 for part, shape in held.shapes.items())
        sizes = [sum(size for size, _ in sums.values()) for sums in told]
        averages = sum(math.prod(shape) * 4 for shape in SavedParts(saved / name / "ema").shapes.values())
        if "lora" not in name and "adafactor" not in name:  # whose headers are larger than what they hold
            assert values + averages < sum(sizes) < values + averages + 40_000
        assert max(sizes) < 1.1 * min(sizes)


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """A state of one process, with a moving average."""
    folder = tmp_path_factory.mktemp("state")
    engine = engine_of(folder, ALONE, "alone")
    train(engine, range(1))
    engine.save_checkpoint(folder / "saved")
    EMA(engine, 0.5).save_checkpoint(folder / "ema")
    return folder


def load(folder: Path, name: str = "alone") -> None:
    engine_of(folder, ALONE, name).load_checkpoint(folder / "saved")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (self.marker.touch, ())


FILE = "rank-00000.safetensors"


def test_no_file_is_unpickled(state, tmp_path, monkeypatch):
    """Neither one that takes the place of ours, nor those of DeepSpeed, torch and transformers beside it."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    copy = shutil.copytree(state, tmp_path / "copy")
    payload = pickle.dumps(Payload(tmp_path / "ran"))
    names = (
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "optimizer.pt",
        "pytorch_model.bin",
    )
    for name in names:
        (copy / "saved" / name).write_bytes(payload)
    load(copy)
    (copy / "saved" / FILE).write_bytes(payload)
    with pytest.raises(UserError, match="saved: cannot be read as a saved state"):
        load(copy)
    assert not (tmp_path / "ran").exists()
    pickle.loads(payload)
    assert (tmp_path / "ran").exists(), "the test wants a payload that works"


def rewrite(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A harm that changes the header's JSON and keeps the values."""

    def harm(file: Path) -> None:
        held = load_file(file)
        length = int.from_bytes(file.read_bytes()[:8], "little")
        about = json.loads(json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]["align"])
        change(about, held)
        save_file(held, file, metadata={"align": json.dumps(about)})

    return harm


def first(about: dict) -> dict:
    return next(iter(about["parts"].values()))


HARMS = {
    "gone": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "another file": lambda file: save_file({"weight.x": torch.zeros(3)}, file),
    "no JSON": lambda file: save_file({"weight.x": torch.zeros(3)}, file, metadata={"align": "{"}),
    "a list": lambda file: save_file({"weight.x": torch.zeros(3)}, file, metadata={"align": "[1]"}),
    "more ranks": rewrite(lambda about, held: about.update(ranks=10**12)),
    "text for ranks": rewrite(lambda about, held: about.update(ranks="two")),
    "a part moved": rewrite(lambda about, held: first(about).update(start=1)),
    "a shape of text": rewrite(lambda about, held: first(about).update(shape=["x"])),
    "steps of text": rewrite(lambda about, held: first(about)["numbers"].update(step="x")),
    "no note": rewrite(lambda about, held: about.update(note=None)),
    "groups of text": rewrite(lambda about, held: about["note"].update(groups="xy")),
    "a value gone": rewrite(lambda about, held: held.pop(next(key for key in held if key.startswith("weight.")))),
    "a value cut": rewrite(lambda about, held: held.update({key: held[key][1:] for key in list(held)[:1]})),
    "a value without a part": rewrite(lambda about, held: held.update({"weight.x": torch.zeros(3)})),
    "a key without a kind": rewrite(lambda about, held: held.update(x=torch.zeros(3))),
    "two dimensions": rewrite(lambda about, held: held.update({key: held[key][None] for key in list(held)[:1]})),
    "steps as values": rewrite(
        lambda about, held: held.update({"step.lm_head.weight": torch.zeros_like(held["weight.lm_head.weight"])})
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_odd_files_end_in_one_error(state, tmp_path, name):
    copy = shutil.copytree(state, tmp_path / "copy")
    HARMS[name](copy / "saved" / FILE)
    with pytest.raises(UserError) as error:
        load(copy)
    assert str(error.value).startswith(f"{copy / 'saved'}: ")
    assert "\n" not in str(error.value)


def test_the_state_of_another_model_is_refused(state, tmp_path):
    with pytest.raises(
        UserError, match=r"of another model: base_model\.\S+lora_A.default.weight has shape None there and"
    ):
        load(state, "alone-lora")
    copy = shutil.copytree(state, tmp_path / "copy")
    rewrite(lambda about, held: about["note"].update(optimizer="Lion"))(copy / "saved" / FILE)
    with pytest.raises(
        UserError, match="holds the state of Lion with 2 parameter groups, and this run has AdamW with 2"
    ):
        load(copy)
    rewrite(lambda about, held: first(about).update(shape=[29, 1, 32]))(copy / "ema" / FILE)
    with pytest.raises(
        UserError, match=r"averages of another model: model.embed_tokens.weight has shape \(29, 1, 32\)"
    ):
        EMA(engine_of(copy, ALONE, "alone"), 0.5).load_checkpoint(copy / "ema")
