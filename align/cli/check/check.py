"""`align check RECIPE|DIR`: whether it would run, in seconds and without loading weights.

A model that an earlier recipe of the folder has yet to train is replaced by a folder with its configuration,
tokenizer and manifest, so that the stages' own checks run on it as they will on the real one.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.text import Text

from align.cli.check.findings import Context, Report
from align.cli.steps import known_overrides, numbered_recipes
from align.config.load import load_recipe
from align.config.paths import expand
from align.config.stages import STAGES, read_stage
from align.runs.quiet import quiet
from align.runs.tables import make_console
from align.terminal import printable


def run(path: str, num_gpus: int | None = None, overrides: Sequence[str] = ()) -> int:
    """Check a recipe, or a folder's numbered recipes; returns 0, or 2 when something would not run.

    Raises:
        UserError: there is no recipe to check, or an override that no stage has.
    """
    quiet()
    path = expand(path, "align check")
    report = Report(make_console())
    paths = numbered_recipes(path) if Path(path).is_dir() else [path]
    stages = {each: read_stage(each) for each in paths}
    stand_ins: dict[Path, Path] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (each, stage) in enumerate(stages.items()):
            report.console.print(Text(printable(f"{each} ({stage})", one_line=True), style="bold"))
            with report.part():
                words = known_overrides(stage, overrides, set(stages.values())) if Path(path).is_dir() else overrides
                recipe = load_recipe(stage, each, words)
                report.say("keys and values")
                context = Context(report, stand_ins, num_gpus, Path(temporary) / str(number), Path(each).name)
                importlib.import_module(STAGES[stage].check_module).check(recipe, context)
    if report.mistakes:
        report.console.print(Text(f"{report.mistakes} mistake{'s' * (report.mistakes > 1)} to fix", style="bold red"))
        return 2
    report.console.print(Text("it would run", style="bold green"))
    return 0
