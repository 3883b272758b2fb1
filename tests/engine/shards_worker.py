"""Run by the ranks of test_engine.py: what one rank holds of each of PPO's four models, as JSON lines.

Also how far samples and log-probabilities of the sharded policy lie from those of the model on disk.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from align.config.load import load_recipe
from align.data.collate import pad_left
from align.engine.batch_plan import batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import connect, disconnect
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.sampling import uniforms
from align.models.forward import response_logprobs
from align.ppo.inputs import check_ppo_inputs
from align.ppo.setup import load_models
from tests.worlds import letter_tokenizer


def hold_models(path: str) -> None:
    recipe = load_recipe("ppo", path)
    world = connect(uses_deepspeed(recipe))
    models = load_models(recipe, check_ppo_inputs(recipe), batch_plan(recipe, world.size), world)
    parts = {
        "policy": models.policy.module,
        "value": models.value.module,
        "reference": models.reference.module,
        **{reward.name: reward.model for reward in models.rewards.models},
    }
    held = {}
    for name, module in parts.items():
        held[name] = {
            "whole": sum(parameter.ds_numel for parameter in module.parameters()),
            "shard": sum(parameter.ds_tensor.numel() for parameter in module.parameters()),
            "resident": sum(parameter.numel() for parameter in module.parameters()),
        }
    plain = AutoModelForCausalLM.from_pretrained(recipe.sft_model_path).eval()
    prompts, mask = pad_left([[1, 5, 6, 7], [1, 9], [1], [1, 3, 4, 5, 6, 7, 8, 9]], 0)
    noise = uniforms(0, "test", range(4), 12)
    with models.policy.unsharded() as copy:
        held["policy"]["copy"] = sum(parameter.numel() for parameter in copy.parameters())
        ending = Ending(letter_tokenizer())
        written = [generate(model, prompts, mask, noise, 0.7, ending) for model in (plain, copy, models.policy)]
    ids, mask = torch.cat([prompts, written[0][0]], 1), torch.cat([mask, written[0][1]], 1)
    length = written[0][0].shape[1]
    scored = [response_logprobs(model, ids, mask, length, 0.7) for model in (plain, models.policy)]
    held["policy"]["tokens differ"] = [int((responses != written[0][0]).sum()) for responses, *_ in written]
    held["policy"]["gap"] = max(float((found - scored[0]).abs().max().detach()) for found in (*scored, written[1][2]))
    held["policy"]["lengths"] = written[0][1].sum(dim=1).tolist()
    Path(recipe.output_dir).mkdir(exist_ok=True)
    (Path(recipe.output_dir) / f"rank{world.rank}.json").write_text(json.dumps(held))
    disconnect()
