"""Which reward models score on the policy's frozen weights by their own adapter and head, so that these weights are held once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig

from align.config.ppo import PPORecipe
from align.errors import UserError, reason
from align.evaluate.reward_model import RewardModel
from align.models.inspect_folder import ADAPTER_CONFIG, inspect_adapter, stored_tensors
from align.models.scalar_head import scalar_skeleton
from align.models.shared_weights import has_layers_of, put_adapter
from align.runs.fingerprints import FileSums, model_fingerprint, same_weights
from align.runs.manifest import read_manifest
from reward_models.bottleneck import base_of
from reward_models.linear_head import SequenceClassifier

ADAPTER = "adapter"  # folder in that of a reward model, whose weights it was merged into
FOLDER = "folder"  # in `inputs` of a folder that stands for a model to be trained: the model it would start from


def on_policys_weights(recipe: PPORecipe, policy: PretrainedConfig, models: Sequence[RewardModel]) -> list[RewardModel]:
    """The reward models, with `adapter` or `apart` where they have an adapter and the policy's weights are frozen.

    Args:
        policy: its configuration.

    Raises:
        UserError: an adapter's files are damaged.
    """
    return [_settle(recipe, policy, model) for model in models]


def _settle(recipe: PPORecipe, policy: PretrainedConfig, model: RewardModel) -> RewardModel:
    adapter = Path(model.path) / ADAPTER
    if recipe.method == "full" or not (adapter / ADAPTER_CONFIG).is_file():
        return model
    if (apart := _difference(recipe, policy, model, adapter)) is not None:
        return replace(model, apart=apart)
    return replace(model, adapter=str(adapter))


def _difference(recipe: PPORecipe, policy: PretrainedConfig, model: RewardModel, adapter: Path) -> str | None:
    """Why a reward model cannot score on the policy's weights, or would give other scores there; None if it can."""
    if recipe.reward_deepspeed is not None:
        return "reward_deepspeed is for them"
    if not _starts_from(model.path, base_of(recipe.sft_model_path)):
        return "it was not trained from sft_model_path"
    _, tensors = stored_tensors(model.path, model.key)
    if not recipe.bf16 and any(tensor.dtype in ("BF16", "F16") for tensor in (tensors or {}).values()):
        return "they were rounded when they were saved, and in float32 those of its adapter are not"
    code, remedy = recipe.trust_remote_code, "Name another model."
    skeleton = scalar_skeleton(model.path, model.config, SequenceClassifier, model.key, remedy, code)
    if getattr(policy, "quantization_config", None) is not None or not has_layers_of(skeleton, policy, code):
        return f"its layers are others than those of the policy ({model.config.model_type})"
    if (name := _other_setting(model.config, policy)) is not None:
        return f"its layers compute otherwise than those of the policy: {name} in config.json is another"
    if tensors is not None:  # otherwise it is yet to be trained
        inspect_adapter(adapter, model.key, tensors)
        try:
            put_adapter(skeleton, str(adapter), without_storage=True)
        except Exception as error:  # whatever PEFT raises for these files
            raise UserError(
                f"{model.key}: {adapter}: does not fit the model that it was trained on. {reason(error)} Run the reward stage again, or "
                "delete this folder: the model beside it is then loaded whole."
            ) from error
    return None


def _other_setting(mine: PretrainedConfig, theirs: PretrainedConfig) -> str | None:
    """A setting of two language models' layers that differs between their configurations, which may have been edited."""
    own, other = mine.get_text_config().to_dict(), theirs.get_text_config().to_dict()
    of_layers = own.keys() & other.keys() - PretrainedConfig().to_dict().keys() - {"use_cache"}
    differ = (name for name in sorted(of_layers) if own[name] != other[name] and not name.endswith("token_id"))
    return next(differ, None)


def _starts_from(path: str, base: str) -> bool:
    """Whether the reward model in `path` was trained from the weights in `base`, by what its run recorded of them."""
    manifest = read_manifest(path) or {"inputs": {}}
    trained_from = manifest["inputs"].get("model_name_or_path", {})
    if FOLDER in trained_from:
        return bool(trained_from[FOLDER] == os.path.realpath(base))
    if not isinstance(trained_from, dict) or not trained_from:
        return False
    return same_weights(trained_from, model_fingerprint(base, FileSums(dict(manifest.get("sums", {})))))
