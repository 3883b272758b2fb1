"""Check that a model is causal, on a small random model of its configuration."""

from __future__ import annotations

import os

import torch
from transformers import PretrainedConfig

from align.errors import UserError, reason
from align.models.packing import TOLERANCE, VOCABULARY, example_rows
from align.models.small_model import small_model
from align.terminal import say


@torch.no_grad()
def check_causal(config: PretrainedConfig, key: str, path: str, trust_remote_code: bool = False) -> None:
    """Check that no token changes the predictions at earlier positions.

    Args:
        key: recipe key that names the model, for the error.

    Raises:
        UserError: one does, as in an encoder, or in a decoder whose configuration makes its attention bidirectional.
    """
    ids = torch.tensor(example_rows((12,), VOCABULARY))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % VOCABULARY
    try:
        model = small_model(config, VOCABULARY, trust_remote_code=trust_remote_code)
        before, after = (
            model(input_ids=each, use_cache=False).logits[0, :-1].log_softmax(-1) for each in (ids, changed)
        )
    except Exception as error:  # an architecture that cannot be reduced, or needs a kernel that is not here
        if int(os.environ.get("RANK", "0")) == 0:
            say(
                f"note: {key}: {path}: whether a model of type {config.model_type} reads later tokens could not be tried on a small "
                f"random model. {reason(error)}"
            )
        return
    if (gap := float((before - after).abs().max())) > TOLERANCE:
        raise UserError(
            f"{key}: {path}: a model of type {config.model_type} with this config.json reads the tokens that it is to predict: "
            f"a later token changes log-probabilities by up to {gap:.2g} nats (tried on a small random model); name a causal "
            "language model, or correct the setting that makes its attention bidirectional."
        )
