"""The file that `align verify --json FILE` writes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from align.config.json_file import read_json
from align.config.paths import expand_output
from align.errors import BadFile, UserError
from align.runs.files import write_json


def json_report_path(json_path: str | None) -> str | None:
    """The value of `--json`: an expanded and checked path, "-" for standard output, or None.

    Raises:
        UserError: the file there is no earlier report.
    """
    if json_path in (None, "-"):
        return json_path
    path = expand_output(str(json_path), "--json")
    check_json_report(Path(path))
    return path


def write_json_report(report: dict[str, Any], path: str | None) -> bool:
    """Write a report to the result of `json_report_path`; returns whether standard output is free for a table."""
    if path == "-":
        print(json.dumps(report, indent=2))
    elif path is not None:
        write_json(Path(path), report)
    return path != "-"


def check_json_report(path: Path) -> None:
    """Check that a report can be written: nothing is there, or an earlier report.

    Raises:
        UserError: something else is there.
    """
    if not os.path.lexists(path):
        return
    with contextlib.suppress(BadFile):
        found = read_json(path, follow_links=False)
        if isinstance(found, dict) and {"passed", "seconds", "cases"} <= found.keys():
            return
    raise UserError(
        f"--json: {path} exists and is not a report of this command, so it is not overwritten; name another file."
    )
