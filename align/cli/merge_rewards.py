"""`align merge MODEL MODEL ... --output FOLDER`: the mean of the weights of reward models with one start (WARM, arXiv 2401.12187)."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from align.cli.merge import new_folder
from align.cli.merge_folders import reward_manifests
from align.config.paths import expand, expand_output
from align.errors import UserError
from align.models.inspect_folder import (
    CONFIG,
    INDEX,
    OTHER_FILES,
    TEXT_FILES,
    ModelFolder,
    inspect_folder,
)
from align.models.small_files import JSON_FILES
from align.runs.files import digest, write_json, write_text
from align.runs.own_files import MANIFEST
from align.runs.quiet import quiet
from align.runs.records import SCHEMA_VERSION
from reward_models.heads import score_sequences
from reward_models.load import load_reward_model

OWN = {"score_mean", "score_std"}  # of a configuration: each model's own
REMEDY = "merge reward models that were trained from one model, head included"


def run(paths: Sequence[str], output: str) -> str:
    """Write the mean as a reward model's folder; returns a message.

    The zero and the spread of its score are the means of theirs. k copies of a model give its very weights.

    Raises:
        UserError: fewer than two models, one that is no finished output of the reward stage, models that did not start from
            the same one, or an output folder that exists.
    """
    quiet()
    paths, output = [expand(path, "align merge") for path in paths], expand_output(output, "--output")
    manifests = reward_manifests(paths, output)
    folders = [inspect_folder(path, "align merge") for path in paths]
    models = [folder for folder in folders if folder is not None]
    for path, manifest, model in zip(paths[1:], manifests[1:], models[1:], strict=True):
        if difference := _start_difference(manifests[0], manifest) or _model_difference(models[0], model):
            raise UserError(f"align merge: {path} and {paths[0]} have {difference}; {REMEDY}.")
    with new_folder(Path(output)) as fresh:
        _write_weights(models, fresh)
        scale = {name: statistics.mean(float(each.get(name, 0.0)) for each in manifests) for name in sorted(OWN)}
        write_json(fresh / CONFIG, {**models[0].config, **scale})
        for name in (*JSON_FILES, *TEXT_FILES, *OTHER_FILES):
            if (source := Path(paths[0]) / name).is_file():
                shutil.copyfile(source, fresh / name)
        write_text(fresh / "README.md", f"# A reward model\n\nThe mean of the weights of {json.dumps(paths)}.\n")
        write_json(fresh / MANIFEST, _merged_manifest(paths, manifests, scale, fresh))
    return f"the mean of {', '.join(paths)}: {output}"


def _start_difference(one: dict[str, Any], two: dict[str, Any]) -> str | None:
    """How the starting points of two models differ, from their manifests; None if they do not."""
    (base, _), (other, _) = starts = [_start(one), _start(two)]
    if base != other:
        names = [each["recipe"].get("model_name_or_path") for each in (one, two)]
        return f"other base models ({names[1]} and {names[0]})"
    if starts[0] != starts[1]:
        return f"heads that started apart ({starts[1][1]} and {starts[0][1]})"
    if one["tokenizer"] != two["tokenizer"]:
        return "other tokenizers or chat templates"
    if one["recipe"].get("score_reasoning", False) != two["recipe"].get("score_reasoning", False):
        return "other values of score_reasoning"
    return None


def _start(manifest: dict[str, Any]) -> tuple[Any, str]:
    """The base model (its files' fingerprints if recorded) and the origin of the head (a new one depends on the seed)."""
    recipe, head = manifest["recipe"], str(manifest.get("head"))
    base = manifest["inputs"].get("model_name_or_path") or recipe.get("model_name_or_path")
    return base, f"{head}, seed {manifest.get('seed', recipe.get('seed'))}" if head == "new" else head


def _model_difference(one: ModelFolder, two: ModelFolder) -> str | None:
    """How two models differ other than in the values of their weights; None if they do not."""
    configs = [{name: value for name, value in each.config.items() if name not in OWN} for each in (one, two)]
    for name in sorted({*configs[0], *configs[1]}):
        if configs[0].get(name) != configs[1].get(name):
            return f"other architectures ({CONFIG}: {name})"
    kinds = [{name: (each.dtype, each.shape) for name, each in model.tensors.items()} for model in (one, two)]
    return None if kinds[0] == kinds[1] else "other weights by name, size or data type"


def _write_weights(models: Sequence[ModelFolder], folder: Path) -> None:
    """Write the mean of each tensor into the files of the first model, one file in memory at a time."""
    for file in sorted({tensor.file for tensor in models[0].tensors.values()}):
        names = [name for name, tensor in models[0].tensors.items() if tensor.file == file]
        save_file({name: _mean(name, models) for name in names}, folder / file, metadata={"format": "pt"})
    if (index := Path(models[0].path) / INDEX).is_file():
        shutil.copyfile(index, folder / INDEX)


def _mean(name: str, models: Sequence[ModelFolder]) -> torch.Tensor:
    """The mean of a tensor in its own data type; summed in float64, so that copies give the very values."""
    tensors: list[torch.Tensor] = []
    for model in models:
        with safe_open(Path(model.path) / model.tensors[name].file, "pt") as file:
            tensors.append(file.get_tensor(name))
    if not tensors[0].is_floating_point():
        if any(not torch.equal(tensors[0], each) for each in tensors):
            raise UserError(f"align merge: {name} holds whole numbers that differ between the models; {REMEDY}.")
        return tensors[0]
    return torch.stack(tensors).double().mean(dim=0).to(tensors[0].dtype)


def _merged_manifest(
    paths: Sequence[str], manifests: Sequence[dict[str, Any]], scale: dict[str, float], folder: Path
) -> dict[str, Any]:
    """The manifest for later stages: the keys on which all recipes agree, and scores of the merged model for its self-check."""
    first = manifests[0]
    model = load_reward_model(str(folder))
    ids = first["score_check"]["ids"]
    with torch.no_grad():
        scores = [
            float(score_sequences(model, torch.tensor([each]), torch.ones(1, len(each), dtype=torch.bool)))
            for each in ids
        ]
    shared = {
        name: value
        for name, value in first["recipe"].items()
        if name != "output_dir" and all(name in each["recipe"] and each["recipe"][name] == value for each in manifests)
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "stage": "reward",
        "recipe": shared,
        "inputs": {name: first["inputs"][name] for name in ("model_name_or_path",) if name in first["inputs"]},
        "merged": {path: digest(each) for path, each in zip(paths, manifests, strict=True)},
        "tokenizer": first["tokenizer"],
        "results": {"table": []},
        **scale,
        "score_check": {"ids": ids, "scores": scores},
        "head": first.get("head", "new"),
        "files": sorted({*(each.name for each in folder.iterdir()), MANIFEST}),
    }
