"""Scalar heads that a stage starts from: which one a model's files hold, before weights are loaded, and loading with it."""

from __future__ import annotations

import copy
from collections.abc import Collection

from transformers import PretrainedConfig, PreTrainedModel

from align.errors import UserError, reason
from align.models.load import load_pretrained
from reward_models.heads import init_head, score_head
from reward_models.linear_head import AnyBackbone, SequenceClassifier
from reward_models.stored_head import StoredHead, stored_head


def find_head(
    path: str, config: PretrainedConfig, auto: AnyBackbone, key: str, remedy: str, trust_remote_code: bool = False
) -> StoredHead | None:
    """The scalar head in the files of a model; None if they hold none.

    Args:
        config: of the model in `path`.
        auto: what it is to be loaded by.
        key, remedy: for errors: the recipe key that names the model, and what to do.

    Raises:
        UserError: no such model can be built, or it has a head that cannot be used.
    """
    skeleton = scalar_skeleton(path, config, auto, key, remedy, trust_remote_code)
    try:
        return stored_head(path, config, skeleton)
    except ValueError as error:
        raise UserError(f"{key}: {error}. {remedy}") from error


def scalar_skeleton(
    path: str, config: PretrainedConfig, auto: AnyBackbone, key: str, remedy: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model with one label, without weights; arguments and errors as for `find_head`."""
    one_label = copy.deepcopy(config)
    one_label.num_labels = 1
    try:
        skeleton = auto.skeleton(one_label, trust_remote_code)
        score_head(skeleton)
    except Exception as error:  # no such class, or a configuration that no model can be built from
        raise UserError(
            f"{key}: {path}: no {config.model_type} model with a scalar head can be built: {reason(error)} {remedy}"
        ) from error
    return skeleton


def settle_head(model: PreTrainedModel, head: StoredHead | None, missing: Collection[str], path: str) -> None:
    """Give a loaded model the head of its files, and check that it has the one that was found before.

    Args:
        missing: names of weights that transformers did not find.

    Raises:
        UserError: a model on the hub, whose configuration alone was known, has another head than that says.
    """
    name = score_head(model)[0]
    if head is None or head.native:
        loaded = f"{name}.weight" not in missing
        if loaded != (head is not None):
            holds = "hold a head, which its configuration does not announce" if loaded else f"lack the head {name}"
            raise UserError(f"{path}: its files {holds}; download it, and name its folder.")
        return
    try:
        head.put_into(model)
    except ValueError as error:
        raise UserError(f"{error}; train or download the model again.") from error


def find_reward_head(
    path: str, config: PretrainedConfig, new_head: bool, trust_remote_code: bool = False
) -> StoredHead | None:
    """The head in `path` that a reward model keeps; None: a new one.

    Raises:
        UserError: no reward model can be built on this model, or it has a head that cannot be used.
    """
    key = "model_name_or_path"
    if new_head:
        remedy = "Name another model."
        scalar_skeleton(path, config, SequenceClassifier, key, remedy, trust_remote_code)
        return None
    remedy = "Set new_head: true to start with a new head, or name another model."
    return find_head(path, config, SequenceClassifier, key, remedy, trust_remote_code)


def start_reward_model(
    path: str,
    head: StoredHead | None,
    new_head: bool,
    seed: int,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model that the reward stage starts from: a backbone with the head in its files, or with a new one.

    Args:
        head: from `find_reward_head`.
        new_head: leave out a head in `path`, of whatever size.
        seed: of a new head.

    Raises:
        UserError: it cannot be loaded.
    """
    model, report = load_pretrained(
        SequenceClassifier,
        path,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        num_labels=1,
        ignore_mismatched_sizes=new_head,
        output_loading_info=True,
    )
    assert isinstance(model, PreTrainedModel)
    if not new_head:
        settle_head(model, head, report["missing_keys"], path)
    if head is None:
        init_head(model, seed)
    return model
