"""The one reader of DeepSpeed's JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.config.convert import kind
from align.errors import UserError


def read_deepspeed_file(path: str, where: str = "deepspeed") -> dict[str, Any]:
    """The contents of a DeepSpeed configuration file.

    Args:
        where: the recipe key that names the file, for errors.

    Raises:
        UserError: no such file, it is not a JSON object, or it enables fp16.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{where}: cannot read {path} ({error.strerror}); see recipes/deepspeed for ready ones."
        ) from None
    except ValueError as error:
        raise UserError(f"{where}: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: expected a JSON object in {path}, got {kind(config)}")
    if config.get("fp16", {}).get("enabled", False) not in (False, "auto"):
        raise UserError(f"{where}: {path} switches fp16 on, which is not supported; leave it out and use `bf16: true`.")
    return config


def zero_stage_of(path: str | None) -> int:
    """The ZeRO stage that a DeepSpeed file sets; 0 without a file."""
    if path is None:
        return 0
    return int(read_deepspeed_file(path).get("zero_optimization", {}).get("stage", 0))
