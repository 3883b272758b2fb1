"""The rules for `method`, what of a model is trained, and the keys that go with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from align.config.base import StageRecipe
from align.config.deepspeed_file import zero_stage_of
from align.config.keys import Where
from align.errors import UserError

UNMERGED = ("prompt", "prefix", "bottleneck")  # methods whose adapter is saved alone
OF_METHOD = {  # key: the values of `method` that read it
    "freeze_layers": ("freeze",),
    "trainable_pattern": ("freeze",),
    "lora_r": ("lora", "dora", "qlora"),
    "lora_alpha": ("lora", "dora", "qlora"),
    "lora_target_modules": ("lora", "dora", "qlora", "ia3"),
    "num_virtual_tokens": ("prompt", "prefix"),
    "prefix_projection": ("prefix",),
    "encoder_hidden_size": ("prefix",),
    "bottleneck_size": ("bottleneck",),
    "bottleneck_placement": ("bottleneck",),
}


def check_method(recipe: StageRecipe, supported: Sequence[str], where: Where) -> None:
    """Check `method` and the keys that go with it.

    Args:
        supported: the values of `method` that the recipe's stage takes.

    Raises:
        UserError: another method, or keys of another one.
    """
    virtual = recipe.method in ("prompt", "prefix")
    if recipe.method not in supported:
        reason = "cannot be merged, so later stages could not start from it" if virtual else "is not supported here"
        raise UserError(
            f"{where('method')}: expected one of {', '.join(supported)} in the {recipe.stage} stage, got "
            f"{recipe.method}, which {reason}"
        )
    partial = bool(recipe.freeze_layers) + (recipe.trainable_pattern is not None)
    if recipe.method == "freeze" and partial != 1:
        raise UserError(
            f"{where('method')}: freeze needs either freeze_layers or trainable_pattern, got "
            f"{'both' if partial else 'neither'}"
        )
    methods = {recipe.method} | ({"lora"} if getattr(recipe, "value_method", "full") != "full" else set())  # PPO's
    for each in fields(recipe):
        readers = OF_METHOD.get(each.name, supported)
        if methods.isdisjoint(readers) and getattr(recipe, each.name) not in (each.default, []):
            names = f"{', '.join(readers[:-1])} or {readers[-1]}" if len(readers) > 1 else readers[0]
            raise UserError(f"{where(each.name)}: is for method: {names}, got method: {recipe.method}; leave it out")
    if recipe.encoder_hidden_size is not None and not recipe.prefix_projection:
        raise UserError(f"{where('encoder_hidden_size')}: is the width of prefix_projection; set that to true too")
    if recipe.method in UNMERGED and recipe.save_dtype != "auto":
        raise UserError(
            f"{where('save_dtype')}: method: {recipe.method} saves an adapter alone, in float32; leave it out"
        )
    if recipe.method in UNMERGED and getattr(recipe, "model_config", None):
        raise UserError(
            f"{where('model_config')}: method: {recipe.method} saves an adapter without its model, and a random one is not kept; "
            "train all of it (method: full)"
        )
    if recipe.trainable_pattern is not None:
        try:
            re.compile(recipe.trainable_pattern)
        except re.error as error:
            raise UserError(f"{where('trainable_pattern')}: not a regular expression: {error}") from None
    if virtual and (getattr(recipe, "packing", False) or getattr(recipe, "padding_free", False)):
        raise UserError(
            f"{where('method')}: {recipe.method} prepends virtual tokens to each row, which does not work with packed "
            "rows"
        )
    if virtual and zero_stage_of(recipe.deepspeed) == 3:
        raise UserError(
            f"{where('method')}: {recipe.method} is not supported at ZeRO 3; use ZeRO 2, it trains few parameters"
        )
