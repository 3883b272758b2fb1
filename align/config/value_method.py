"""The key `value_method` of PPO's stage, and its rules.

Functions take the recipe of PPO, whose file imports this one.
"""

from __future__ import annotations

from typing import Any

from align.config.keys import Where, key
from align.errors import UserError


def value_method() -> Any:
    """The key `value_method` of PPO's stage."""
    return key(
        "full",
        "What of the value model is trained: full, all weights; lora, adapters (lora_r, lora_alpha, lora_target_modules) and the "
        "head, on frozen weights of its own; shared, the same on the policy's frozen weights, which are then held once: it starts "
        "from the SFT model, with a new head.",
    )


def check_value_method(recipe: Any, where: Where) -> None:
    """The rules between `value_method` and other keys.

    Raises:
        UserError: names the first broken rule.
    """
    if recipe.value_method != "shared":
        return
    if recipe.method == "full":
        raise UserError(
            f"{where('value_method')}: shared needs a policy whose weights stay frozen, got method: full; use method: lora, dora, "
            "ia3 or bottleneck, or value_method: lora"
        )
    for name in ("value_model_path", "value_deepspeed"):
        if getattr(recipe, name) is not None:
            whose = "starts from the policy's weights" if name == "value_model_path" else "has the policy's engine"
            raise UserError(
                f"{where(name)}: with value_method: shared the value model {whose}; leave it out, or use value_method: lora"
            )
