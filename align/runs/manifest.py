"""The manifest `stage.json`: what a stage did, and whether a folder holds the same run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.base import StageRecipe
from align.data.chat_template import TODAY, template_kwargs, writes_date
from align.errors import UserError
from align.models.inspect_folder import inspect_inputs
from align.runs.checkpoint import DAMAGED, delete_checkpoint, has_progress
from align.runs.files import digest, write_json
from align.runs.output_folder import claim, clear_finished
from align.runs.own_files import MANIFEST, RUN, own, owned
from align.runs.records import package_version, read_record
from align.runs.run_record import identity, read_run, required_run, without_data
from align.runs.run_record import read_manifest as read_manifest
from align.runs.same_run import changes, check_same
from align.runs.schemas import MANIFEST_RECORD
from align.runs.whole import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGES = ("torch", "transformers", "trl", "deepspeed", "datasets", "peft", "accelerate")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What two stages must have in common: vocabulary, special ids and chat template.

    The padding token is left out: padding is masked everywhere, and a reward model may need another one.
    """
    return {
        "vocabulary": digest(sorted(tokenizer.get_vocab().items())),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "chat_template": digest(tokenizer.chat_template) if tokenizer.chat_template else None,
        "chat_template_kwargs": template_kwargs(tokenizer),
    }


def open_stage(recipe: StageRecipe) -> bool:
    """Claim `recipe.output_dir` for this run. True when the same stage is already finished there.

    Fingerprints of what the stage starts from are recorded: it does not count as finished once that has changed.

    Raises:
        UserError: the folder cannot be written, is in use, or holds something else, a run of another recipe or of older
            inputs; a model that the stage starts from cannot be used.
    """
    finished, is_main = is_finished(recipe), int(os.environ.get("RANK", "0")) == 0
    if finished and is_main:
        clear_finished(recipe.output_dir)
    if not finished:
        inspect_inputs(recipe)
        if is_main:
            claim(recipe.output_dir, identity(recipe), resuming=has_progress(recipe.output_dir))
    return finished


def is_finished(recipe: StageRecipe) -> bool:
    """Whether `recipe.output_dir` holds the finished run of this recipe. Writes nothing.

    Of a run that goes on, rows are compared once they are loaded, by `align.runs.run_record.check_rows`.

    Raises:
        UserError: the folder holds a run of another recipe or of inputs that have changed, its record is lost or damaged,
            an input is not finished, or a part of a finished run's result is missing.
    """
    folder = Path(recipe.output_dir)
    finished = os.path.lexists(folder / MANIFEST)
    found = read_record(folder / MANIFEST, MANIFEST_RECORD) if finished else required_run(recipe)
    if found is None or not (finished or has_progress(folder)):
        return False  # it loses nothing when it starts over
    mine = identity(recipe, found.get("sums"))
    if not finished:
        mine["inputs"] = without_data(mine["inputs"], recipe)
    which = "a finished" if finished else "an unfinished"
    check_same(changes(found, mine, recipe), recipe, f"{which} run that differs", "start over")
    if finished:
        check_whole(folder, found.get("files", []))
    return finished


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
        if aside.name in owned(folder):
            delete_checkpoint(aside)
    own(folder / MANIFEST)
    write_json(
        folder / MANIFEST,
        {
            **(read_run(recipe) or identity(recipe)),  # inputs as they were when the run began
            "seed": recipe.seed,
            "versions": {package: package_version(package) for package in ("align", *PACKAGES)},
            "tokenizer": tokenizer_digest(tokenizer),
            **({"chat_template_date": TODAY.isoformat()} if writes_date(tokenizer) else {}),
            "data": dict(data),
            "results": dict(results),
            **more,
            "files": sorted(owned(folder)),
        },
    )
    (folder / RUN).unlink(missing_ok=True)


def check_same_tokenizer(theirs: Mapping[str, Any], mine: Mapping[str, Any], key: str, path: str) -> None:
    """Check that two `tokenizer_digest`s are equal.

    Args:
        theirs: of the model in `path`, which the recipe's `key` names.
        mine: of the tokenizer that the stage uses.

    Raises:
        UserError: they differ; names what does.
    """
    theirs = {"chat_template_kwargs": {}, **theirs}  # manifests from before the key lack it
    differing = [name.replace("_", " ") for name in mine if theirs[name] != mine[name]]
    if differing:
        raise UserError(
            f"{key}: {path} was trained with another {' and '.join(differing)} than this recipe gives; "
            "use the same tokenizer files, chat_template_path and chat_template_kwargs as that stage."
        )


def check_template_kwargs(path: str, values: Mapping[str, Any], key: str) -> None:
    """Check that the model in `path` was trained with these `chat_template_kwargs`, if a stage has trained it.

    Raises:
        UserError: with others.
    """
    if (manifest := read_manifest(path)) is None:
        return
    theirs = manifest["tokenizer"].get("chat_template_kwargs", {})
    if theirs != values:
        raise UserError(
            f"chat_template_kwargs: {path} ({key}) was trained with {json.dumps(theirs)}, and this recipe gives "
            f"{json.dumps(values)}; give the same in all stages."
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
        theirs = {**theirs, **{name: mine[name] for name in ("chat_template", "chat_template_kwargs")}}
    check_same_tokenizer(theirs, mine, key, path)
