"""Stage 2, a scalar reward model from preference pairs: trainer, evaluation, the zero of its score.

Imported by `align.cli`; imports no other stage. Public: `run` here, from Python; `train.run`, the stage itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from align.config.load import as_recipe
from align.config.reward import RewardRecipe
from align.runs.launch import run_from_python
from align.runs.results import RewardResult


def run(recipe: RewardRecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any) -> RewardResult:
    """Train a reward model in this process; on one GPU when there are several.

    Args:
        recipe: a recipe, a mapping of its keys, or the path of a YAML file.
        keys: recipe keys in place of those of `recipe`: `reward.run("recipe.yaml", seed=1)`.

    Returns:
        The closing numbers; those of the finished run if `output_dir` has it already.

    Raises:
        UserError: a wrong key or value, or anything else that the user can fix.
    """
    result: RewardResult = run_from_python(as_recipe(RewardRecipe, recipe, **keys))
    return result
