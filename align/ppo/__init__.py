"""Stage 3, PPO: rollouts, updates, self-checks, evaluation, checkpoints.

Imported by `align.cli`; imports no other stage. Public: `run` here, from Python; `train.run`, the stage itself;
`step.step`, one update.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from align.config.load import as_recipe
from align.config.ppo import PPORecipe
from align.runs.launch import run_from_python
from align.runs.results import PPOResult


def run(recipe: PPORecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any) -> PPOResult:
    """Train a policy by PPO in this process; on one GPU when there are several.

    Args:
        recipe: a recipe, a mapping of its keys, or the path of a YAML file.
        keys: recipe keys in place of those of `recipe`: `ppo.run("recipe.yaml", seed=1)`.

    Returns:
        The closing numbers; those of the finished run if `output_dir` has it already.

    Raises:
        UserError: a wrong key or value, or anything else that the user can fix.
    """
    result: PPOResult = run_from_python(as_recipe(PPORecipe, recipe, **keys))
    return result
