"""The private names of TRL that the package uses; see `align/compat/__init__.py`."""

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


def fused_log_probs(model: Any, ids: Any) -> Any:
    """Log-probabilities [B, S - 1] of the tokens `ids` [B, S] after the first, by TRL's fused head, which the model then has."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model)
    return model(input_ids=ids, labels=ids, **{FUSED_HEAD_ARGUMENT: True}).log_probs


def router_settings(config: Any, has_router_loss: bool) -> dict[str, Any]:
    """Arguments of `SFTConfig` for a model whose configuration has a router's settings; none for others.

    TRL adds the router's loss wherever there are such settings: in dense models of Granite's, Doge's and Llama 4's kind there is
    none. Gives the configuration of Granite's mixtures the name by which TRL asks for the number of experts.
    """
    config = config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        return {}
    if not has_router_loss:
        return {"router_aux_loss_coef": 0.0}
    if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        type(config).attribute_map = {**config.attribute_map, "num_experts": "num_local_experts"}
    return {}


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
