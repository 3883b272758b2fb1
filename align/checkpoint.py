"""What a stage leaves behind, and what it needs to go on after being killed.

An output folder holds, once the stage is finished, a plain Hugging Face model folder plus `stage.json`, the
manifest that the next stage reads. While the stage runs it holds `run.json` (the recipe it was started
with) and `checkpoint-N` folders, each of which counts only once `complete.json` lies in it. Everything
here is written under another name first and renamed, so a file or folder is whole or absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config import StageRecipe, UserError
from align.integrity import difference, fingerprints, sync, sync_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "stage.json"
RUN = "run.json"
COMPLETE = "complete.json"
DAMAGED = "damaged-"  # before the name of a checkpoint that was set aside
PACKAGES = ("torch", "transformers", "trl", "deepspeed", "datasets", "peft", "accelerate")

# Keys that do not change the result: a run may be resumed, and a finished stage reused, whatever they say.
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
}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path`, replacing what was there, once the block ends well."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if path.exists():
        retired = path.with_name(f".{path.name}.retired")
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(path, retired)
        os.replace(temporary, path)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.replace(temporary, path)


def digest(value: Any) -> str:
    """Short SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What two stages must agree on: vocabulary, special ids and chat template.

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


def _input_digests(inputs: Mapping[str, str | None]) -> dict[str, str]:
    manifests = {name: read_manifest(path) for name, path in inputs.items() if path}
    return {name: digest(manifest) for name, manifest in manifests.items() if manifest}


def open_stage(recipe: StageRecipe, stage: str, inputs: Mapping[str, str | None]) -> bool:
    """Claim `recipe.output_dir` for this run. True when the same stage is already finished there.

    Args:
        inputs: models the stage starts from, by recipe key; a manifest among them is remembered, so that a
            stage whose input has since been made anew is not taken for finished.

    Raises:
        UserError: the folder cannot be written, or holds a run of another recipe or of older inputs.
    """
    folder = Path(recipe.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: cannot write to {folder} ({error.strerror}); choose another folder.") from error
    finished = is_finished(recipe, stage, inputs)
    if not finished and not complete_checkpoints(folder) and int(os.environ.get("RANK", "0")) == 0:
        write_json(folder / RUN, _identity(recipe, stage, inputs))
    return finished


def is_finished(recipe: StageRecipe, stage: str, inputs: Mapping[str, str | None]) -> bool:
    """Whether `recipe.output_dir` holds this very stage, finished. Writes nothing; arguments as for `open_stage`.

    Raises:
        UserError: the folder holds a run of another recipe or of older inputs, or an input is not finished.
    """
    folder = Path(recipe.output_dir)
    finished = (folder / MANIFEST).is_file()
    if not finished and not (complete_checkpoints(folder) and (folder / RUN).is_file()):
        return False  # a run that has saved nothing yet has nothing to lose by another recipe
    found = json.loads((folder / (MANIFEST if finished else RUN)).read_text(encoding="utf-8"))
    if differing := differing_keys(found, _identity(recipe, stage, inputs)):
        raise UserError(
            f"output_dir: {folder} holds {'a finished' if finished else 'an unfinished'} run that differs in "
            f"{', '.join(differing)}; delete the folder to start anew, or choose another output_dir."
        )
    return finished


def _identity(recipe: StageRecipe, stage: str, inputs: Mapping[str, str | None]) -> dict[str, Any]:
    return {"stage": stage, "recipe": recipe_dict(recipe), "inputs": _input_digests(inputs)}


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


def finish_stage(
    recipe: StageRecipe,
    stage: str,
    inputs: Mapping[str, str | None],
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Any],
    results: Mapping[str, Any],
    **more: Any,
) -> None:
    """Write the manifest, the last thing that a stage does, and drop what only a resume needed.

    Args:
        data: fingerprints and counts of the rows, as `align.data` reports them.
        results: the stage's closing numbers.
        more: further entries for the next stage, such as the reward model's score mean and spread.
    """
    folder = Path(recipe.output_dir)
    write_json(
        folder / MANIFEST,
        {
            "stage": stage,
            "recipe": recipe_dict(recipe),
            "inputs": _input_digests(inputs),
            "seed": recipe.seed,
            "versions": {"align": _version("align"), **{package: _version(package) for package in PACKAGES}},
            "tokenizer": tokenizer_digest(tokenizer),
            "data": dict(data),
            "results": dict(results),
            **more,
        },
    )
    (folder / RUN).unlink(missing_ok=True)
    for aside in folder.glob(f"{DAMAGED}checkpoint-*"):
        shutil.rmtree(aside, ignore_errors=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def mark_complete(checkpoint: Path, state: Mapping[str, Any], save_total_limit: int) -> None:
    """Declare a checkpoint whole, then delete the oldest ones beyond `save_total_limit`. For rank 0, after all have written.

    `complete.json` appears once every file is on the disk. It holds `state`, the size and CRC-32 of each file, and how
    long the run's records (`*.jsonl` in the output folder) were.
    """
    output = checkpoint.parent
    records = list(output.glob("*.jsonl"))
    sync_tree(checkpoint)
    for record in records:
        sync(record)
    lengths = {record.name: record.stat().st_size for record in records}
    told = {**state, "records": lengths, "files": fingerprints(checkpoint)}
    told = json.loads(json.dumps(told, default=str))  # as it will be read back
    write_json(checkpoint / COMPLETE, {**told, "digest": digest(told)})
    sync(checkpoint)
    sync(output)
    rotate(output, save_total_limit)


def rotate(output_dir: str | Path, save_total_limit: int) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, apart from the one that the newest names as the best."""
    found = complete_checkpoints(output_dir)
    best = read_state(found[-1]).get("best_checkpoint") if found else None
    for old in [checkpoint for checkpoint in found[:-save_total_limit] if checkpoint.name != best]:
        (old / COMPLETE).unlink()  # first, so that a half-deleted folder is never taken for a checkpoint
        shutil.rmtree(old, ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that was declared whole; None when all of it reads as it was written."""
    try:
        told = read_state(checkpoint)
        if told.pop("digest", None) != digest(told):
            return f"{COMPLETE} is not as it was written"
        return difference(checkpoint, told["files"])
    except ValueError:  # neither JSON nor UTF-8
        return f"{COMPLETE} cannot be read"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints in `output_dir` that were declared whole, oldest first."""
    found = [folder for folder in Path(output_dir).glob("checkpoint-*") if (folder / COMPLETE).is_file()]
    return sorted(found, key=lambda folder: int(folder.name.rsplit("-", 1)[1]))


def set_aside(checkpoint: Path) -> Path:
    """Take a damaged checkpoint out of the way; it is kept until the stage has finished. Returns its new place."""
    aside = checkpoint.with_name(f"{DAMAGED}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def clear_partial(output_dir: str | Path) -> None:
    """Delete what a killed run left half written."""
    for folder in Path(output_dir).glob("checkpoint-*"):
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)
    for folder in Path(output_dir).glob(".*.partial"):
        shutil.rmtree(folder, ignore_errors=True)


def cut_records(checkpoint: Path) -> None:
    """Shorten the run's records to what they were at a checkpoint: what came later is done again."""
    for name, size in read_state(checkpoint)["records"].items():
        path = checkpoint.parent / name
        if path.is_file() and path.stat().st_size > size:
            os.truncate(path, size)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `mark_complete` was given, and what it added."""
    state: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return state
