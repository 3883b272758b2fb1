"""A trained reward model, from the folder in which it was saved."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from reward_models.bottleneck import adapted_config, base_of, insert_bottlenecks
from reward_models.heads import keep_head_float32, score_head
from reward_models.linear_head import SequenceClassifier
from reward_models.stored_head import stored_head, stored_tensors


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> Any:
    """Load a reward model for scoring, of any backbone: frozen, in evaluation mode, with a float32 head.

    `score_sequences` gives its scores. The head may have another name than transformers', such as TRL's `v_head`.

    Args:
        device: where weights go, each straight from the file; by default the CPU.

    Raises:
        ValueError: before weights are loaded, if there is no model at `path` or its configuration names another head; after,
            if the files hold no head that is one linear layer to one number, or the weights do not fit (transformers would
            initialize missing ones at random).
    """
    remedy = "expected a reward model: run the reward stage, and name its output_dir."
    try:
        config = adapted_config(path, trust_remote_code)
    except Exception as error:  # no such model, or a configuration that cannot be read
        raise ValueError(f"{path}: no model there ({type(error).__name__}); {remedy}") from error
    mean = getattr(config, "score_mean", 0.0)
    if isinstance(mean, bool) or not isinstance(mean, int | float) or not math.isfinite(mean):
        raise ValueError(f"{path}: config.json: score_mean: expected a finite number, got {mean!r}; {remedy}")
    architecture = (config.architectures or ["a model of unknown class"])[0]
    is_scorer = architecture.endswith("ForSequenceClassification")
    headless = f"{path}: holds {architecture}, which has no sequence classification head; {remedy}"
    if architecture.endswith("ForTokenClassification") or not (is_scorer or stored_tensors(path)):
        raise ValueError(headless)
    # Where the files are here, the head in them decides: a config.json that does not say has two labels by default.
    if is_scorer and config.num_labels != 1 and not stored_tensors(path):
        raise ValueError(f"{path}: a classifier with {config.num_labels} labels instead of one; {remedy}")

    scalar = copy.deepcopy(config)
    scalar.num_labels, scalar.return_dict = 1, True
    text_config = scalar.get_text_config()
    text_config.use_cache = False
    if text_config.pad_token_id is None:
        text_config.pad_token_id = 0  # the model needs one for batches; `score_sequences` does not depend on it
    model, report = SequenceClassifier.from_pretrained(
        base_of(path),
        config=scalar,
        dtype=dtype,
        device_map={"": device} if device is not None else None,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,  # never a pickle
        ignore_mismatched_sizes=True,  # they are refused below
        output_loading_info=True,
    )
    try:
        if base_of(path) != path:
            report["missing_keys"] = set(report["missing_keys"]) - insert_bottlenecks(model, path)
        head = stored_head(path, config, model)
        if head is not None:
            head.put_into(model)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if head is None and not is_scorer:
        raise ValueError(headless)
    name = score_head(model)[0]
    of_head = {key for key in (*report["missing_keys"], *report["unexpected_keys"]) if key.startswith(f"{name}.")}
    unfit = {*report["missing_keys"], *of_head, *(key for key, *_ in report["mismatched_keys"])}
    if head is not None and not head.native:
        unfit -= of_head  # put in above
    if unfit:
        raise ValueError(f"{path}: weights do not fit {type(model).__name__} ({', '.join(sorted(unfit))}); {remedy}")
    keep_head_float32(model)
    return model.eval().requires_grad_(False)
