"""What each setting of `align evaluate` costs: training, as the stage that made the model recorded it, and tokens of a prompt."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from align.config.json_file import parse_json, read_file
from align.errors import BadFile
from align.evaluate.inputs import EvalSetting
from align.models.virtual_tokens import prompt_tuning_base
from align.runs.manifest import read_manifest
from align.runs.records import is_count, is_number
from align.runs.schemas import METRICS


def prompt_tokens(setting: EvalSetting) -> float:
    """Mean tokens of a prompt, with its examples and with virtual tokens."""
    virtual = found[1] if (found := prompt_tuning_base(setting.path)) else 0
    return virtual + sum(len(row.prompt_ids) for row in setting.rows) / len(setting.rows)


def training_costs(path: str) -> dict[str, Any]:
    """Costs of the stage that made the model in `path`, not of those before it; None for what is not recorded.

    Returns:
        `trained_parameters`; `training_seconds`, from the first to the last line of metrics, with evaluations and
        interruptions; `train_tokens`, with prompts and repeated over epochs.
    """
    manifest = read_manifest(path)
    lines = _metrics(Path(path) / METRICS) if manifest else []
    parameters = manifest["results"].get("trained_parameters") if manifest else None
    tokens = [line["train/num_tokens"] for line in lines if is_number(line.get("train/num_tokens"))]
    return {
        "trained_parameters": parameters if is_count(parameters) else None,
        "training_seconds": _seconds(lines),
        "train_tokens": int(tokens[-1]) if tokens else None,
    }


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; none if the file is gone or damaged, since nothing else depends on it."""
    try:
        lines = [parse_json(line, path) for line in read_file(path, follow_links=True).splitlines()]
    except BadFile:
        return []
    return lines if all(isinstance(line, dict) for line in lines) else []


def _seconds(lines: list[dict[str, Any]]) -> float | None:
    try:
        first, last = (datetime.fromisoformat(lines[index]["time"]) for index in (0, -1))
        return round((last - first).total_seconds(), 3)
    except (IndexError, KeyError, TypeError, ValueError):
        return None
