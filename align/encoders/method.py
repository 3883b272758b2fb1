"""The recipe's `method` on an encoder with its heads: freezing, or an adapter beside the heads, which are trained whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from align.config.encoders import ClassifyRecipe, MLMRecipe
from align.config.extraction import QuestionAnsweringRecipe, TokenClassificationRecipe
from align.models.bottleneck import continue_adapter
from align.models.trainable import check_target_modules, freeze, peft_config

EncoderRecipe = ClassifyRecipe | MLMRecipe | QuestionAnsweringRecipe | TokenClassificationRecipe
ANSWERS = "QUESTION_ANS"  # PEFT's class for this task drops the kinds of tokens


def apply_method(
    model: PreTrainedModel, recipe: EncoderRecipe, task_type: str, head: nn.Module, whole: Sequence[str]
) -> Any:
    """The model as it is trained: what `method` leaves alone frozen, or with an adapter.

    A new adapter starts from the recipe's seed, a bottleneck adapter from the one in `model_name_or_path`.

    Args:
        task_type: PEFT's, such as "SEQ_CLS".
        head: the output head.
        whole: names of the modules that are trained whole by adapters and `method: head`, such as new ones.

    Raises:
        UserError: the method does not fit the model.
    """
    check_target_modules(model, recipe.lora_target_modules)
    freeze(model, head, recipe.method, recipe.freeze_layers, recipe.trainable_pattern, whole)
    adapter = peft_config(recipe, model.config, task_type, whole)
    if adapter is None:
        return model
    torch.manual_seed(recipe.seed)
    adapted = PeftModel(model, adapter) if task_type == ANSWERS else get_peft_model(model, adapter)
    continue_adapter(adapted, recipe.model_name_or_path)
    return adapted
