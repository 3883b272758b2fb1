"""The stages around encoders (BERT-like): `align classify`, `token-classification`, `question-answering` and `mlm`.

Imported by `align.cli`; imports no other stage. Public: `run_classify` and its like here, from Python; `classify.run`,
`token_classification.run`, `question_answering.run` and `mlm.run`, the stages themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from align.config.encoders import ClassifyRecipe, MLMRecipe
from align.config.extraction import QuestionAnsweringRecipe, TokenClassificationRecipe
from align.config.load import as_recipe
from align.runs.launch import run_from_python
from align.runs.results import ClassifyResult, MLMResult, QuestionAnsweringResult, TokenClassificationResult


def run_classify(recipe: ClassifyRecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any) -> ClassifyResult:
    """Train a classifier or a regression in this process; on one GPU when there are several.

    Args:
        recipe: a recipe, a mapping of its keys, or the path of a YAML file.
        keys: recipe keys in place of those of `recipe`.

    Returns:
        The closing numbers; those of the finished run if `output_dir` has it already.

    Raises:
        UserError: a wrong key or value, or anything else that the user can fix.
    """
    result: ClassifyResult = run_from_python(as_recipe(ClassifyRecipe, recipe, **keys))
    return result


def run_token_classification(
    recipe: TokenClassificationRecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any
) -> TokenClassificationResult:
    """Train a token classifier in this process; arguments, result and errors as for `run_classify`."""
    result: TokenClassificationResult = run_from_python(as_recipe(TokenClassificationRecipe, recipe, **keys))
    return result


def run_question_answering(
    recipe: QuestionAnsweringRecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any
) -> QuestionAnsweringResult:
    """Train a model that answers from a passage, in this process; arguments, result and errors as for `run_classify`."""
    result: QuestionAnsweringResult = run_from_python(as_recipe(QuestionAnsweringRecipe, recipe, **keys))
    return result


def run_mlm(recipe: MLMRecipe | Mapping[str, Any] | str | os.PathLike[str], **keys: Any) -> MLMResult:
    """Train a masked language model in this process; arguments, result and errors as for `run_classify`."""
    result: MLMResult = run_from_python(as_recipe(MLMRecipe, recipe, **keys))
    return result
