"""The hostfile of `align run --hostfile`: the nodes of a run, in the format of the `deepspeed` launcher."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from align.errors import UserError

TOOLS = ("ssh", "pdsh")  # with which the launcher reaches the nodes


def read_hostfile(path: str) -> dict[str, int]:
    """The processes of each node, one per GPU, from lines of `HOST slots=GPUS`; empty lines and `#` comments are ignored.

    Raises:
        UserError: no such file, a line of another form, a node named twice, or a tool that reaches the nodes is missing.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile: cannot read {path} ({error}); name a text file.") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9][0-9]{0,3})(\s*#.*)?", line)
        if match is None:
            raise UserError(f"{path}:{number}: expected `HOST slots=GPUS`, got {line!r}")
        if match[1] in slots:
            raise UserError(f"{path}:{number}: {match[1]} is also in an earlier line; give each node one line.")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"{path}: expected lines of `HOST slots=GPUS`, found none")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise UserError(
            f"--hostfile: {' and '.join(missing)} not found; the launcher reaches the nodes by ssh and pdsh."
        )
    return slots
