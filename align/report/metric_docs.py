"""Definition, unit and healthy range of each metric, read from `align/runs/metrics.md`."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from align import runs

SECTIONS = {
    "sft": "Supervised",
    "reward": "Reward",
    "classify": "Classifier",
    "token-classification": "Token classifier",
    "question-answering": "Question answering",
    "mlm": "Masked",
    "ppo": "PPO",
}


@dataclass(frozen=True, slots=True)
class MetricDoc:
    """One row of metrics.md."""

    definition: str
    unit: str
    healthy: str


@functools.cache
def _rows(stage: str) -> list[tuple[re.Pattern[str], MetricDoc]]:
    text = (Path(runs.__file__).parent / "metrics.md").read_text(encoding="utf-8")
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if not section.startswith(SECTIONS.get(stage, "-")):
            continue
        for names, *cells in re.findall(r"^\|(.*?)\|(.*?)\|(.*?)\|(.*)\|$", section, flags=re.MULTILINE):
            doc = MetricDoc(*(cell.strip() for cell in cells))
            for name in re.findall(r"`([^`]+)`", names):
                found.append((re.compile(re.sub("<[a-z]+>", ".+", re.escape(name))), doc))
    return found


def describe(stage: str, name: str) -> MetricDoc | None:
    """The documentation of a stage's metric; None if metrics.md does not have it."""
    return next((doc for pattern, doc in _rows(stage) if pattern.fullmatch(name)), None)
