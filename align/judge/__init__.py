"""The report card of a reward: how far it can be trusted, measured on pairs that it has not seen.

Imported by `align.cli` and the reward stage. Public: `run` here, from Python; `judge.run`, the command itself;
`measure.measure_pairs`, `verdicts.judge` and `card.write_card`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from align.config.judge_reward import JudgeRewardRecipe
from align.config.load import as_recipe
from align.runs.launch import run_from_python
from align.runs.results import JudgeResult


def run(recipe: JudgeRewardRecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any) -> JudgeResult | None:
    """Judge a reward, in this process; on one GPU when there are several.

    Args:
        recipe: a recipe, a mapping of its keys, or the path of a YAML file.
        keys: recipe keys in place of those of `recipe`: `judge.run("recipe.yaml", seed=1)`.

    Returns:
        What is in `results.json`; None on ranks other than the first.

    Raises:
        UserError: a wrong key or value, or anything else that the user can fix.
    """
    result: JudgeResult | None = run_from_python(as_recipe(JudgeRewardRecipe, recipe, **keys))
    return result
