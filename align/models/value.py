"""The value model, initialized from a reward model or a language model."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from align.errors import UserError, reason
from align.models.load import load_pretrained
from reward_models.heads import score_head


def value_head_key_mapping(config: PretrainedConfig) -> dict[str, str] | None:
    """The `key_mapping` by which `from_pretrained` loads a reward model's head as that of a token classifier.

    None when both have one name. Call it outside `sharded_load`, which shards even models without storage.

    Raises:
        UserError: transformers has no token classifier of this architecture.
    """
    config.num_labels = 1
    try:
        with torch.device("meta"):
            source = score_head(AutoModelForSequenceClassification.from_config(config))[0]
            target = score_head(AutoModelForTokenClassification.from_config(config))[0]
    except Exception as error:  # no such class, or a configuration that no model can be built from
        raise UserError(
            f"value_model_path: transformers has no token classifier for {config.model_type}, which a value model "
            f"needs, or cannot build it ({reason(error)}); name another model."
        ) from error
    return {f"^{source}": target} if source != target else None


def load_value_model(
    path: str,
    key_mapping: dict[str, str] | None,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, set[str]]:
    """A model with one value per token, from the weights of a reward model, a value model or a language model.

    Args:
        key_mapping: from `value_head_key_mapping`.

    Returns:
        the model, and the parameters of its head that `path` lacks ("weight", "bias"), which the caller has to
        initialize.
    """
    model, report = load_pretrained(
        AutoModelForTokenClassification,
        path,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        num_labels=1,
        key_mapping=key_mapping,
        output_loading_info=True,
    )
    head = score_head(model)[0]
    return model, {name.removeprefix(f"{head}.") for name in report["missing_keys"] if name.startswith(head)}
