"""Read the runs in a folder, finished or not. Their files are checked, since anything may have written to them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from align.best_of_n.results import RESULTS_RECORD as BEST_OF_N
from align.config.ensemble import JUDGE, NUMBERED, ensemble_members
from align.config.json_file import parse_json, read_file, read_json
from align.config.stages import STAGES
from align.errors import BadFile, UserError
from align.evaluate.results import RESULTS_RECORD as EVALUATION
from align.judge.results import RESULTS_RECORD as CARD
from align.runs.output_folder import RESULTS
from align.runs.own_files import MANIFEST, RUN
from align.runs.records import Record, is_count, is_number, read_record
from align.runs.schemas import IDENTITY, MANIFEST_RECORD, METRICS, SAMPLES

ERRORS = "confident_errors.jsonl"
EVALUATIONS = {"evaluate": EVALUATION, "judge-reward": CARD, "bon": BEST_OF_N}  # schema of results.json by stage
# The schema of run.json and of an unknown stage's results.json.
OTHER_RECORD = Record(IDENTITY, MANIFEST_RECORD.optional)
MAX_BYTES = 256 << 20  # of metrics.jsonl and samples.jsonl
MAX_VALUE = 1e100  # of a metric; larger ones, whose differences may overflow, are left out
MAX_RUNS = 60  # in one report

Point = tuple[float, float]  # step, value


@dataclass(frozen=True)
class Run:
    """One run, read from its output folder.

    Attributes:
        record: `stage.json`, or `run.json` of an unfinished run, or `results.json` of an evaluation.
        lines: of `metrics.jsonl`, each a mapping with `step`, `time` and numbers or None by metric.
        samples: lines of `samples.jsonl`.
        cards: contents of other `results.json` in the folder and its subfolders, by relative path: report cards, best-of-n.
        errors: pairs that a judged reward ranks wrongly with the largest margins.
        problems: messages about files that could not be read.
    """

    folder: Path
    stage: str
    finished: bool
    record: dict[str, Any]
    lines: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name; of a member of an ensemble, or a judge, with that of the run that holds it."""
        folder = self.folder.resolve()
        inside = NUMBERED.fullmatch(folder.name) or (folder.name == JUDGE and is_run(folder.parent))
        return f"{folder.parent.name}/{folder.name}" if inside else folder.name

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe's keys with their values, defaults included."""
        found: dict[str, Any] = self.record["recipe"]
        return found

    @property
    def results(self) -> dict[str, Any]:
        """The closing numbers; empty for an unfinished run and for an evaluation."""
        found = self.record.get("results", {})
        return found if isinstance(found, dict) else {}

    @property
    def table(self) -> list[list[Any]]:
        """The closing table: rows of measure, before, after. Those of members and of a judge are left to these, which are runs too."""
        found: list[list[Any]] = [] if "members" in self.results else self.results.get("table", [])
        return [row for row in found if "judge" not in self.results or not str(row[0]).endswith(f"({JUDGE})")]

    @property
    def verdict(self) -> list[str]:
        """The verdict of a finished PPO run against the SFT model, one line for each measure; empty for other runs."""
        lines = self.results.get("verdict", [])
        return [line for line in lines if isinstance(line, str)] if isinstance(lines, list) else []

    @cached_property
    def metrics(self) -> dict[str, list[Point]]:
        """Finite values of each metric as points, sorted by step; if a step has several lines, the last one counts."""
        found: dict[str, dict[int, float]] = {}
        for line in self.lines:
            for name, value in line.items():
                if name not in ("step", "time") and value is not None and abs(value) < MAX_VALUE:
                    found.setdefault(name, {})[line["step"]] = value
        return {name: sorted((float(step), value) for step, value in values.items()) for name, values in found.items()}

    def series(self, name: str) -> list[Point]:
        """The points of one metric; empty if the run has not logged it."""
        return self.metrics.get(name, [])

    def last(self, name: str) -> float | None:
        """The last value of a metric; None if the run has not logged it."""
        return self.series(name)[-1][1] if self.series(name) else None

    @property
    def steps_planned(self) -> int | None:
        """Updates or optimizer steps of the whole run; None if neither recipe nor results have them."""
        if self.stage == "ppo":
            sizes = self.recipe.get("total_episodes"), self.recipe.get("rollout_batch_size")
            if all(is_count(size) and size for size in sizes):
                return int(sizes[0] // sizes[1])  # type: ignore[operator]
        steps = self.results.get("steps", self.recipe.get("max_steps"))
        return steps if is_count(steps) and steps else None


def find_runs(folder: Path) -> list[list[Path]]:
    """The output folders of runs in a folder, as pipelines: itself, its subfolders, or the subfolders of each subfolder.

    Raises:
        UserError: there is none, or there are too many.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with runs, found {'a file' if folder.exists() else 'nothing'}.")
    if is_run(folder):
        return [[folder]]
    children = [child for child in _subfolders(folder) if is_run(child)]
    found = [children] if children else []
    if not children:
        found = [
            runs for child in _subfolders(folder) if (runs := [each for each in _subfolders(child) if is_run(each)])
        ]
    if not found:
        raise UserError(
            f"{folder}: no run in it or in its subfolders; expected a run's output_dir, a folder of those, or a folder of "
            "numbered recipes that have been run."
        )
    if (count := sum(map(len, found))) > MAX_RUNS:
        raise UserError(
            f"{folder}: has {count} runs, and a report shows at most {MAX_RUNS}; name the folders to compare."
        )
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder is the output folder of a run."""
    return any((folder / name).is_file() for name in (MANIFEST, RUN)) or _is_results(folder / RESULTS)


def with_members(folders: Sequence[Path]) -> list[Path]:
    """Output folders, after each those of the members of its ensemble and of its judge."""
    found = [(folder, *map(Path, ensemble_members(str(folder))), folder / JUDGE) for folder in folders]
    return list(dict.fromkeys(each for folder, *inner in found for each in (folder, *filter(is_run, inner))))


def _is_results(path: Path) -> bool:
    try:
        found = read_json(path, follow_links=False) if path.is_file() else None
    except BadFile:
        return False
    return isinstance(found, dict) and isinstance(found.get("stage"), str) and isinstance(found.get("recipe"), dict)


def _subfolders(folder: Path) -> list[Path]:
    try:
        found = [each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}).") from None
    return sorted(found, key=lambda each: (natural_key(each.name), each.name))


