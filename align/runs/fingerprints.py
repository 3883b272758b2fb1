"""Fingerprints of what a run starts from: files by SHA-256, reward functions with the modules they import, DeepSpeed settings.

A file is read again only when its inode, size or times have changed since its sum was recorded: 0.7 s per GB and core the
first time (the model is read then anyway), nothing later.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, TypeAlias

from align.config.base import DEEPSPEED_KEYS, FUNCTION_KEYS, StageRecipe
from align.config.deepspeed_file import read_deepspeed_file
from align.config.paths import dataset_keys
from align.config.recipe import Recipe
from align.config.text_file import read_json
from align.errors import UserError
from align.runs.files import digest
from align.runs.schemas import RECORD_FILES

Inputs: TypeAlias = dict[str, dict[str, Any]]  # by place in the recipe: kind of fingerprint to text, or to sums by file

MODEL_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt", ".tiktoken", ".jinja", ".py"}
NOT_OF_THE_MODEL = {*RECORD_FILES, "training_args.bin"}
# A file changed twice within the resolution of its times looks unchanged: sums of files younger than this are not kept.
SETTLED_SECONDS = 2.0
# Settings of a DeepSpeed file that change where tensors lie and what is printed, not the result, and those that this package
# sets itself.
NEUTRAL_DEEPSPEED_KEYS = {
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "activation_checkpointing",
    "aio",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "csv_monitor",
    "wandb",
}


@dataclass
class FileSums:
    """SHA-256 of files. `known` is JSON-able: absolute path to [inode, size, mtime, ctime in ns, sum]."""

    known: dict[str, list[Any]] = field(default_factory=dict)

    def of(self, files: Mapping[str, Path]) -> dict[str, str]:
        """The sum of each file, by its name here.

        Raises:
            UserError: a file cannot be read.
        """
        with ThreadPoolExecutor() as pool:  # reading and hashing release the GIL
            return dict(zip(files, pool.map(self._sum, files.values()), strict=True))

    def _sum(self, path: Path) -> str:
        place = os.path.realpath(path)
        try:
            with open(place, "rb") as file:
                found = os.fstat(file.fileno())
                state = [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
                if (known := self.known.get(place)) and known[:4] == state:
                    return str(known[4])
                hashed = hashlib.sha256()
                while block := file.read(1 << 20):
                    hashed.update(block)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self.known.pop(place, None)
        if time.time_ns() - max(state[2:]) > SETTLED_SECONDS * 1e9:
            self.known[place] = [*state, hashed.hexdigest()]
        return hashed.hexdigest()


def input_fingerprints(recipe: Recipe, models: Mapping[str, str], sums: FileSums) -> Inputs:
    """Fingerprints of the files that a recipe names, by place in the recipe. What does not exist here is left out.

    Args:
        models: paths of the models that it starts from, by place.

    Raises:
        UserError: a file cannot be read.
    """
    inputs: Inputs = {}
    for place, path in models.items():
        inputs[place] = model_fingerprint(path, sums)
    for key in dataset_keys(type(recipe)):
        for index, source in enumerate(getattr(recipe, key)):
            place = f"{key}[{index}]"
            if source.generator is not None:
                inputs[place] = {"files": sums.of(module_files(source.generator.partition(":")[0]))}
            elif files := _matching(str(source.path)):
                inputs[place] = {"files": sums.of(files)}
    for key in (*FUNCTION_KEYS, "grader"):
        for place, name in _entries(recipe, key):
            inputs[place] = {"files": sums.of(module_files(name.partition(":")[0]))}
    for key in ("chat_template_path", "metrics", "eval_metrics"):
        for place, name in _entries(recipe, key):
            if Path(name).is_file():
                inputs[place] = {"files": sums.of({name: Path(name)})}
    if isinstance(recipe, StageRecipe):
        for key in DEEPSPEED_KEYS:
            if key == "deepspeed" or getattr(recipe, key, None):
                inputs[key] = {"settings": _deepspeed_settings(getattr(recipe, key))}
    return {place: kinds for place, kinds in inputs.items() if any(kinds.values())}


def model_fingerprint(path: str, sums: FileSums) -> dict[str, Any]:
    """Of the model in a folder its files, of one on the hub its commit, by kind; empty where it is unknown.

    Raises:
        UserError: a file cannot be read.
    """
    if files := model_files(path):
        return {"files": sums.of(files)}
    revision = _hub_revision(path)
    return {"revision": revision} if revision else {}


def same_weights(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two models have the same weights by their fingerprints: files of the same content, or one commit."""
    if "files" in one and "files" in two:
        mine, theirs = (
            sorted(value for name, value in each["files"].items() if name.endswith(".safetensors"))
            for each in (one, two)
        )
        return bool(mine) and mine == theirs
    return "revision" in one and one["revision"] == two.get("revision")


