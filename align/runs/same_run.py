"""Whether two runs are the same: their recipes and the fingerprints of their inputs, compared key by key."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, get_origin, get_type_hints

from align.config.data_source import DataSource
from align.config.load import acceptable_keys
from align.config.paths import dataset_keys
from align.config.recipe import Recipe
from align.config.stages import stage_of
from align.errors import OtherRun
from align.runs.fingerprints import Inputs

# Keys that do not change the result: a run may be resumed, and a finished stage reused, with other values.
COSMETIC_KEYS = {
    "output_dir",
    "stage",
    "accept_changes",
    "report_to",
    "project",
    "run_name",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "per_device_generation_batch_size",
    "max_tokens_per_device",
    "gradient_checkpointing",
    "attn_implementation",
    "sequence_parallel_size",
    "tf32",
    "cuda_graphs",
    "deepspeed",
    "value_deepspeed",
    "reference_deepspeed",
    "reward_deepspeed",
    "num_sample_rows",
    "skip_self_checks",
    "reward_timeout",
}


@dataclasses.dataclass(frozen=True, slots=True)
class RunChange:
    """One difference between a recorded run and this one: the recipe's key and a description."""

    key: str
    description: str


def changes(found: Mapping[str, Any], mine: Mapping[str, Any], recipe: Recipe) -> list[RunChange]:
    """The differences between a recorded run and this one.

    Inputs are compared where both have a fingerprint of the same kind; a file that is gone since is no change.

    Args:
        found: a record, from `align.runs.run_record`.
        mine: the identity of this run.
    """
    if found["stage"] != mine["stage"]:
        return [RunChange("stage", "stage")]
    before, now = with_defaults(stage_of(recipe).recipe, found["recipe"]), mine["recipe"]
    keys = sorted({*before, *now} - COSMETIC_KEYS)
    different = [RunChange(key, key) for key in keys if before.get(key) != now.get(key)]
    seen = {change.key for change in different}
    return different + [change for change in input_changes(found, mine["inputs"], recipe) if change.key not in seen]


def input_changes(found: Mapping[str, Any], mine: Inputs, recipe: Recipe) -> list[RunChange]:
    """The differences between the inputs of a recorded run and these."""
    different: list[tuple[str, RunChange]] = []
    for place, kinds in mine.items():
        key = re.split(r"[\[.]", place)[0]
        then = found["inputs"].get(place, {})
        if isinstance(then, str):  # schema 0 had the digests of manifests alone
            then = {"manifest": then}
        if "manifest" in kinds and kinds["manifest"] != then.get("manifest"):
            description = f"the stage it starts from, which was run again since ({place})"
            different.append(("manifest", RunChange(key, description)))
            continue
        for kind, value in kinds.items():
            if kind in then and then[kind] != value:
                description = f"{place} ({_describe_change(kind, then[kind], value, _source_name(recipe, place))})"
                different.append((kind, RunChange(key, description)))
    if any(kind == "rows" for kind, _ in different):  # which explain why other rows are used
        different = [(kind, change) for kind, change in different if kind != "used"]
    return [change for _, change in different]


def _describe_change(kind: str, then: Any, now: Any, source: str) -> str:
    if kind == "files":
        gone, new = [name for name in then if name not in now], [name for name in now if name not in then]
        if gone or new:
            return f"{gone[0]} is gone" if gone else f"{new[0]} is new"
        name = next(name for name in now if now[name] != then[name])
        return f"{name} has other content: SHA-256 {then[name][:12]} then, {now[name][:12]} now"
    descriptions = {
        "rows": f"{source} has other rows: fingerprint",
        "used": "other rows are used of the same sources: fingerprint",
        "revision": "another commit of the hub's model:",
        "settings": "other settings that change the result: fingerprint",
    }
    return f"{descriptions[kind]} {then[:12]} then, {now[:12]} now"


def _source_name(recipe: Recipe, place: str) -> str:
    """The path or generator of a data source, by its place in the recipe."""
    if (match := re.fullmatch(r"(\w+)\[(\d+)\]", place)) is None:
        return place
    source = getattr(recipe, match[1])[int(match[2])]
    return str(source.path or source.generator) if isinstance(source, DataSource) else place


def check_same(
    different: list[RunChange], recipe: Recipe, holds: str, again: str, never: Collection[str] = ()
) -> list[str]:
    """Refuse changes that the recipe does not accept; returns those that it does, in words.

    Args:
        holds: what the output folder holds, with the verb: `an unfinished run that differs`.
        again: what deleting the folder is for.
        never: keys whose changes no recipe can accept.

    Raises:
        OtherRun: names them, and the key that accepts them if one does.
    """
    known = [key for key in acceptable_keys(stage_of(recipe)) if key not in never]
    accepted = [change for change in different if change.key in known and change.key in recipe.accept_changes]
    refused = [change for change in different if change not in accepted]
    if not refused:
        return [change.description for change in accepted]
    keys = list(dict.fromkeys(change.key for change in refused))
    accept = ""
    if all(key in known for key in keys):
        accept = f" If the change is meant, add `accept_changes: [{', '.join([*recipe.accept_changes, *keys])}]`."
    raise OtherRun(
        f"output_dir: {recipe.output_dir} holds {holds} in {', '.join(change.description for change in refused)}; delete the "
        f"folder to {again}, or set another output_dir.{accept}"
    )


def with_defaults(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recorded recipe or data source, with those that did not exist yet at their value of before."""
    filled = dict(values)
    for each in dataclasses.fields(cls):
        if each.name not in filled and "before" in each.metadata:
            before = each.metadata["before"]
            filled[each.name] = json.loads(json.dumps(before(values) if callable(before) else before))
    for name, annotation in get_type_hints(cls).items():
        if get_origin(annotation) is list and not isinstance(value := filled[name], list):
            # The key took one when the run began, and takes several now.
            filled[name] = [] if value is None else [value]
    for name in dataset_keys(cls):
        sources = filled[name]
        if isinstance(sources, list):
            filled[name] = [with_defaults(DataSource, each) if isinstance(each, dict) else each for each in sources]
    return filled