def natural_key(name: str) -> list[tuple[float, str]]:
    """A sort key for names that orders the numbers in them, with decimals, by value, before other characters.

    So `2_ppo` comes before `10_ppo` and `kl0.05` before `kl0.2`.
    """
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", name)
    return [(float(part), "") if index % 2 else (math.inf, part) for index, part in enumerate(parts) if part]


def read_run(folder: Path) -> Run:
    """Read the run in an output folder. Files other than its record may be missing or damaged; see `Run.problems`.

    Raises:
        UserError: there is no readable `stage.json`, `run.json` or `results.json`.
    """
    problems: list[str] = []
    name = next((name for name in (MANIFEST, RUN) if os.path.lexists(folder / name)), RESULTS)
    path = folder / name
    content = read_record(path, MANIFEST_RECORD if name == MANIFEST else OTHER_RECORD)
    if (kind := EVALUATIONS.get(content["stage"])) is not None and name == RESULTS:
        content = read_record(path, kind)
    if name != MANIFEST and isinstance(content.get("results"), dict):
        del content["results"]  # closing numbers are a manifest's
    samples = read_lines(folder / SAMPLES, _is_sample, problems)
    if STAGES.get(content["stage"]) is None:
        problems.append(f"{path}: stage {content['stage']} is unknown to this version")
    return Run(
        folder=folder,
        stage=content["stage"],
        finished=name != RUN,
        record=content,
        lines=read_lines(folder / METRICS, _is_metrics, problems),
        samples=samples,
        cards=dict(_cards(folder, problems)),
        errors=[pair for at in (".", "card") for pair in read_lines(folder / at / ERRORS, _is_mapping, problems)],
        problems=problems,
    )


def _cards(folder: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in [folder / RESULTS, *(child / RESULTS for child in _subfolders(folder))]:
        if not path.is_file():
            continue
        try:
            content = read_json(path, follow_links=False)
        except BadFile as error:
            problems.append(str(error))
            continue
        if isinstance(content, dict):
            yield path.parent.relative_to(folder).as_posix(), content


def read_lines(path: Path, is_valid: Callable[[Any], bool], problems: list[str]) -> list[dict[str, Any]]:
    """The valid lines of a JSONL file; damaged lines are counted in `problems`, except for an incomplete last line."""
    if not os.path.lexists(path):
        return []
    try:
        raw = read_file(path, follow_links=False, max_bytes=MAX_BYTES)
    except BadFile as error:
        problems.append(str(error))
        return []
    found, wrong = [], 0
    lines = raw.split(b"\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = parse_json(line, path, nan_as_null=True)
        except BadFile:
            value = None
        if is_valid(value):
            found.append(value)
        else:
            wrong += index < len(lines) - 1
    if wrong:
        problems.append(f"{path}: {wrong} lines are damaged and were left out")
    return found


def _is_metrics(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and is_count(value.get("step"))
        and all(name == "time" or item is None or is_number(item) for name, item in value.items())
    )


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_sample(value: Any) -> bool:
    return isinstance(value, dict) and is_count(value.get("step")) and isinstance(value.get("name"), str)
