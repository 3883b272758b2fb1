"""`align bon`: best-of-n sampling, the frontier of reward against KL, and data sets of the best responses.

Imported by `align.cli`; imports no stage. Public: `run` here, from Python; `sample.run`, the stage itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from align.config.best_of_n import BestOfNRecipe
from align.config.load import as_recipe
from align.runs.launch import run_from_python
from align.runs.results import BestOfNResult


def run(recipe: BestOfNRecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any) -> BestOfNResult | None:
    """Sample and score responses in this process; on one GPU when there are several.

    Args:
        recipe: a recipe, a mapping of its keys, or the path of a YAML file.
        keys: recipe keys in place of those of `recipe`: `best_of_n.run("recipe.yaml", seed=1)`.

    Returns:
        What is in `results.json`; None on ranks other than the first.

    Raises:
        UserError: a wrong key or value, or anything else that the user can fix.
    """
    result: BestOfNResult | None = run_from_python(as_recipe(BestOfNRecipe, recipe, **keys))
    return result
