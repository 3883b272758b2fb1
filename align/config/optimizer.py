"""Keys of the optimizer, by transformers' names, and the rules between them.

Functions take the recipe of a stage that trains, whose file imports this one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from align.config.convert import shown
from align.config.deepspeed_file import zero_stage_of
from align.config.keys import ABOVE_0, AT_LEAST_0, FROM_0_TO_1, FROM_0_TO_BELOW_1, Range, Where, key
from align.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What a recipe may say about an optimizer.

    Attributes:
        arguments: those that `optim_args` may give, each with its range; None for one that is true or false.
        reads_adam: whether it reads `adam_beta1`, `adam_beta2` and `adam_epsilon`.
        elementwise: whether the step of a weight depends on its own gradients alone, so that ZeRO may divide tensors.
    """

    arguments: Mapping[str, Range | None]
    reads_adam: bool = False
    elementwise: bool = True


DEFAULT = "adamw_torch_fused"
_ADAMW, _ADAMW_8BIT = Optimizer({}, reads_adam=True), Optimizer({}, reads_adam=True, elementwise=False)
OPTIMIZERS = {
    DEFAULT: _ADAMW,
    "adamw_torch": _ADAMW,
    "adamw_bnb_8bit": _ADAMW_8BIT,
    "adamw_8bit": _ADAMW_8BIT,
    "sgd": Optimizer({"momentum": FROM_0_TO_BELOW_1, "dampening": FROM_0_TO_1, "nesterov": None}),
    "adagrad": Optimizer({"lr_decay": AT_LEAST_0, "eps": ABOVE_0}),
    "rmsprop": Optimizer({"alpha": FROM_0_TO_BELOW_1, "momentum": FROM_0_TO_BELOW_1, "eps": ABOVE_0, "centered": None}),
    "adafactor": Optimizer({}, elementwise=False),
}
EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit")
ADAM_KEYS = ("adam_beta1", "adam_beta2", "adam_epsilon")
_ADAM = ("adam", "adamw", "adam_torch", "adamw_hf")  # names that people try


def optim() -> Any:
    """The key `optim` of the stages that train."""
    return key(
        DEFAULT,
        f"Optimizer, by transformers' name: {', '.join(OPTIMIZERS)}. Adam is adamw_torch with weight_decay: 0, the default; the "
        "8-bit ones need bitsandbytes.",
    )


def optim_args() -> Any:
    """The key `optim_args` of the stages that train."""
    choices = "; ".join(f"{name}: {', '.join(each.arguments)}" for name, each in OPTIMIZERS.items() if each.arguments)
    return key({}, f"Further arguments of `optim`, such as {{momentum: 0.9}}. {choices}.")


def check_optimizer(recipe: Any, where: Where) -> None:
    """Check the optimizer and the keys that it reads.

    Raises:
        UserError: names the first broken rule.
    """
    name, optimizer = recipe.optim, OPTIMIZERS.get(recipe.optim)
    if optimizer is None:
        hint = "; for Adam or AdamW write adamw_torch" if name in _ADAM else nearest(name, OPTIMIZERS)
        raise UserError(f"{where('optim')}: expected one of {', '.join(OPTIMIZERS)}, got {name!r}{hint}")
    for each in fields(recipe):
        if each.name in ADAM_KEYS and not optimizer.reads_adam and (got := getattr(recipe, each.name)) != each.default:
            raise UserError(f"{where(each.name)}: optim: {name} does not read it, got {got:g}; leave it out")
    for argument, value in recipe.optim_args.items():
        _check_argument(argument, value, optimizer, name, where("optim_args"))
    if recipe.optim_args.get("nesterov") and (
        not recipe.optim_args.get("momentum") or recipe.optim_args.get("dampening")
    ):
        raise UserError(
            f"{where('optim_args')}.nesterov: needs a momentum above 0 and no dampening; set them, or leave it out"
        )
    for file_key in ("deepspeed", "value_deepspeed"):  # of the models that train
        path = getattr(recipe, file_key, None)
        if not optimizer.elementwise and (stage := zero_stage_of(path)):
            raise UserError(
                f"{where('optim')}: {name} steps blocks or whole matrices, which ZeRO {stage} ({path}) divides among processes; "
                f"use another optimizer, or a file with stage 0 as {file_key}"
            )
    if name in EIGHT_BIT:
        try:
            importlib.import_module("bitsandbytes")
        except ImportError as error:
            raise UserError(
                f"{where('optim')}: {name} needs bitsandbytes; install it by `pip install -e '.[qlora]'` in this repository, or "
                f"use {DEFAULT}"
            ) from error


def _check_argument(argument: str, value: Any, optimizer: Optimizer, name: str, where: str) -> None:
    known = optimizer.arguments
    if argument not in known:
        takes = f"it takes {', '.join(known)}{nearest(argument, known)}" if known else "it takes none"
        keys = "betas and epsilon are adam_beta1, adam_beta2 and adam_epsilon; " if optimizer.reads_adam else ""
        decay = "weight decay is the key weight_decay; " if argument == "weight_decay" else ""
        raise UserError(f"{where}.{argument}: not an argument of optim: {name}; {decay or keys}{takes}")
    accepts = known[argument]
    if accepts is None:
        if not isinstance(value, bool):
            raise UserError(f"{where}.{argument}: expected true or false, got {shown(value)}")
    elif isinstance(value, bool) or not isinstance(value, float) or not accepts.holds(value):
        raise UserError(f"{where}.{argument}: expected a number {accepts.words}, got {shown(value)}")
