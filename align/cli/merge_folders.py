"""The folders that `align merge` is given, checked before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config.paths import overlap
from align.errors import UserError
from align.runs.manifest import read_manifest
from align.runs.own_files import MANIFEST


def adapter_folder(adapter: str, output: str) -> Path:
    """The folder of an adapter, which may lie in a stage's output.

    Raises:
        UserError: there is none, or the output exists or lies in it.
    """
    folder = Path(adapter) / "adapter" if (Path(adapter) / "adapter").is_dir() else Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{adapter}: no adapter (adapter_config.json is missing); name the folder of an adapter.")
    if os.path.lexists(output):
        raise UserError(f"{output}: exists already; name a new folder.")
    if overlap(output, str(folder)):
        raise UserError(f"{output}: lies in the folder of the adapter; name a new folder elsewhere.")
    return folder


def reward_manifests(paths: Sequence[str], output: str) -> list[dict[str, Any]]:
    """The manifests of reward models to average.

    Raises:
        UserError: fewer than two models, one that is no finished output of the reward stage, or an output that exists or
            overlaps with one.
    """
    if len(paths) < 2:
        raise UserError("align merge: expected two reward models or more before --output, got one.")
    if os.path.lexists(output):
        raise UserError(f"{output}: exists already; name a new folder.")
    for path in paths:
        if problem := overlap(output, path):
            raise UserError(f"{output}: {problem} {path}; name a new folder elsewhere.")
    return [_manifest(path) for path in paths]


def _manifest(path: str) -> dict[str, Any]:
    manifest = read_manifest(path) if Path(path).is_dir() else None
    if manifest is None or manifest["stage"] != "reward" or "score_check" not in manifest:
        raise UserError(
            f"align merge: {path}: expected the output of the reward stage, whose {MANIFEST} says where it started."
        )
    return manifest
