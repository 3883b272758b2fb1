"""What the package relies on in TRL; see `align/compat/__init__.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

# Attributes that TRL's trainers keep their metrics in; our own trainers have them too.
TRAINER_METRICS, TRAINER_TOKENS = "_metrics", "_total_train_tokens"
# The argument by which TRL asks its fused head for log-probabilities instead of logits.
FUSED_HEAD_ARGUMENT = "fused_lm_head"


def has_fused_head() -> bool:
    """Whether TRL computes log-probabilities in a fused head; 1.14, the last TRL for Python 3.10, has none."""
    import trl.trainer.utils

    return hasattr(trl.trainer.utils, "add_fused_lm_head")


def router_settings(config: Any) -> dict[str, Any]:
    """Arguments of `SFTConfig` for a mixture of experts whose configuration names their number otherwise than TRL (Granite).

    Gives the configuration the name that TRL asks for. A model that has a router's settings and no experts has no loss of
    its router.
    """
    config = config.get_text_config()
    if not hasattr(config, "num_local_experts"):
        return {}
    if not hasattr(config, "num_experts"):
        type(config).attribute_map = {**config.attribute_map, "num_experts": "num_local_experts"}
    return {} if config.num_local_experts else {"router_aux_loss_coef": 0.0}


@contextlib.contextmanager
def fused_head_on_label_tokens() -> Iterator[None]:
    """Inside, TRL's fused head computes the label tokens only, as it does by itself where Triton is available."""
    import trl.trainer.utils

    # The head asks this function for nothing else; the kernels look up a name of their own.
    before = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = before


def pending_metrics(trainer: Any, mode: str) -> dict[str, list[float]]:
    """The lists whose means a TRL trainer puts into its next log; `mode` is "train" or "eval"."""
    metrics: dict[str, list[float]] = getattr(trainer, TRAINER_METRICS)[mode]
    return metrics


def raise_token_count(trainer: Any, at_least: float) -> None:
    """Raise a TRL trainer's count of the tokens trained on to `at_least`."""
    setattr(trainer, TRAINER_TOKENS, max(getattr(trainer, TRAINER_TOKENS), at_least))
