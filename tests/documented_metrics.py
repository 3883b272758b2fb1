"""The names in `align/runs/metrics.md`, with which the tests compare what runs log."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import align

METRICS = Path(align.__file__).parent / "runs" / "metrics.md"


def documented_metrics() -> set[str]:
    """Names in `metrics.md`; `<source>`, `<task>` and `<metric>` in a name stand for any text."""
    rows = re.findall(r"^\|([^|]*)\|", METRICS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of `names` that `metrics.md` does not explain."""
    patterns = [re.sub("<[a-z]+>", ".+", re.escape(name)) for name in documented_metrics()]
    return [name for name in names if not re.fullmatch("|".join(patterns), name)]
