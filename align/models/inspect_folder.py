"""Inspect a model folder by its files, in seconds, without loading weights or torch.

Every stage inspects the models that it starts from before it writes or loads anything, and `align check` does the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.convert import shown
from align.config.ensemble import ensemble_members, models_by_place
from align.config.recipe import Recipe
from align.config.stages import stage_of
from align.config.text_file import check_regular, read_text
from align.errors import UserError
from align.models.adapter_patterns import check_patterns
from align.models.config_sizes import check_sizes
from align.models.safetensors_header import StoredTensor, read_header
from align.models.small_files import JSON_FILES, check_small_file

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
BOTTLENECK = "BOTTLENECK"  # `peft_type` of our own adapters, as in reward_models/bottleneck.py, which imports torch
UNTRAINED = "untrained"  # in output_dir while a stage runs: the model it starts from, where that had to be made first
WEIGHTS, INDEX, ADAPTER_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
TEXT_FILES = ("chat_template.jinja", "merges.txt", "vocab.txt")
OTHER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model, or an adapter with the model that it was trained on (`base`, None if that is on the hub).

    Attributes:
        config: content of `config.json`; of an adapter, of `adapter_config.json`.
        tensors: by name.
    """

    path: str
    config: dict[str, Any]
    tensors: dict[str, StoredTensor] = field(repr=False)
    is_adapter: bool = False
    base: ModelFolder | None = None


def looks_local(path: str) -> bool:
    """Whether `path` names a folder rather than a hub id, which has the form `name` or `owner/name`."""
    parts = Path(path).parts
    return len(parts) > 2 or not parts or os.path.lexists(parts[0]) or path.startswith((".", "/", "~"))


def inspect_inputs(recipe: Recipe, made: Collection[Path] = ()) -> None:
    """Inspect every model folder that a recipe names.

    Args:
        made: resolved folders to leave out, because an earlier recipe has yet to make them.

    Raises:
        UserError: one cannot be used; begins with its key.
    """
    for key in stage_of(recipe).input_models:
        value = getattr(recipe, key)
        if isinstance(value, list):
            named = models_by_place(key, value)
        else:
            named = {f"{key}.{n}": path for n, path in value.items()} if isinstance(value, dict) else {key: value}
        for place, path in named.items():
            if path and Path(path).resolve() not in made:
                inspect_folder(path, place)


def inspect_folder(path: str, key: str, _adapters: tuple[str, ...] = ()) -> ModelFolder | None:
    """Inspect the model or adapter in `path`; None for a model on the hub.

    Args:
        key: the recipe key that names the model, for errors.

    Raises:
        UserError: no model there, or one that cannot be used; names the file, and says what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        if os.path.lexists(path):
            raise UserError(f"{key}: {path}: expected the folder of a model, got a file; name its folder.")
        if looks_local(path):
            raise UserError(f"{key}: no model at {path}; run the stage that makes it first, or correct the path.")
        return None
    is_adapter = os.path.lexists(folder / ADAPTER_CONFIG) and not os.path.lexists(folder / CONFIG)
    name = ADAPTER_CONFIG if is_adapter else CONFIG
    if not os.path.lexists(folder / name):
        if (first := ensemble_members(path)[0]) != path:
            raise UserError(f"{key}: {path} holds an ensemble of reward models; name one of them, such as {first}.")
        raise UserError(
            f"{key}: no model at {path} ({CONFIG} is missing); run the stage that makes it first, or correct it."
        )
    config = read_object(folder / name, key)
    _check_files(folder, key)
    if is_adapter:
        base = check_adapter(config, path, key)
        if base in _adapters:
            raise UserError(f"{key}: {path}: the adapter's base model leads back to {base}; correct {ADAPTER_CONFIG}.")
        if Path(base).name == UNTRAINED and not os.path.lexists(base):
            raise UserError(
                f"{key}: {path}: an adapter of a model that its run made at random parts, and has removed; the run has merged "
                f"the two: name {folder.absolute().parent}."
            )
        tensors = _read_weights(folder, {}, key, ADAPTER_WEIGHTS)
        inner = inspect_folder(base, f"{key}: {path} is an adapter of {base}", (*_adapters, path, base))
        check_patterns(config, inner.tensors if inner else (), f"{key}: {folder / name}")
        return ModelFolder(path, config, tensors, True, inner)
    check_sizes(config, f"{key}: {folder / name}")
    check_small_file(folder / name, config, key)
    return ModelFolder(path, config, _read_weights(folder, config, key, WEIGHTS))


def inspect_adapter(folder: Path, key: str, tensors: Collection[str]) -> dict[str, Any]:
    """Inspect an adapter beside the model that it was merged into; returns its configuration.

    Args:
        tensors: names of the model's.

    Raises:
        UserError: it cannot be used; begins with `key` and the file.
    """
    config = read_object(folder / ADAPTER_CONFIG, key)
    check_adapter(config, str(folder), key)
    check_patterns(config, tensors, f"{key}: {folder / ADAPTER_CONFIG}")
    _read_weights(folder, {}, key, ADAPTER_WEIGHTS)
    return config


def stored_tensors(path: str, key: str) -> tuple[str, dict[str, StoredTensor] | None]:
    """The folder of the model in `path`, or of an adapter's base model, and its tensors by name.

    The tensors are None for a model on the hub, and for a folder without weights, which `inspect_inputs` refuses unless
    it stands for one that an earlier recipe has yet to make.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        if not (folder / ADAPTER_CONFIG).is_file():
            return path, None
        return stored_tensors(check_adapter(read_object(folder / ADAPTER_CONFIG, key), path, key), key)
    config = read_object(folder / CONFIG, key)
    names = (config.get("transformers_weights"), WEIGHTS, INDEX)
    if not any(isinstance(name, str) and os.path.lexists(folder / name) for name in names):
        return path, None
    return path, _read_weights(folder, config, key, WEIGHTS)


