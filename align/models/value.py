"""The value model, initialized from a reward model or a language model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from align.errors import UserError
from align.maths.estimators import ESTIMATORS
from align.models.load import load_pretrained
from align.models.scalar_head import find_head, scalar_skeleton, settle_head
from align.models.shared_weights import classifier_on, has_layers_of, language_model_config
from reward_models.heads import score_head
from reward_models.linear_head import SequenceClassifier, TokenClassifier
from reward_models.stored_head import StoredHead, stored_head


def find_value_head(
    path: str, config: PretrainedConfig, key: str, trust_remote_code: bool = False
) -> StoredHead | None:
    """The head in `path` from which the value model starts; None: a new one.

    A head that reads other layers than the backbone's would not give its scores as values.

    Args:
        config: of the model in `path`.
        key: the recipe key that names it, for errors.

    Raises:
        UserError: no value model can be built on this model, or it has a head that cannot be used.
    """
    without = [name for name, estimator in ESTIMATORS.items() if not estimator.value_model]
    remedy = (
        "Name a reward model, a value model or a language model by value_model_path, or choose an advantage_estimator "
        f"without a value model: {', '.join(without)}; or objective: trajectory_balance with num_generations of 2 or more."
    )
    if layers_below_head(path, config, trust_remote_code):
        scalar_skeleton(path, config, TokenClassifier, key, remedy, trust_remote_code)
        return None
    return find_head(path, config, TokenClassifier, key, remedy, trust_remote_code)


def layers_below_head(path: str, config: PretrainedConfig, trust_remote_code: bool = False) -> list[str]:
    """Names of the layers between backbone and head of the reward model in `path`, which a value model lacks.

    ModernBERT's decoder has them. Empty where `path` holds no reward model of transformers' own class.
    """
    key = "value_model_path"
    scorer = scalar_skeleton(path, config, SequenceClassifier, key, "Name another model.", trust_remote_code)
    name, backbone = score_head(scorer)[0], f"{scorer.base_model_prefix}."
    between = [
        each
        for each, module in scorer.named_modules()
        if not f"{each}.".startswith(backbone) and each != name and not isinstance(module, nn.Dropout | nn.Identity)
        if not [*module.children()]
    ]
    try:
        head = stored_head(path, config, scorer) if between else None
    except ValueError:  # no head of this class
        return []
    return between if head is not None and head.native else []


def load_value_model(
    path: str,
    head: StoredHead | None,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """A model with one value per token, from the weights of a reward model, a value model or a language model.

    Args:
        head: from `find_value_head`.

    Returns:
        the model, and the parameters of its head that `path` lacks ("weight", "bias"), which the caller has to
        initialize.
    """
    model, report = load_pretrained(
        TokenClassifier,
        path,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        device=device,
        num_labels=1,
        output_loading_info=True,
    )
    settle_head(model, head, report["missing_keys"], path)
    name = score_head(model)[0]
    missing = {each.removeprefix(f"{name}.") for each in report["missing_keys"] if each.startswith(f"{name}.")}
    return model, set() if head is not None and not head.native else missing


def check_shared(path: str, config: PretrainedConfig, key: str, trust_remote_code: bool = False) -> None:
    """Check that a value model can have the weights of the language model in `path`, from its configuration.

    Raises:
        UserError: it would have other layers.
    """
    remedy, own = "Use value_method: lora.", language_model_config(config)
    value = scalar_skeleton(path, own, TokenClassifier, key, remedy, trust_remote_code)
    if not has_layers_of(value, config, trust_remote_code):
        raise UserError(
            f"{key}: {path}: a value model of this type ({config.model_type}) has other layers than the language model, so they "
            f"cannot share weights. {remedy}"
        )


def value_model_on(policy: PreTrainedModel, trust_remote_code: bool = False) -> tuple[PreTrainedModel, set[str]]:
    """A value model with the weights of a language model, not copies of them, under a new head; see `load_value_model`."""
    model = classifier_on(policy, TokenClassifier, trust_remote_code)
    return model, {name for name, _ in score_head(model)[1].named_parameters()}
