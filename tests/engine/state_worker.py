"""Run by the ranks of test_state.py: train in one layout, save; load in this or another layout, and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from align.config.optimizer import OPTIMIZERS
from align.config.ppo import PPORecipe
from align.engine.build import train_engine
from align.engine.distributed import World, connect, disconnect
from align.engine.ema import EMA
from align.engine.engine import TrainEngine
from align.models.forward import response_logprobs
from align.models.trainable import add_adapter
from tests.worlds import deepspeed_file, tiny_llama

OPTIM_ARGS = {"sgd": {"momentum": 0.5, "dampening": 0.5}, "rmsprop": {"momentum": 0.5, "centered": True}}
GLOBAL_ROWS = 6  # over one, two or three ranks


def engine_of(folder: Path, world: World, name: str, seed: int = 0) -> TrainEngine:
    """An engine in a layout such as "zero2", "zero2-bf16", "zero3-offload", "zero3-lora"."""
    zero, *more = name.split("-")
    keys: dict[str, Any] = {"bf16": "bf16" in more, "max_grad_norm": 0.5, "weight_decay": 0.1}
    if other := [each for each in more if each in OPTIMIZERS]:
        keys |= {"optim": other[0], "optim_args": OPTIM_ARGS.get(other[0], {})}
    if zero != "alone":
        path = Path(deepspeed_file(folder / f"{name}-{world.rank}.json", int(zero[-1])))
        config = json.loads(path.read_text())
        config["zero_optimization"] |= {
            **({"offload_optimizer": {"device": "cpu"}} if "offload" in more else {}),
            **({"offload_param": {"device": "cpu"}} if "params" in more else {}),
            **({"round_robin_gradients": True} if "robin" in more else {}),
        }
        path.write_text(json.dumps(config))
        keys["deepspeed"] = str(path)
    recipe = PPORecipe(output_dir="out", sft_model_path="sft", **keys)
    model: Any = tiny_llama(seed)
    model.model.rotary_emb.register_buffer("counted", torch.full((3,), float(seed)))  # changes, like a running mean
    if "lora" in more:
        torch.manual_seed(seed)
        model = add_adapter(model, PPORecipe(output_dir="out", sft_model_path="sft", method="lora", lora_r=2))
    return train_engine(model, recipe, world, 1e-2, GLOBAL_ROWS // world.size)


def train(engine: TrainEngine, steps: range) -> None:
    world = engine.world
    for step in steps:
        ids = torch.randint(3, 29, (GLOBAL_ROWS, 8), generator=torch.Generator().manual_seed(step))
        for row in range(world.rank, GLOBAL_ROWS, world.size):
            mask = torch.ones(1, 8, dtype=torch.bool)
            engine.backward(-response_logprobs(engine, ids[row : row + 1], mask, 4, 1.0).sum() / 24)
        engine.step(1e-2 / (1 + step))


def weights(engine: TrainEngine, ema: EMA, folder: Path) -> None:
    """Write all weights and averages, by rank 0."""
    ema.save_pretrained(folder / "ema")
    found = engine.state_dict()
    if engine.world.is_main:
        save_file({name: weight.contiguous() for name, weight in found.items()}, folder / "weights.safetensors")


def save_each(folder: Path, names: list[str]) -> None:
    """Two steps in each layout, saved to `saved`; four steps' weights to `whole`."""
    world = connect(deepspeed_files=not all(name.startswith("alone") for name in names))
    for name in names:
        place = folder / name
        (place / "whole").mkdir(parents=True, exist_ok=True)
        engine = engine_of(place, world, name)
        ema = EMA(engine, 0.5)
        for steps in (range(2), range(2, 4)):
            if steps.start:
                sums = engine.save_checkpoint(place / "saved") | {
                    f"ema {file}": told for file, told in ema.save_checkpoint(place / "ema").items()
                }
                (place / f"sums{world.rank}.json").write_text(json.dumps(sums))
            train(engine, steps)
            ema.update()
        weights(engine, ema, place / "whole")
    disconnect()


def go_on_each(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """Load what was saved in the first layout into an engine of the second, with other weights; save again, and go on."""
    world = connect(deepspeed_files=not all(name.startswith("alone") for _, name in pairs))
    for source, name in pairs:
        place = folder / f"{source} to {name} of {world.size}"
        place.mkdir(exist_ok=True)
        engine = engine_of(place, world, name, seed=0 if "lora" in name else 9)
        ema = EMA(engine, 0.5)
        engine.load_checkpoint(folder / source / "saved")
        ema.load_checkpoint(folder / source / "ema")
        engine.save_checkpoint(place / "again")
        ema.save_checkpoint(place / "ema again")
        train(engine, range(2, 4))
        ema.update()
        weights(engine, ema, place)
    disconnect()