def row_fingerprints(report: Mapping[str, Any]) -> Inputs:
    """Fingerprints of the rows in a report of `align.data.load`: of each source, and of all rows as they are used."""
    keys = {"training": "train_dataset", "evaluation": "eval_dataset", "retention": "retention"}
    inputs: Inputs = {}
    for source in report.get("sources", []):
        key = keys[source["used_for"]]
        number = sum(place.startswith(f"{key}[") for place in inputs)
        inputs[f"{key}[{number}]"] = {"rows": source["fingerprint"]}
    for use, key in (("train", "train_dataset"), ("evaluation", "eval_dataset")):
        if use in report.get("fingerprints", {}):
            inputs[key] = {"used": report["fingerprints"][use]}
    for place, kinds in row_fingerprints(report["ptx"]).items() if report.get("ptx") else ():
        if place.startswith("train_dataset"):
            inputs[place.replace("train_dataset", "ptx_dataset")] = kinds
    return inputs


def model_files(path: str) -> dict[str, Path]:
    """Configuration, tokenizer and weights of the model in a folder, of an adapter also those of its base."""
    files: dict[str, Path] = {}
    prefix, seen = "", set()
    while Path(path).is_dir() and os.path.realpath(path) not in seen:
        seen.add(os.path.realpath(path))
        found = {
            each.name: each
            for each in sorted(Path(path).iterdir())
            if each.suffix in MODEL_SUFFIXES and each.name not in NOT_OF_THE_MODEL and each.is_file()
        }
        files |= {f"{prefix}{name}": file for name, file in found.items()}
        if "config.json" in found or "adapter_config.json" not in found:
            break
        path = str(read_json(found["adapter_config.json"]).get("base_model_name_or_path"))
        prefix = f"{path}/"
    return files


def module_files(module: str) -> dict[str, Path]:
    """The file of a module and of the modules that it imports from the same folder, by path there.

    Of an installed package, only its own modules count. Modules that are computed, and files that functions read, are not found.
    """
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module that was made rather than imported
        spec = None
    if spec is None:
        return {}
    place = next(iter(spec.submodule_search_locations or ()), spec.origin if spec.has_location else None)
    if place is None:  # compiled into Python
        return {}
    root = Path(place).parent
    installed = str(root) in {*sysconfig.get_paths().values()}
    files: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        for part in _with_packages(name):
            path = next((p for p in _places_of(root, part) if p.is_file()), None)
            if path is not None and path.relative_to(root).as_posix() not in files:
                files[path.relative_to(root).as_posix()] = path
                imported = _imports(path, part)
                pending += [each for each in imported if not installed or each.partition(".")[0] == top]
    return dict(sorted(files.items()))


def _places_of(root: Path, module: str) -> tuple[Path, Path]:
    return root.joinpath(*module.split("."), "__init__.py"), root.joinpath(*module.split(".")).with_suffix(".py")


def _with_packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _imports(path: Path, module: str) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it; each may be a module or something inside one."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # importing it says more
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)


def _matching(pattern: str) -> dict[str, Path]:
    paths = sorted(glob(pattern, recursive=True)) or [pattern]
    return {path: Path(path) for path in paths if Path(path).is_file()}


def _entries(recipe: Recipe, key: str) -> Iterable[tuple[str, str]]:
    """The texts under a key, by their place."""
    value = getattr(recipe, key, None)
    if isinstance(value, list):
        return [(f"{key}[{index}]", each) for index, each in enumerate(value)]
    return [(key, value)] if value else []


def _deepspeed_settings(path: str | None) -> str:
    config = read_deepspeed_file(path) if path else {}
    settings = {name: value for name, value in config.items() if name not in NEUTRAL_DEEPSPEED_KEYS}
    settings["bf16"] = {**config.get("bf16", {}), "enabled": None}  # the recipe's
    return digest(settings)


def _hub_revision(path: str) -> str | None:
    """The commit of a model of the hub in the local cache, where it has been fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    reference = Path(HF_HUB_CACHE, f"models--{path.replace('/', '--')}", "refs", "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
