"""Run by the ranks of test_token_budget.py: an update by each recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from align.config.load import load_recipe
from align.engine.distributed import World, connect, disconnect
from align.ppo.sample import scoring_parts
from align.ppo.step import step
from tests.ppo.runs import ppo_run


def update(path: str, world: World, folder: Path) -> dict[str, float]:
    """Take the first update of a recipe; writes the weights to `folder`, and returns the metrics."""
    run = ppo_run(load_recipe("ppo", path), world)
    if world.size > 1:  # 8 x 4 tokens fit into a pass, 8 x 20 into four; both ranks take four
        assert len(scoring_parts(run, [[4] * 8, [20] * 8][world.rank])) == 4
    metrics = step(run, 0)
    for name, engine in (("policy", run.models.policy), ("value", run.models.value)):
        weights = {} if engine is None else engine.state_dict()
        if weights:
            save_file({key: weight.contiguous() for key, weight in weights.items()}, folder / f"{name}.safetensors")
    return metrics


def update_each(paths: Mapping[str, Path]) -> None:
    world = connect(deepspeed_files=True)
    for path, folder in paths.items():
        update(path, world, folder)
    disconnect()
