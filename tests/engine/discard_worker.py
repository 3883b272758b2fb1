"""Run by the ranks of test_self_checks.py: what a discarded minibatch leaves behind, at each ZeRO stage, as JSON.

The number for each case is the greatest difference of any weight, after two good steps, from an engine that never saw
the bad minibatch; `moved` is how far the discard itself moved the weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from align.config.ppo import PPORecipe
from align.engine.build import train_engine
from align.engine.distributed import connect, disconnect
from align.models.forward import response_logprobs
from tests.worlds import deepspeed_file, tiny_llama

ACCUMULATION = 2


def backward(engine, world, scale: float) -> None:
    generator = torch.Generator().manual_seed(7 + world.rank)
    for _ in range(ACCUMULATION):
        ids = torch.randint(3, 29, (2, 8), generator=generator)
        mask = torch.ones_like(ids, dtype=torch.bool)
        engine.backward(-scale * response_logprobs(engine, ids, mask, 4, 1.0).sum() / 8)


def difference(ours: dict, theirs: dict) -> float:
    return max((float((ours[name] - theirs[name]).abs().max()) for name in ours), default=0.0)


def train(world, folder: Path, stage: int, bad: Sequence[float | None]) -> tuple[float, dict[str, torch.Tensor]]:
    """How far discards moved the weights, and what the weights are two good steps later.

    `bad`: scale of the loss of each minibatch that is discarded; None discards one that had no backward pass.
    """
    path = folder / f"zero{stage}-{world.rank}.json"
    recipe = PPORecipe(output_dir="out", sft_model_path="sft", deepspeed=deepspeed_file(path, stage))
    moved = 0.0
    engine = train_engine(tiny_llama(), recipe, world, 1e-2, ACCUMULATION)
    backward(engine, world, 0.5)  # optimizer states are there already
    engine.step(1e-2)
    for scale in bad:
        before = engine.state_dict()
        if scale is not None:
            backward(engine, world, scale)
        engine.discard()
        moved = max(moved, difference(before, engine.state_dict()))
    for scale in (1.0, 0.3):
        backward(engine, world, scale)
        engine.step(1e-2)
    return moved, engine.state_dict()


def discard_at_each_stage(folder: Path) -> None:
    world = connect(deepspeed_files=False)
    cases = {"finite": [3.0], "nan": [float("nan")], "twice": [float("nan"), 3.0], "nothing": [None]}
    found = {}
    for stage in (0, 1, 2, 3):
        _, expected = train(world, folder, stage, [])
        for name, bad in cases.items():
            moved, weights = train(world, folder, stage, bad)
            found[f"zero{stage} {name}"] = {"moved": moved, "after": difference(weights, expected)}
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    disconnect()