def read_object(path: Path, key: str) -> dict[str, Any]:
    """The object in a JSON file that another program wrote, NaN and infinities included.

    Raises:
        UserError: it cannot be read; begins with `key` and the file.
    """
    text = read_text(path, key)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "it is empty" if not text.strip() else f"not valid JSON: {str(error).splitlines()[0]}"
        raise UserError(f"{key}: {path}: {problem}; copy or download the file again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{key}: {path}: expected a JSON object, got {shown(value)}; copy or download the file again.")
    return value


def check_adapter(config: Mapping[str, Any], path: str, key: str) -> str:
    """The base model that an adapter's configuration names.

    Raises:
        UserError: it names none, or no type of adapter, or a module to import.
    """
    for name in ("peft_type", "base_model_name_or_path"):
        if not isinstance(config.get(name), str) or not config[name]:
            raise UserError(
                f"{key}: {Path(path) / ADAPTER_CONFIG}: {name}: expected text, got {shown(config.get(name))}; write the "
                f"{'type of the adapter' if name == 'peft_type' else 'path or hub id of its base model'}."
            )
    if config["peft_type"] == BOTTLENECK:
        changed = config.get("model_config")
        labels = changed.get("id2label", {}) if isinstance(changed, dict) else None
        if not isinstance(labels, dict) or not all(label.isdecimal() for label in labels):
            raise UserError(
                f"{key}: {Path(path) / ADAPTER_CONFIG}: model_config: expected an object of entries of config.json, got "
                f"{shown(changed)}; copy the file again."
            )
    if config.get("megatron_config"):  # with it, PEFT imports the module that `megatron_core` names
        raise UserError(
            f"{key}: {Path(path) / ADAPTER_CONFIG}: megatron_config: expected null, got {shown(config['megatron_config'])}; adapters "
            "of Megatron's layers are not supported."
        )
    return str(config["base_model_name_or_path"])


def _check_files(folder: Path, key: str) -> None:
    for name in JSON_FILES:
        if os.path.lexists(folder / name):
            check_small_file(folder / name, read_object(folder / name, key), key)
    for name in TEXT_FILES:
        if os.path.lexists(folder / name):
            read_text(folder / name, key)
    for name in OTHER_FILES:
        if os.path.lexists(folder / name):
            check_regular(folder / name, key)


def _read_weights(folder: Path, config: Mapping[str, Any], key: str, weights: str) -> dict[str, StoredTensor]:
    """The tensors of a folder, from the headers of its safetensors files."""
    if isinstance(named := config.get("transformers_weights"), str):  # transformers' key for another name
        if Path(named).name != named or not named.endswith(".safetensors"):
            raise UserError(
                f"{key}: {folder / CONFIG}: transformers_weights: expected the name of a .safetensors file in this folder, got "
                f"{shown(named)}"
            )
        weights = named
    if os.path.lexists(folder / weights) and not weights.endswith(".index.json"):
        tensors = read_header(folder / weights, key)
    elif weights == ADAPTER_WEIGHTS or not os.path.lexists(index := folder / INDEX):
        raise _no_weights(folder, config, key, weights)
    else:
        tensors = _read_shards(index, key)
    if not tensors:
        raise UserError(f"{key}: {folder / weights}: holds no tensors; copy or download the model again.")
    return tensors


def _no_weights(folder: Path, config: Mapping[str, Any], key: str, weights: str) -> UserError:
    pickle = next((name for name in PICKLES if os.path.lexists(folder / name)), None)
    if pickle is None:
        return UserError(f"{key}: no weights at {folder} ({weights} is missing); copy or download the model again.")
    architecture = next(iter(config.get("architectures") or ["AutoModelForCausalLM"]))
    how = f'{architecture}.from_pretrained("{folder}").save_pretrained("NEW")'
    if weights == ADAPTER_WEIGHTS:
        how = f'AutoPeftModelForCausalLM.from_pretrained("{folder}").save_pretrained("NEW")'
    return UserError(
        f"{key}: {folder / pickle}: a pickle, which could run any program, and no {weights}; if you trust it, convert it "
        f"once in Python, by `from {'peft' if weights == ADAPTER_WEIGHTS else 'transformers'} import "
        f"{how.partition('.')[0]}` and `{how}`, and copy the tokenizer's files there."
    )


def _read_shards(index: Path, key: str) -> dict[str, StoredTensor]:
    shards = read_object(index, key).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{key}: {index}: weight_map: expected names of tensors and their files; copy the file again.")
    for shard in set(shards.values()):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{key}: {index}: {shown(shard)} is not the name of a safetensors file in this folder; correct the index."
            )
        if not os.path.lexists(index.with_name(shard)):
            raise UserError(f"{key}: {index.with_name(shard)}: missing, although {INDEX} names it; copy it too.")
    headers = {shard: read_header(index.with_name(shard), key) for shard in sorted(set(shards.values()))}
    for name, shard in shards.items():
        if name not in headers[shard]:
            raise UserError(f"{key}: {index}: {name} is not in {shard}; copy or download the model again.")
    return {name: headers[shard][name] for name, shard in shards.items()}
