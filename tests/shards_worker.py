"""Run under the launcher by test_engine.py: what one rank holds of each of PPO's four models, as JSON lines."""

import json
import sys
from pathlib import Path

from align.engine import connect, disconnect
from align.ppo_setup import check_inputs, load_models
from align.recipes import batch_plan, load_recipe

recipe = load_recipe("ppo", next(word for word in sys.argv[1:] if word.endswith(".yaml")))
world = connect(recipe)
models = load_models(recipe, check_inputs(recipe), batch_plan(recipe, world.size), world)
parts = {
    "policy": models.policy.module,
    "value": models.value.module,
    "reference": models.reference.module,
    "reward": models.rewards.sources[0].model,
}
held = {}
for name, module in parts.items():
    held[name] = {
        "whole": sum(parameter.ds_numel for parameter in module.parameters()),
        "shard": sum(parameter.ds_tensor.numel() for parameter in module.parameters()),
        "resident": sum(parameter.numel() for parameter in module.parameters()),
    }
with models.policy.whole() as copy:
    held["policy"]["copy"] = sum(parameter.numel() for parameter in copy.parameters())
Path(recipe.output_dir).mkdir(exist_ok=True)
(Path(recipe.output_dir) / f"rank{world.rank}.json").write_text(json.dumps(held))
disconnect()
