"""The report: one self-contained HTML file of at most `MAX_BYTES`, readable without scripts."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from align.best_of_n.results import tables as best_of_n_tables
from align.errors import UserError
from align.evaluate.results import tables as evaluation_tables
from align.report.costs import costs_table, phases_figure
from align.report.curves import LabelledRun, learning_curves
from align.report.diagnose import diagnose
from align.report.figures import PageTable
from align.report.frontier import frontiers
from align.report.overview import (
    before_after,
    describe_state,
    display_name,
    headline,
    recipe_of,
    stages_table,
    versions_table,
)
from align.report.pipelines import Group, Pipeline, group_stages, read_pipelines
from align.report.responses import histograms, samples
from align.report.reward_card import cards
from align.runs.files import write_text
from align.runs.records import package_version
from align.terminal import printable

MAX_BYTES = 1_500_000
MARK = '<meta name="generator" content="align report">'  # marks files of this command, which it may overwrite
TABLES = {"evaluate": evaluation_tables, "bon": best_of_n_tables}  # of the stages without learning curves
TEMPLATES = Path(__file__).parent / "templates"
# Points per curve and samples in all, in the order in which they are tried; the last fits with sixty runs.
SIZES = ((240, 240), (120, 160), (60, 80), (30, 40), (16, 16), (8, 0))


@dataclass(frozen=True, slots=True)
class StageSection:
    """One stage on the page: its learning curves, or the tables of an evaluation."""

    key: str
    title: str
    stage: str
    first: list[Any]
    then: list[Any]
    tables: list[PageTable]


def write_report(folders: Sequence[Sequence[Path]], path: Path, title: str) -> list[str]:
    """Write the report of runs; returns the problems found in their files.

    Args:
        folders: for each pipeline, the output folders of its runs.

    Raises:
        UserError: a record is damaged, `path` is another file than a report, or the runs are too many for one report.
    """
    check_overwritable(path)
    pipelines = read_pipelines(folders)
    if (html := render_within_limit(pipelines, title)) is None:
        raise UserError(f"{path}: the report would be larger than {MAX_BYTES / 1e6:g} MB; name fewer runs.")
    try:
        write_text(path, html)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file with --output.") from None
    return [problem for each in pipelines for run in each.runs for problem in run.problems]


def render_within_limit(pipelines: Sequence[Pipeline], title: str) -> str | None:
    """The page with as many points and samples as fit into `MAX_BYTES`; None if even the fewest do not fit."""
    pages = (render(pipelines, title, *sizes) for sizes in SIZES)
    return next((page for page in pages if len(page.encode()) <= MAX_BYTES), None)


def report_html(folder: Path) -> str:
    """The report of one run as HTML, for Weights & Biases.

    Raises:
        UserError: a record is damaged, or the report would be too large.
    """
    if (html := render_within_limit(read_pipelines([[folder]]), folder.resolve().name)) is None:
        raise UserError(f"{folder}: its report would be larger than {MAX_BYTES / 1e6:g} MB.")
    return html


def check_overwritable(path: Path) -> None:
    """Check that `path` does not exist or is an earlier report.

    Raises:
        UserError: another file is there, or a symbolic link.
    """
    if path.is_symlink() or (path.exists() and not _is_report(path)):
        raise UserError(
            f"{path}: is not a report of this command, so it is not overwritten; name another file with --output."
        )


def _with_distinct_labels(runs: list[LabelledRun]) -> list[LabelledRun]:
    """Runs for one chart: if a pipeline has several, they get their folders' names as labels and a color each."""
    labels = [each.label for each in runs]
    if len(set(labels)) == len(labels):
        return runs
    several = len(set(labels)) > 1
    return [
        LabelledRun(f"{each.label}: {each.run.name}" if several else each.run.name, each.run, number)
        for number, each in enumerate(runs)
    ]


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(300)


