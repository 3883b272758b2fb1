"""Classifiers with one label on the frozen weights of a language model, which are then held once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from align.compat.peft import load_adapter
from align.compat.transformers import config_of, model_class
from align.models.check_weights import check_finite
from align.models.dropout import disable_dropout
from align.models.load import head_modules
from reward_models.heads import keep_head_float32, score_head
from reward_models.linear_head import AnyBackbone, SequenceClassifier


def language_model_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that its language model is built from."""
    own: PretrainedConfig = config_of(model_class(AutoModelForCausalLM, config), config)
    return own


def has_layers_of(classifier: PreTrainedModel, config: PretrainedConfig, trust_remote_code: bool = False) -> bool:
    """Whether a classifier is the layers of a language model, and a head of one linear layer.

    Args:
        classifier: without storage.
        config: of the language model.
    """
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(language_model_config(config), trust_remote_code=trust_remote_code)
    mine, theirs = (
        {name: w.shape for name, w in model.base_model.named_parameters()} for model in (classifier, policy)
    )
    return mine == theirs and head_modules(classifier) == [score_head(classifier)[0]]


def classifier_on(policy: PreTrainedModel, auto: AnyBackbone, trust_remote_code: bool = False) -> PreTrainedModel:
    """A classifier with the weights of a language model, not copies of them, under a head of zeros.

    It has modules of its own around the same parameters, so that each of the two models can have its own adapters.

    Args:
        policy: without adapters.
    """
    shared = [*policy.base_model.parameters(), *policy.base_model.buffers()]
    backbone: Any = copy.deepcopy(policy.base_model, {id(tensor): tensor for tensor in shared})
    backbone.config.num_labels = 1
    model: Any = auto.skeleton(backbone.config, trust_remote_code)
    model.config = backbone.config
    setattr(model, model.base_model_prefix, backbone)
    for weight in score_head(model)[1].to_empty(device="cpu").parameters():
        nn.init.zeros_(weight)
    disable_dropout(model)
    classifier: PreTrainedModel = model
    return classifier


def reward_model_on(
    policy: PreTrainedModel, adapter: str, config: PretrainedConfig, trust_remote_code: bool = False
) -> PeftModel:
    """A reward model of the weights of a language model and an adapter, its head included, which computes in float32.

    Args:
        policy: without adapters.
        adapter: its folder.
        config: of the reward model.
    """
    model = classifier_on(policy, SequenceClassifier, trust_remote_code)
    model.config.score_mean = getattr(config, "score_mean", 0.0)
    text = model.config.get_text_config()
    text.use_cache = False
    if text.pad_token_id is None:
        text.pad_token_id = 0  # the model needs one for batches; `score_sequences` does not depend on it
    scorer = put_adapter(model, adapter)
    check_finite(scorer, adapter)
    keep_head_float32(scorer)
    return scorer


def put_adapter(model: PreTrainedModel, adapter: str, without_storage: bool = False) -> PeftModel:
    """The model with the adapter in a folder, which it has to fit; arguments as for `load_adapter`."""
    settings = PeftConfig.from_pretrained(adapter)
    settings.task_type = None  # PEFT's own class for a task looks for a head by its name
    adapted: PeftModel = load_adapter(model, adapter, settings, without_storage, keep_base_layers=True)
    return adapted
