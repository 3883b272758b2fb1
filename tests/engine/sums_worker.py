"""Run by the ranks of test_engine.py: the gradient of many equal microbatches against that of one, in bfloat16 at each ZeRO stage."""

import json
from pathlib import Path

import torch

from align.config.ppo import PPORecipe
from align.engine.build import train_engine
from align.engine.distributed import connect, disconnect
from tests.worlds import deepspeed_file, tiny_llama

PARTS = 512  # of 2 to the 9th: in bfloat16 a sum of equal terms stops growing at 256 of them
IDS = torch.tensor([[3, 4, 5, 6]])


def norms_at_each_stage(folder: Path) -> None:
    world = connect(deepspeed_files=True)
    found = {}
    for stage in (0, 1, 2, 3):
        path = deepspeed_file(folder / f"zero{stage}-{world.rank}.json", stage)
        recipe = PPORecipe(output_dir="out", sft_model_path="sft", bf16=True, max_grad_norm=0.0, deepspeed=path)
        norms = []
        for parts in (1, PARTS):
            engine = train_engine(tiny_llama(layers=1), recipe, world, 1e-3, parts)
            for _ in range(parts):
                engine.backward(engine(input_ids=IDS, labels=IDS).loss / parts / world.size)
            norms.append(engine.step(1e-3))
        found[f"zero{stage}"] = norms
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    disconnect()
