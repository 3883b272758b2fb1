"""The scalar head in a model's files, under whatever name it was saved: found by the headers of the safetensors files.

A reward or value model is one number per token: a linear layer on the last hidden states. transformers calls it `score` or
`classifier`, TRL's `AutoModelForCausalLMWithValueHead` `v_head.summary`, others `value_head`, `reward_head` or
`regression_head`. A head of another name than its own, transformers would leave out and draw anew, with a warning.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reward_models.heads import score_head

NAMES = {"score", "scores", "classifier", "v_head", "value_head", "critic_head", "reward_head", "rm_head", "score_head",
         "regression_head", "regression_layer", "scalar_head"}  # fmt: skip
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTED = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
APART = "value_head"  # LLaMA-Factory's file for the head alone, without its ending


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor is: its file, its name there, its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        with safe_open(self.file, "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(self.name)
        return tensor


@dataclass(frozen=True, slots=True)
class StoredHead:
    """A linear layer from hidden states to one number.

    Attributes:
        name: of the layer in the files, such as "v_head.summary".
        native: the model's class loads it by itself.
        weight, bias: None where there is none, or for a model whose files are not here.
    """

    name: str
    native: bool
    weight: TensorPlace | None = None
    bias: TensorPlace | None = None

    def put_into(self, model: PreTrainedModel) -> None:
        """Give a loaded model this head, if its class has not loaded it. In place, before DeepSpeed shards the model.

        A bias for which the class has no place adds the same to every score: it goes into `config.score_mean`, which
        `score_sequences` subtracts. Without a stored bias, that of the class is 0.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        if self.native or self.weight is None:
            return
        head = score_head(model)[1]
        weight = self.weight.read()
        bias = torch.zeros(1) if self.bias is None else self.bias.read()
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"{self.weight.file}: the weights of the head {self.name} hold NaN or infinity")
        head.weight = nn.Parameter(weight.to(head.weight))
        if head.bias is not None:
            head.bias = nn.Parameter(bias.to(head.bias))
        elif self.bias is not None:
            model.config.score_mean = getattr(model.config, "score_mean", 0.0) - float(bias)


def stored_head(path: str, config: PretrainedConfig, skeleton: PreTrainedModel) -> StoredHead | None:
    """The head in the files of the model or adapter in `path`; None if they hold none.

    Args:
        config: as it is in `path`; it decides for a model whose files are not here, but on the hub.
        skeleton: the model that is to have the head, with one label; it may be on the meta device.

    Raises:
        ValueError: there is one that is no linear layer to one number, or several; begins with the path.
    """
    name = score_head(skeleton)[0]
    scalar = {f"{name}.weight", f"{name}.bias"}
    backbone = f"{skeleton.base_model_prefix}."
    mine = {each for each, _ in skeleton.named_parameters() if not each.startswith(backbone)}
    tensors = stored_tensors(path)
    if not tensors:
        declared = (config.architectures or [""])[0].endswith(("ForSequenceClassification", "ForTokenClassification"))
        return StoredHead(name, native=True) if declared and config.num_labels == 1 else None
    found = {
        each for each in tensors if each in scalar or (each not in mine and _is_of_a_head(each, skeleton, tensors))
    }
    if not found:
        return None
    if below := min(found).rpartition(".")[0].rpartition(".")[0]:  # other layers of the same head, of whatever shape
        found |= {each for each in tensors if each.startswith(f"{below}.") and each not in mine}
    described = ", ".join(f"{each} {list(tensors[each].shape)}" for each in sorted(found)[:6])
    if len({each.split(".")[0] for each in found}) > 1:
        raise ValueError(f"{path}: holds several heads, where one is expected: {described}")
    layer = min(found).rpartition(".")[0]
    weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
    if weight is None or len(weight.shape) != 2 or not found <= {f"{layer}.weight", f"{layer}.bias"}:
        raise ValueError(f"{path}: holds a head that is not one linear layer: {described}")
    if weight.shape[0] != 1:
        raise ValueError(f"{path}: holds a head with {weight.shape[0]} outputs instead of one: {described}")
    if weight.shape[1] != (width := score_head(skeleton)[1].in_features):  # its weight may be sharded
        raise ValueError(f"{path}: holds a head for another width: {described}, where {width} is needed")
    if missing := sorted(mine - scalar - tensors.keys()):
        raise ValueError(f"{path}: holds a head ({described}) without the layers below it: {', '.join(missing)}")
    native = found == mine & scalar and weight.file.name != f"{APART}.safetensors"
    return StoredHead(layer, native, weight, bias)


def _is_of_a_head(name: str, skeleton: PreTrainedModel, tensors: dict[str, TensorPlace]) -> bool:
    """Whether a tensor belongs to a head: by the head's name, or as a layer with one output outside the backbone."""
    parts = name.split(".")
    if parts[0] in NAMES:
        return True
    weight = tensors.get(f"{name.rpartition('.')[0]}.weight")
    inside = parts[0] == skeleton.base_model_prefix or any(part.isdecimal() or "embed" in part for part in parts)
    return not inside and weight is not None and len(weight.shape) == 2 and weight.shape[0] == 1


def stored_tensors(path: str) -> dict[str, TensorPlace]:
    """All tensors of the model or adapter in a folder, by name, from the headers of its safetensors files.

    Of an adapter, those of its base model too. Empty for a model on the hub, or a folder without weights.

    Raises:
        ValueError: a file cannot be read, or the head is in a pickle.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        if not (folder / ADAPTER_WEIGHTS).is_file():
            return {}
        base = str(_read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
        own = _tensors_of(folder / ADAPTER_WEIGHTS)
        return stored_tensors(base) | {each.removeprefix(ADAPTED): place for each, place in own.items()}
    if not (folder / CONFIG).is_file():
        return {}
    named = _read_json(folder / CONFIG).get("transformers_weights", WEIGHTS)
    files = [named]
    if not (folder / named).is_file() and (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    tensors = {name: place for file in files for name, place in _tensors_of(folder / file).items()}
    if (folder / f"{APART}.bin").is_file() and not (folder / f"{APART}.safetensors").is_file():
        raise ValueError(f"{path}: {APART}.bin is a pickle, which could run any program; save the head as safetensors")
    return tensors | _tensors_of(folder / f"{APART}.safetensors")


def _tensors_of(file: Path) -> dict[str, TensorPlace]:
    if not file.is_file():
        return {}
    try:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            return {name: TensorPlace(file, name, tuple(tensors.get_slice(name).get_shape())) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file}: is not a safetensors file, or damaged ({error})") from error


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
