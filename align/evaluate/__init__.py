"""Comparison of language models on the same rows, and the metrics and statistics that the stages share.

Imported by `align.cli` and the stages. Public: `run` here, from Python; `compare.run`, the command itself;
`metrics.load_metric` and `metrics.measure`, `statistics` and `bootstrap`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from align.config.evaluate import EvaluateRecipe
from align.config.load import as_recipe
from align.runs.launch import run_from_python
from align.runs.results import EvaluationResult


def run(recipe: EvaluateRecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any) -> EvaluationResult | None:
    """Compare language models on the same rows, in this process; on one GPU when there are several.

    Args:
        recipe: a recipe, a mapping of its keys, or the path of a YAML file.
        keys: recipe keys in place of those of `recipe`: `evaluate.run("recipe.yaml", seed=1)`.

    Returns:
        What is in `results.json`; None on ranks other than the first.

    Raises:
        UserError: a wrong key or value, or anything else that the user can fix.
    """
    result: EvaluationResult | None = run_from_python(as_recipe(EvaluateRecipe, recipe, **keys))
    return result
