"""`method: bottleneck`: bottleneck adapters after the sub-layers of every layer, as a method of PEFT.

PEFT has no such method, and the `adapters` library, which has it, needs transformers 4.57. Registered with PEFT, they are
added, switched off, saved and loaded as its other adapters are; `reward_models/bottleneck.py` has the block, and loads a
model with its adapter for use.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from align.compat.peft import register_method, replace_module
from align.config.base import StageRecipe
from align.config.deepspeed_file import zero_stage_of
from align.errors import UserError
from align.models.sublayers import find_sublayers
from reward_models.bottleneck import (
    BOTTLENECK,
    PREFIX,
    adapted_config,
    adapter_weights,
    after_block,
    base_of,
    bottleneck_settings,
    new_block,
)
from reward_models.stored_head import ADAPTED, ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG

NOT_KEPT = (
    "dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
)  # entries that say how files were written, or a run was set up
KEYS = ("bottleneck_size", "bottleneck_placement")  # of recipes, and of `adapter_config.json`


@dataclass
class BottleneckConfig(PeftConfig):
    """What `adapter_config.json` holds.

    Attributes:
        target_modules: the modules that have a block after them.
        modules_to_save: names of modules that are trained whole, such as a head.
        bottleneck_size, bottleneck_placement: as in the recipe.
        model_config: entries of the base model's configuration that training changed, such as its labels.
    """

    target_modules: list[str] | None = field(default=None)
    exclude_modules: list[str] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    bottleneck_size: int = field(default=64)
    bottleneck_placement: str = field(default="houlsby")
    model_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = BOTTLENECK


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module with a block after it for each adapter, one of which is active."""

    adapter_layer_names = (f"{PREFIX}down", f"{PREFIX}up")

    def __init__(self, base_layer: nn.Module, adapter: str, width: int, size: int):
        super().__init__()
        self.base_layer = base_layer
        down, up = new_block(width, size)
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict({adapter: down}), nn.ModuleDict({adapter: up})
        self._active_adapter = adapter
        self.merged_adapters: list[str] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return output
        (active,) = self.active_adapters
        return after_block(output, self.bottleneck_down[active], self.bottleneck_up[active])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("a bottleneck adapter is not linear: no weights of the base model equal it")


class BottleneckModel(BaseTuner):
    """Puts a block after each module of `target_modules`."""

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return any(key == name or key.endswith(f".{name}") for name in peft_config.target_modules)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        width = int(self.model.config.get_text_config().hidden_size)
        layer = BottleneckLayer(target, adapter_name, width, peft_config.bottleneck_size)
        replace_module(self, parent, target_name, layer, target)


register_method(BOTTLENECK, BottleneckConfig, BottleneckModel, PREFIX)


def bottleneck_config(
    config: PretrainedConfig,
    *,
    size: int,
    placement: str,
    task_type: str,
    modules_to_save: Collection[str] = (),
    trust_remote_code: bool = False,
) -> BottleneckConfig:
    """The adapter of a model of this configuration.

    Args:
        placement: "houlsby" for a block after each sub-layer, attention and feed-forward; "pfeiffer" for one after the
            feed-forward alone.

    Raises:
        UserError: no such layers are found in the model.
    """
    layers = find_sublayers(config, "method", trust_remote_code)
    return BottleneckConfig(
        task_type=task_type,
        target_modules=[name for layer in layers for name in (layer if placement == "houlsby" else layer[-1:])],
        modules_to_save=list(modules_to_save) or None,
        bottleneck_size=size,
        bottleneck_placement=placement,
    )


