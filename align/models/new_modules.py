"""Which modules of a loaded model its files have no weights for: those that were drawn at random."""

from __future__ import annotations

from transformers import PreTrainedModel

from align.models.inspect_folder import stored_tensors


def new_modules(model: PreTrainedModel, path: str) -> list[str]:
    """Names of the modules of which the files in `path` hold no weights; empty for a model on the hub.

    Without a head that is tied to the embedding, and biases of modules with inner ones, which begin at 0.

    Args:
        path: the model that the head was put on.
    """
    _, tensors = stored_tensors(path, path)
    if tensors is None:
        return []
    prefix = f"{model.base_model_prefix}."
    stored = {name.rpartition(".")[0].removeprefix(prefix) for name in tensors}
    embedding = model.get_input_embeddings().weight
    return [
        name
        for name, module in model.named_modules()
        if not [*module.children()]
        and [*module.parameters()]
        and name.removeprefix(prefix) not in stored
        and getattr(module, "weight", None) is not embedding
    ]