def render(pipelines: Sequence[Pipeline], title: str, max_points: int, max_samples: int) -> str:
    """The page as HTML.

    Args:
        max_points: of a curve.
        max_samples: of all runs together.
    """
    groups = group_stages(pipelines)
    ppo = _with_distinct_labels(
        [each for each_group in groups if each_group.stage == "ppo" for each in each_group.runs]
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["code_spans"] = code_spans
    best_of_n = [
        (f"{each.run.name} of {label}" if len(pipelines) > 1 else each.run.name, each.run.record)
        for each_group in groups
        for each in each_group.runs
        for label in [each.label]
        if each.run.stage == "bon"
    ]
    per_run = max(max_samples // max(len(ppo), 1), 1) if max_samples else 0
    page: str = environment.get_template("page.html").render(
        mark=Markup(MARK),
        policy=Markup(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"),
        style=Markup(style),
        script=Markup(script),
        title=title,
        version=package_version("align"),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        pipelines=[(each.label, index) for index, each in enumerate(pipelines)],
        unfinished=[
            f"{run.name}: {describe_state(run)}" for each in pipelines for run in each.runs if not run.finished
        ],
        problems=[problem for each in pipelines for run in each.runs for problem in run.problems],
        stages=stages_table(pipelines),
        before_after=before_after(groups),
        findings=[
            (display_name(each, run, len(pipelines) > 1), diagnose(run, each.runs))
            for each in pipelines
            for run in each.runs
        ],
        checks=_self_checks(groups),
        curves=[_stage(each, max_points) for each in groups if each.stage != "judge-reward"],
        cards=[
            card
            for each in pipelines
            for run in each.runs
            for card in cards(run, display_name(each, run, len(pipelines) > 1))
        ],
        headline=headline(pipelines[0]) if len(pipelines) == 1 else [],
        verdicts=[
            (display_name(each, run, len(pipelines) > 1), line)
            for each in pipelines
            for run in each.runs
            for line in run.verdict
        ],
        frontiers=frontiers(ppo, best_of_n),
        histograms=histograms(ppo),
        samples=[sample for each in ppo for sample in samples(each, per_run)] if per_run else [],
        several_runs=len(ppo) > 1,
        costs=costs_table(groups),
        phases=phases_figure(groups),
        recipes=[recipe_of(each, run, len(pipelines) > 1) for each in pipelines for run in each.runs],
        versions=versions_table(pipelines),
    )
    return page


def _stage(each: Group, max_points: int) -> StageSection:
    first, then = learning_curves(each.stage, each.runs, max_points)
    tables = [
        PageTable(table.title, table.columns, table.rows)
        for labelled in each.runs
        if each.stage in TABLES
        for table in TABLES[each.stage](labelled.run.record)
    ]
    return StageSection(each.key, each.title, each.stage, first, then, tables)


def _self_checks(groups: Sequence[Group]) -> PageTable | None:
    runs = [each for each_group in groups if each_group.stage == "ppo" for each in each_group.runs]
    names = sorted({name for each in runs for name in each.run.metrics if name.startswith("self_check/")})
    if not names:
        return None
    rows = [[name[11:], *(_format_number(each.run.last(name)) for each in runs)] for name in names]
    labels = {each.label for each in runs}
    columns = [
        each.run.name
        if len(labels) == 1
        else each.label
        if len(labels) == len(runs)
        else f"{each.label}: {each.run.name}"
        for each in runs
    ]
    columns = columns if len(runs) > 1 else ["value"]
    return PageTable("PPO's self-checks before the first update", ["check", *columns], rows)


def _format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def code_spans(text: str) -> Markup:
    """Turn the Markdown code spans of a text into <code>, and escape the rest."""
    parts = re.split(r"`([^`]*)`", printable(text))
    return Markup("").join(
        Markup("<code>%s</code>") % part if index % 2 else escape(part) for index, part in enumerate(parts)
    )


def _shown(value: Any) -> Any:
    """Escape the control characters of a text before a template prints it."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
