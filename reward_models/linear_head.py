"""Sequence and token classifiers of every architecture: transformers' own, or a linear head on its base model.

transformers has no token classifier of many decoders (OPT, GPT-J, Gemma-3, OLMo, ...), and no sequence classifier of
some (Granite, Cohere, LFM2, ...). `SequenceClassifier` and `TokenClassifier` are used as its auto classes are. For such
a decoder they give a class named as transformers would name it, whose head is called `score`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput


class LinearHead:
    """A base model with a linear layer on its last hidden states; a mixin before the architecture's PreTrainedModel."""

    backbone_class: ClassVar[type[PreTrainedModel]]
    has_bias: ClassVar[bool]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        setattr(self, self.base_model_prefix, self.backbone_class(config))  # type: ignore[attr-defined]
        text: Any = config.get_text_config()
        width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size  # OPT may project its last states
        labels: Any = config.num_labels
        self.score = nn.Linear(width, labels, bias=self.has_bias)
        self.post_init()  # type: ignore[attr-defined]

    def token_logits(self, **inputs: Any) -> Tensor:
        """The head on each position, [B, S, num_labels]; inputs that are None are left out."""
        backbone = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        output = backbone(**{name: value for name, value in inputs.items() if value is not None})
        logits: Tensor = self.score(output.last_hidden_state)
        return logits


class LinearTokenClassifier(LinearHead):
    """Logits of each token. As in transformers' own, the head has a bias."""

    has_bias = True

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> TokenClassifierOutput:
        """[B, S] ids to logits [B, S, num_labels]."""
        return TokenClassifierOutput(logits=self.token_logits(input_ids=input_ids, **inputs))


class LinearSequenceClassifier(LinearHead):
    """Logits of the last real token of each sequence. As in transformers' own, the head has no bias."""

    has_bias = False

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
    ) -> SequenceClassifierOutput:
        """[B, S] ids to logits [B, num_labels]; the mask says which tokens are real, without one all are."""
        logits = self.token_logits(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        rows, columns = (torch.arange(size, device=logits.device) for size in logits.shape[:2])
        last = columns[-1] if attention_mask is None else (attention_mask * columns).argmax(dim=1)
        return SequenceClassifierOutput(logits=logits[rows, last])


@dataclass(frozen=True, slots=True)
class AnyBackbone:
    """An auto class of transformers, which gives a linear head on the base model where that has no class.

    Attributes:
        auto: the auto class.
        mapping: its classes by configuration class.
        head: the mixin that stands in for a missing one.
    """

    auto: Any
    mapping: Any
    head: type[LinearHead]

    def class_of(self, config: PretrainedConfig) -> Any:
        """The class of this configuration; None where code that comes with the model has it.

        Raises:
            ValueError: neither transformers nor this has one.
        """
        if self.auto.__name__ in (getattr(config, "auto_map", None) or {}):
            return None
        head: Any = self.head
        kind: Any = type(config)
        return self.mapping.get(kind, None) or linear_head_class(head, kind)

    def from_config(self, config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
        """As the auto class's.

        Raises:
            ValueError: as `class_of`.
        """
        chosen = self.class_of(config)
        model: PreTrainedModel = (
            self.auto.from_config(config, trust_remote_code=trust_remote_code) if chosen is None else chosen(config)
        )
        return model

    def skeleton(self, config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
        """The model without storage."""
        with torch.device("meta"):
            return self.from_config(config, trust_remote_code)

    def from_pretrained(self, path: str, *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
        """As the auto class's.

        Raises:
            ValueError: as `class_of`.
        """
        config = kwargs.get("config") or AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        chosen = self.class_of(config)
        if chosen is None or type(config) in self.mapping:
            return self.auto.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
        return chosen.from_pretrained(path, **kwargs)


@cache
def linear_head_class(head: Any, config_class: Any) -> Any:
    """The class of a linear head, one of the two mixins, on the base model of this configuration class.

    Raises:
        ValueError: transformers has no base model of it.
    """
    backbone = MODEL_MAPPING.get(config_class, None)
    if not isinstance(backbone, type):
        raise ValueError(f"transformers has no base model of type {config_class.model_type}, on which to put a head.")
    task = "ForTokenClassification" if head is LinearTokenClassifier else "ForSequenceClassification"
    attributes = {
        "backbone_class": backbone,
        "base_model_prefix": backbone.base_model_prefix or "model",
        "config_class": config_class,
        "__module__": backbone.__module__,  # where transformers looks for what else the architecture needs
        "__doc__": f"{backbone.__name__} with a linear head.",
    }
    parent = next(base for base in backbone.__mro__[1:] if issubclass(base, PreTrainedModel))
    return type(backbone.__name__.removesuffix("Model") + task, (head, parent), attributes)


SequenceClassifier = AnyBackbone(
    AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, LinearSequenceClassifier
)
TokenClassifier = AnyBackbone(
    AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, LinearTokenClassifier
)
