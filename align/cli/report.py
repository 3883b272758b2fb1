"""`align report DIR ...`: one HTML file about a run, a pipeline, or several of them side by side."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from align.cli.steps import numbered_recipes
from align.config.load import load_recipe
from align.config.paths import expand, expand_output
from align.config.stages import read_stage
from align.errors import UserError, reason
from align.report.page import write_report
from align.report.read import find_runs, is_run
from align.terminal import say

REPORT = "report.html"


def run(directories: Sequence[str], output: str | None = None) -> int:
    """Write the report and print its path; returns 0.

    Args:
        directories: each the output folder of a run, a folder of those, or a folder of numbered recipes that were run.
        output: the file. The default is `report.html` in the directory (for recipes: beside their output folders), or in the
            common parent of several directories.

    Raises:
        UserError: there are no runs, a record is damaged, or the file exists and is not a report.
    """
    given = None if output is None else Path(expand_output(output, "--output"))
    folders = [Path(expand(each, "align report")) for each in directories]
    found = [_find(folder) for folder in folders]
    pipelines = [pipeline for runs, _ in found for pipeline in runs]
    path = found[0][1] if len(found) == 1 else Path(os.path.commonpath([each.resolve() for each in folders])) / REPORT
    path = given or path
    title = (
        folders[0].resolve().name if len(folders) == 1 else " and ".join(each.resolve().name for each in folders[:4])
    )
    for problem in write_report(pipelines, path, title):
        say(problem)
    say(f"report: {path}", sys.stdout)
    return 0


def _find(folder: Path) -> tuple[list[list[Path]], Path]:
    """The output folders of runs, a list for each pipeline, and the default path of their report."""
    try:
        recipes = numbered_recipes(str(folder))
    except UserError:
        return find_runs(folder), folder / REPORT
    outputs = [Path(load_recipe(read_stage(recipe), recipe).output_dir) for recipe in recipes]
    if not (found := [each for each in outputs if is_run(each)]):
        raise UserError(f"{folder}: its recipes have not been run: there is nothing in {outputs[0]} and the others.")
    return [found], report_path(outputs)


def report_path(outputs: Sequence[Path]) -> Path:
    """The path of a pipeline's report: beside its output folders if they have one parent, else in the last one."""
    above = {os.path.abspath(each.parent) for each in outputs}
    return (outputs[-1].parent if len(above) == 1 and len(outputs) > 1 else outputs[-1]) / REPORT


def update(title: str, outputs: Sequence[Path]) -> Path | None:
    """Write the report of a pipeline's runs so far; returns its path. Failures are printed, not raised, and give None."""
    try:
        if not (found := [each for each in outputs if is_run(each)]):
            return None
        path = report_path(outputs) if report_path(outputs).parent.is_dir() else report_path(found)
        write_report([found], path, title)
    except Exception as error:  # a report must not stop a pipeline
        say(f"no report: {reason(error) if not isinstance(error, UserError) else error}")
        return None
    return path
