"""The manifest `stage.json`: what a stage did, and whether a folder holds the same run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.base import StageRecipe
from align.config.stages import input_models, stage_of
from align.errors import OtherRun, UserError
from align.models.inspect_folder import inspect_inputs
from align.runs.checkpoint import DAMAGED, complete_checkpoints
from align.runs.files import digest, write_json
from align.runs.output_folder import claim
from align.runs.own_files import MANIFEST, RUN, delete, own, owned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("torch", "transformers", "trl", "deepspeed", "datasets", "peft", "accelerate")

# Keys that do not change the result: a run may be resumed, and a finished stage reused, with other values.
COSMETIC_KEYS = {
    "output_dir",
    "stage",
    "report_to",
    "project",
    "run_name",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "attn_implementation",
    "deepspeed",
    "value_deepspeed",
    "reference_deepspeed",
    "reward_deepspeed",
    "num_sample_rows",
    "skip_self_checks",
    "reward_timeout",
}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What two stages must have in common: vocabulary, special ids and chat template.

    The padding token is left out: padding is masked everywhere, and a reward model may need another one.
    """
    return {
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": digest(tokenizer.chat_template) if tokenizer.chat_template else None,
    }


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a finished stage in `folder`, or None for a model that `align` did not make.

    Raises:
        UserError: the folder holds a stage that was started and not finished.
    """
    manifest = Path(folder) / MANIFEST
    if manifest.is_file():
        loaded: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        return loaded
    if (Path(folder) / RUN).is_file():
        raise UserError(f"{folder}: the stage that writes this folder has not finished; run it again to resume it.")
    return None


def recipe_dict(recipe: StageRecipe) -> dict[str, Any]:
    """The recipe as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return plain


def _input_digests(recipe: StageRecipe) -> dict[str, str]:
    manifests = {name: read_manifest(path) for name, path in input_models(recipe).items()}
    return {name: digest(manifest) for name, manifest in manifests.items() if manifest}


def open_stage(recipe: StageRecipe) -> bool:
    """Claim `recipe.output_dir` for this run. True when the same stage is already finished there.

    The manifests of the models that the stage starts from are recorded: a stage does not count as finished once one
    of them has been trained again.

    Raises:
        UserError: the folder cannot be written, is in use, or holds something else, a run of another recipe or of older
            inputs; a model that the stage starts from cannot be used.
    """
    finished = is_finished(recipe)
    if not finished:
        inspect_inputs(recipe)
        if int(os.environ.get("RANK", "0")) == 0:
            claim(recipe.output_dir, _identity(recipe), resuming=bool(complete_checkpoints(recipe.output_dir)))
    return finished


def is_finished(recipe: StageRecipe) -> bool:
    """Whether `recipe.output_dir` holds the finished run of this recipe. Writes nothing.

    Raises:
        UserError: the folder holds a run of another recipe or of older inputs, or an input is not finished.
    """
    folder = Path(recipe.output_dir)
    finished = (folder / MANIFEST).is_file()
    if not finished and not (complete_checkpoints(folder) and (folder / RUN).is_file()):
        return False  # a run without a checkpoint loses nothing when it starts over
    found = json.loads((folder / (MANIFEST if finished else RUN)).read_text(encoding="utf-8"))
    if differing := differing_keys(found, _identity(recipe)):
        raise OtherRun(
            f"output_dir: {folder} holds {'a finished' if finished else 'an unfinished'} run that differs in "
            f"{', '.join(differing)}; delete the folder to start over, or set another output_dir."
        )
    return finished


def _identity(recipe: StageRecipe) -> dict[str, Any]:
    return {"stage": stage_of(recipe).name, "recipe": recipe_dict(recipe), "inputs": _input_digests(recipe)}


def differing_keys(found: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """Names of recipe keys and inputs in which two runs differ, cosmetic keys apart."""
    if found.get("stage") != mine["stage"]:
        return ["stage"]
    keys = sorted(
        key
        for key in {*found["recipe"], *mine["recipe"]} - COSMETIC_KEYS
        if found["recipe"].get(key) != mine["recipe"].get(key)
    )
    if found["inputs"] != mine["inputs"]:
        keys.append("the stage it starts from, which was run again since")
    return keys


def write_manifest(
    recipe: StageRecipe,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Any],
    results: Mapping[str, Any],
    **more: Any,
) -> None:
    """Write the manifest, the last thing that a stage does, and delete what only a resume needed.

    Args:
        data: fingerprints and counts of the rows, as `align.data.load` reports them.
        results: the stage's closing numbers.
        more: further entries for the next stage, such as the reward model's score mean and spread.
    """
    folder = Path(recipe.output_dir)
    for aside in folder.glob(f"{DAMAGED}checkpoint-*"):
        delete(aside)
    own(folder / MANIFEST)
    write_json(
        folder / MANIFEST,
        {
            **_identity(recipe),
            "seed": recipe.seed,
            "versions": {"align": _version("align"), **{package: _version(package) for package in PACKAGES}},
            "tokenizer": tokenizer_digest(tokenizer),
            "data": dict(data),
            "results": dict(results),
            **more,
            "files": sorted(owned(folder)),
        },
    )
    (folder / RUN).unlink(missing_ok=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_same_tokenizer(theirs: Mapping[str, Any], mine: Mapping[str, Any], key: str, path: str) -> None:
    """Check that two `tokenizer_digest`s are equal.

    Args:
        theirs: of the model in `path`, which the recipe's `key` names.
        mine: of the tokenizer that the stage uses.

    Raises:
        UserError: they differ; names what does.
    """
    differing = [name.replace("_", " ") for name in mine if theirs[name] != mine[name]]
    if differing:
        raise UserError(
            f"{key}: {path} was trained with another {' and '.join(differing)} than this recipe gives; "
            "use the same tokenizer files and chat_template_path as that stage."
        )


def check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, key: str, may_add_template: bool = True) -> None:
    """Check that a stage uses the tokenizer and chat template that the model in `path` was trained with.

    Args:
        may_add_template: whether the recipe may give a chat template to a model that was trained without one.

    Raises:
        UserError: its manifest has another one, or the stage that writes it has not finished.
    """
    if (manifest := read_manifest(path)) is None:
        return
    mine, theirs = tokenizer_digest(tokenizer), manifest["tokenizer"]
    if may_add_template and theirs["chat_template"] is None:
        theirs = {**theirs, "chat_template": mine["chat_template"]}
    check_same_tokenizer(theirs, mine, key, path)