def check_start(path: str, key: str, recipe: StageRecipe) -> None:
    """Check that a recipe goes on with the bottleneck adapter that it starts from, if it starts from one.

    Args:
        key: of the recipe, which names the model in `path`.

    Raises:
        UserError: it trains something else, or other adapters.
    """
    settings = bottleneck_settings(path)
    if settings is None:
        return
    if recipe.method != "bottleneck":
        raise UserError(
            f"{key}: {path} is a bottleneck adapter, which cannot be merged into a model, so method: {recipe.method} cannot "
            f"start from it; go on with method: bottleneck, or name its base {settings['base_model_name_or_path']}."
        )
    for name in KEYS:
        if (mine := getattr(recipe, name)) != (theirs := settings.get(name)):
            raise UserError(f"{name}: expected {theirs}, as that of the adapter in {path} ({key}), got {mine}.")
    if zero_stage_of(recipe.deepspeed) == 3:
        raise UserError(
            f"{key}: {path}: training goes on with a bottleneck adapter at ZeRO 0 to 2 alone; use ZeRO 2, it trains few "
            "parameters."
        )


def continue_adapter(model: nn.Module, path: str | None, new_head: bool = False) -> None:
    """Give a model that is to be trained the weights of the adapter in `path`, if that holds a bottleneck adapter.

    Args:
        new_head: leave out a head in `path`; otherwise it is kept if it has the same shape.
    """
    if path is None or bottleneck_settings(path) is None:
        return
    weights = adapter_weights(path, model)
    for name, parameter in model.named_parameters():
        of_head = ".modules_to_save.default." in name
        own = name.replace(".modules_to_save.default." if of_head else ".default.", ".").removeprefix(ADAPTED)
        stored = weights.get(own)
        if (
            parameter.requires_grad
            and stored is not None
            and stored.shape == parameter.shape
            and not (of_head and new_head)
        ):
            parameter.data.copy_(stored)


def adapter_entries(recipe: Any, config: PretrainedConfig) -> dict[str, Any]:
    """What `adapter_config.json` says of an adapter that a recipe trains, of all that later stages ask.

    Args:
        config: of the model that is trained.
    """
    base = base_of(getattr(recipe, "model_name_or_path", None) or recipe.sft_model_path)
    return {
        "peft_type": BOTTLENECK,
        "base_model_name_or_path": base,
        "model_config": changed_entries(config, base, recipe.trust_remote_code),
        **{name: getattr(recipe, name) for name in KEYS},
    }


def complete_adapter(folder: Path, recipe: Any, start: PreTrainedModel) -> None:
    """Add to an adapter that PEFT has saved what its base model lacks: entries of the configuration, and weights.

    Args:
        start: the model that training started from, whole, without the adapter. It has weights of its own where a head was put
            on the base, those that were not trained included, such as a pooler's.
    """
    file = folder / ADAPTER_CONFIG
    settings = {**json.loads(file.read_text(encoding="utf-8")), **adapter_entries(recipe, start.config)}
    auto: Any = type(start)
    _, report = auto.from_pretrained(
        settings["base_model_name_or_path"],
        config=copy.deepcopy(start.config),
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    lacking = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    # Cloned: a new head may hold one tensor under two names, such as the bias of BERT's masked language modeling.
    weights = {
        f"{ADAPTED}{name}": weight.contiguous().clone()
        for name, weight in start.state_dict().items()
        if name in lacking
    }
    save_file(weights | load_file(folder / ADAPTER_WEIGHTS), folder / ADAPTER_WEIGHTS, {"format": "pt"})
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; the stage writes its own


def add_entries(folder: Path, entries: Mapping[str, Any]) -> Path:
    """Add entries to the configuration of a saved model, or to what an adapter changes in that of its base; returns the file."""
    file = folder / CONFIG
    if file.is_file():
        content = {**json.loads(file.read_text(encoding="utf-8")), **entries}
    else:
        file = folder / ADAPTER_CONFIG
        content = json.loads(file.read_text(encoding="utf-8"))
        content["model_config"] |= entries
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return file


def changed_entries(config: PretrainedConfig, base: str, trust_remote_code: bool) -> dict[str, Any]:
    """The entries of a configuration that differ from those of the model in `base`."""
    given = adapted_config(base, trust_remote_code).to_dict()
    return {
        name: value for name, value in config.to_dict().items() if name not in NOT_KEPT and given.get(name) != value
    }
