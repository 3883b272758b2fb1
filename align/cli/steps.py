"""The numbered recipes of a folder, with the overrides that each of them takes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from align.cli.hostfile import read_hostfile
from align.config.base import StageRecipe
from align.config.load import load_recipe
from align.config.paths import expand, overlap
from align.config.read import read_yaml
from align.config.recipe import Recipe
from align.config.stages import STAGES, read_stage
from align.engine.batch_plan import batch_plan
from align.errors import UserError, nearest
from align.runs.output_folder import find_mark


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One numbered recipe: its path, stage, checked recipe, overrides, number of processes, and the nodes if not this one."""

    path: str
    stage: str
    recipe: Recipe
    overrides: list[str]
    processes: int
    hostfile: str | None = None

    @property
    def name(self) -> str:
        return Path(self.path).name


def read_steps(
    directory: str, num_gpus: int | None, overrides: Sequence[str], hostfile: str | None = None
) -> list[Step]:
    """The folder's recipes `N_name.yaml` by number, checked, each with those overrides whose key its stage has.

    Raises:
        UserError: no such folder or recipes, a wrong recipe or override, two recipes with one `output_dir`, an `output_dir`
            that holds something else.
    """
    directory = expand(directory, "align run")
    paths = numbered_recipes(directory)
    if hostfile is not None and num_gpus is not None:
        raise UserError("--hostfile: expected this or --num_gpus, got both; the hostfile has the GPUs of each node.")
    slots = sum(read_hostfile(hostfile).values()) if hostfile is not None else None
    stages = {path: read_stage(path) for path in paths}
    shared = {stage: known_overrides(stage, overrides, set(stages.values())) for stage in set(stages.values())}
    steps: list[Step] = []
    for path, stage in stages.items():
        recipe = load_recipe(stage, path, shared[stage])
        count = slots or processes(recipe, num_gpus)
        for other in steps:
            if problem := overlap(recipe.output_dir, other.recipe.output_dir):
                also = "is also" if problem == "is" else problem
                raise UserError(
                    f"{path}: output_dir: {recipe.output_dir} {also} the output_dir of {other.path}; give each recipe its own"
                )
        try:
            find_mark(recipe.output_dir)
            if isinstance(recipe, StageRecipe):
                batch_plan(recipe, count)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        steps.append(Step(path, stage, recipe, shared[stage], count, hostfile))
    return steps


def numbered_recipes(directory: str) -> list[str]:
    """Paths of `N_name.yaml` in a folder, by number.

    Raises:
        UserError: no such folder, no such recipes, or two with one number.
    """
    if Path(directory).is_file():
        stage = read_yaml(directory)[0].get("stage", "STAGE")
        raise UserError(
            f"{directory}: expected a folder of recipes, got a file; run one recipe by `align {stage} {directory}`."
        )
    if not Path(directory).is_dir():
        beside = Path(directory).parent
        known = [str(folder) for folder in beside.iterdir() if folder.is_dir()] if beside.is_dir() else []
        raise UserError(f"{directory}: no such folder of recipes{nearest(directory, known)}")
    numbered: dict[int, str] = {}
    for path in sorted(Path(directory).iterdir()):
        if match := re.fullmatch(r"(\d+)_.+\.ya?ml", path.name):
            number = int(match[1])
            if number in numbered:
                raise UserError(
                    f"{path}: {numbered[number]} has the number {number} too; give each recipe its own number."
                )
            numbered[number] = str(path)
    if not numbered:
        raise UserError(f"{directory}: expected recipes named like 1_sft.yaml, found none")
    return [numbered[number] for number in sorted(numbered)]


def known_overrides(stage: str, overrides: Sequence[str], stages: set[str]) -> list[str]:
    """The overrides, with their values, whose key `stage` has; one that no stage has is an error."""
    keys = {name: {field.name for field in dataclasses.fields(STAGES[name].recipe)} for name in stages}
    kept: list[str] = []
    keep = True
    for word in overrides:
        if word.startswith("--"):
            name = re.split(r"[=.]", word[2:])[0].replace("-", "_")
            keep = name in keys[stage]
            if not any(name in known for known in keys.values()):
                raise UserError(f"--{name}: no stage here has this key{nearest(name, set.union(*keys.values()))}")
        if keep:
            kept.append(word)
    return kept


def processes(recipe: Recipe, num_gpus: int | None) -> int:
    """Processes for a recipe: `num_gpus` if given; else one, or with a `deepspeed` key one per visible GPU."""
    if num_gpus is None and not getattr(recipe, "deepspeed", None):
        return 1
    import torch  # only here: a folder for one process starts at once

    gpus = torch.cuda.device_count()
    if num_gpus is not None and 0 < gpus < num_gpus:
        raise UserError(f"--num_gpus: expected at most the {gpus} visible GPUs, got {num_gpus}")
    return num_gpus or max(gpus, 1)
