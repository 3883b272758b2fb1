"""Which modules of a loaded model its files have no weights for: those that were drawn at random, and have to be trained."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from align.models.inspect_folder import stored_tensors
from align.models.load import head_modules
from reward_models.bottleneck import POOLER


def new_modules(model: PreTrainedModel, path: str) -> list[str]:
    """Names of the modules of which the files in `path` hold no weights; empty for a model on the hub.

    Without a head that is tied to the embedding, and biases of modules with inner ones, which begin at 0.

    Args:
        path: the model that the head was put on.
    """
    _, tensors = stored_tensors(path, path)
    return [] if tensors is None else _without_weights(model, tensors)


def trained_whole(model: PreTrainedModel, path: str) -> list[str]:
    """Names of a classifier's modules that are trained whole beside an adapter: a new pooler, and last the head.

    A pooler is a layer of the backbone that only heads read. A masked language model has none, and on the hub, where this is
    not known, it counts as new. The files of experts name their weights otherwise, so no other module is looked for.

    Args:
        path: the model that the head was put on.
    """
    _, tensors = stored_tensors(path, path)
    new = _without_weights(model, tensors or ())
    inner = f"{model.base_model_prefix}."
    return [*(name for name in new if name.startswith(inner) and POOLER in name), *head_modules(model)]


def _without_weights(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """Names of the modules without inner ones that have parameters, none of which are stored."""
    prefix = f"{model.base_model_prefix}."
    modules = {name.rpartition(".")[0].removeprefix(prefix) for name in stored}
    embedding = model.get_input_embeddings().weight
    return [
        name
        for name, module in model.named_modules()
        if not [*module.children()]
        and [*module.parameters()]
        and name.removeprefix(prefix) not in modules
        and getattr(module, "weight", None) is not embedding
    ]
