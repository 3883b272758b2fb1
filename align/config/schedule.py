"""Keys of the learning rate's schedule, by transformers' names, and the rules between them.

Functions take the recipe of a stage that trains, whose file imports this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.config.convert import shown
from align.config.keys import ABOVE_0, AT_LEAST_0, AT_LEAST_1, FROM_0_TO_BELOW_1, Range, Where, key
from align.errors import UserError, nearest

POLYNOMIAL_END = 1e-7  # learning rate at which transformers' schedule of this name ends by default
_WHOLE = Range("that is whole and at least 1", lambda value: AT_LEAST_1.holds(value) and float(value).is_integer())
_SHAPES = ("linear", "cosine", "1-sqrt")
_MIN_LR = {"min_lr": AT_LEAST_0, "min_lr_rate": FROM_0_TO_BELOW_1, "num_cycles": ABOVE_0}
# By name, the arguments of each: a range, or the texts that it may be.
SCHEDULES: Mapping[str, Mapping[str, Range | tuple[str, ...]]] = {
    "linear": {},
    "cosine": {"num_cycles": ABOVE_0},
    "cosine_with_restarts": {"num_cycles": _WHOLE},
    "polynomial": {"lr_end": AT_LEAST_0, "power": ABOVE_0},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": _WHOLE},
    "cosine_with_min_lr": _MIN_LR,
    "cosine_warmup_with_min_lr": {**_MIN_LR, "warmup_lr_rate": FROM_0_TO_BELOW_1},
    "warmup_stable_decay": {
        "num_decay_steps": _WHOLE,
        "min_lr_ratio": FROM_0_TO_BELOW_1,
        "warmup_type": _SHAPES,
        "decay_type": _SHAPES,
        "num_cycles": ABOVE_0,
    },
}


def lr_scheduler_type() -> Any:
    """The key `lr_scheduler_type` of the stages that train."""
    return key("linear", f"Schedule of the learning rate, by transformers' name: {', '.join(SCHEDULES)}.")


def lr_scheduler_kwargs() -> Any:
    """The key `lr_scheduler_kwargs` of the stages that train."""
    choices = "; ".join(f"{name}: {', '.join(arguments)}" for name, arguments in SCHEDULES.items() if arguments)
    return key({}, f"Arguments of the schedule, such as {{min_lr_rate: 0.1}}. {choices}.")


def check_schedule(recipe: Any, where: Where) -> None:
    """Check the schedule of the learning rate and its arguments.

    Raises:
        UserError: names the first broken rule.
    """
    name, given = recipe.lr_scheduler_type, recipe.lr_scheduler_kwargs
    if name not in SCHEDULES:
        raise UserError(
            f"{where('lr_scheduler_type')}: expected one of {', '.join(SCHEDULES)}, got {name!r}{nearest(name, SCHEDULES)}"
        )
    for argument, value in given.items():
        _check_argument(argument, value, name, where("lr_scheduler_kwargs"))
    place = where("lr_scheduler_kwargs" if given else "lr_scheduler_type")
    if "min_lr" in SCHEDULES[name] and ("min_lr" in given) == ("min_lr_rate" in given):
        raise UserError(
            f"{place}: {name} needs either min_lr, a learning rate, or min_lr_rate, a share of the highest, got "
            f"{'both' if 'min_lr' in given else 'neither'}; write lr_scheduler_kwargs: {{min_lr_rate: 0.1}}"
        )
    if name == "warmup_stable_decay" and "num_decay_steps" not in given:
        raise UserError(
            f"{place}: {name} needs the length of its decay; write lr_scheduler_kwargs: {{num_decay_steps: 100}}"
        )
    end = given.get("lr_end", POLYNOMIAL_END) if name == "polynomial" else given.get("min_lr", 0)
    for rate in ("learning_rate", "value_learning_rate"):
        if (peak := getattr(recipe, rate, None)) is not None and peak <= end:
            raise UserError(
                f"{where(rate)}: expected more than {end:g}, where lr_scheduler_type: {name} ends, got {peak:g}; raise it, or use "
                "linear, which ends at 0"
            )


def check_decay_steps(recipe: Any, steps: int, where: Where = str) -> None:
    """Check that the decay of `warmup_stable_decay` fits into a run of this many steps (PPO: updates).

    Raises:
        UserError: it is longer.
    """
    decay = recipe.lr_scheduler_kwargs.get("num_decay_steps", 0)
    if decay > steps:
        raise UserError(
            f"{where('lr_scheduler_kwargs')}.num_decay_steps: expected at most {steps}, all {'updates' if recipe.stage == 'ppo' else 'steps'} of the run, got {decay:g}"
        )


def _check_argument(argument: str, value: Any, name: str, where: str) -> None:
    known = SCHEDULES[name]
    if argument not in known:
        takes = f"it takes {', '.join(known)}{nearest(argument, known)}" if known else "it takes none"
        raise UserError(f"{where}.{argument}: not an argument of lr_scheduler_type: {name}; {takes}")
    accepts = known[argument]
    if isinstance(accepts, tuple):
        if value not in accepts:
            raise UserError(f"{where}.{argument}: expected one of {', '.join(accepts)}, got {shown(value)}")
    elif isinstance(value, bool) or not isinstance(value, float) or not accepts.holds(value):
        raise UserError(f"{where}.{argument}: expected a number {accepts.words}, got {shown(value)}")
