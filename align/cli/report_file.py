"""The file that `align verify --json FILE` writes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from align.config.json_file import read_json
from align.errors import BadFile, UserError


def check_report(path: Path) -> None:
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
        f"--json: {path} exists and is no report of this command, so it is not overwritten; name another file."
    )
