"""`align run DIR`: the numbered recipes of a folder in order, each stage in processes of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from align.best_of_n import results as best_of_n
from align.cli.processes import describe_exit_code, free_port, launcher_environment, raise_exit, run_process
from align.cli.report import update as update_report
from align.cli.steps import Step, read_steps
from align.config.base import StageRecipe
from align.config.best_of_n import BestOfNRecipe
from align.config.evaluate import EvaluateRecipe
from align.config.judge_reward import JudgeRewardRecipe
from align.config.paths import expand
from align.errors import OtherRun, UserError
from align.evaluate import results as evaluated
from align.judge import results as judged
from align.runs import lock
from align.runs.command_line import USER_ERROR
from align.runs.manifest import is_finished, read_manifest
from align.runs.output_folder import clear_finished
from align.runs.results import report_cards
from align.runs.tables import cell, make_console, make_table
from align.terminal import say

# Stages that train nothing, and so leave `results.json` instead of a manifest; and what reads and shows it.
MEASURED: dict[type, Any] = {EvaluateRecipe: evaluated, JudgeRewardRecipe: judged, BestOfNRecipe: best_of_n}


def run(directory: str, num_gpus: int | None = None, overrides: Sequence[str] = (), hostfile: str | None = None) -> int:
    """Run what is not finished, in order, and close with the table of before and after; returns 0.

    Args:
        num_gpus: processes of each stage, on this machine.
        hostfile: instead of `num_gpus`, the nodes of each stage and their GPUs, as for the `deepspeed` launcher.

    Raises:
        UserError: no recipes, a wrong recipe (all are checked before the first one runs), or a stage that failed.
    """
    steps = read_steps(directory, num_gpus, overrides, hostfile)
    signal.signal(signal.SIGTERM, raise_exit)
    console = make_console()
    outputs, title = (
        [Path(each.recipe.output_dir) for each in steps],
        Path(expand(directory, "align run")).resolve().name,
    )
    report = None
    for index, step in enumerate(steps):
        try:
            found = already_done(step)
        except OtherRun as error:
            folders = [each.recipe.output_dir for each in steps[index:] if Path(each.recipe.output_dir).exists()]
            raise UserError(
                f"{step.path}: {error} To redo this step and those after it, delete {', '.join(folders)}."
            ) from None
        if found is not None:
            clear_finished(step.recipe.output_dir)
            say(f"{step.name}: finished already, in {step.recipe.output_dir}", sys.stdout)
            for renderable in found:
                console.print(renderable)
            continue
        words = command(step)
        launched = "--module" in words
        how = f"deepspeed with {step.processes} process{'es' * (step.processes > 1)}" if launched else "one process"
        say(f"{step.name}: {step.stage}, {how}, into {step.recipe.output_dir}", sys.stdout)
        began = time.monotonic()
        try:
            code = run_process(words, launcher_environment() if launched else {})
        finally:
            lock.remove_stale(Path(step.recipe.output_dir))  # of a stage that was ended by force
        report = update_report(title, outputs)
        if code:
            metrics = Path(step.recipe.output_dir) / "metrics.jsonl"
            how = describe_exit_code(code)
            memory = " Unless you killed it, the machine's memory ran out: lower per_device sizes." * ("SIGKILL" in how)
            goes_on = "The same command continues from there."
            if code == USER_ERROR:  # the stage has said what is wrong
                goes_on = "Once its error above is fixed, the same command continues."
            raise UserError(
                f"{step.path}: the {step.stage} stage {how} after {time.monotonic() - began:.0f} s"
                f"{f'; its metrics are in {metrics}' if metrics.exists() else ''}. {goes_on}{memory}"
            )
        if already_done(step) is None:  # a function of the user may have called `os._exit`
            raise UserError(
                f"{step.path}: the {step.stage} stage ended without an error, but left no finished run in "
                f"{step.recipe.output_dir}; something in it ended the process. The same command continues from there."
            )
        say(f"{step.name}: finished in {time.monotonic() - began:.0f} s", sys.stdout)
    manifests = [(step.name, read_manifest(step.recipe.output_dir) or {}) for step in steps]
    for renderable in closing_tables(manifests):
        console.print(renderable)
    for name, manifest in manifests:
        for line in manifest.get("results", {}).get("verdict", []):
            say(f"{name}: {line}", sys.stdout)
    if (report := report or update_report(title, outputs)) is not None:
        say(f"report: {report}", sys.stdout)
    return 0


def already_done(step: Step) -> list[Table] | None:
    """None when there is something to do; otherwise the tables that only the step would print: those of a
    stage that measures.

    Raises:
        UserError: its output folder holds something else.
    """
    if isinstance(step.recipe, StageRecipe):
        return [] if is_finished(step.recipe) else None
    kind = MEASURED[type(step.recipe)]
    results = kind.finished(step.recipe)
    return None if results is None else [table.to_rich() for table in kind.tables(results)]


def command(step: Step) -> list[str]:
    """The command that runs a stage: alone, or by the `deepspeed` launcher if recipe or `--num_gpus` require it."""
    stage = ["align", step.stage, step.path, *step.overrides]
    if not getattr(step.recipe, "deepspeed", None) and step.processes == 1:
        return [sys.executable, "-m", *stage]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if step.hostfile is not None:
        where = ["--hostfile", os.path.abspath(step.hostfile)]
    elif visible:  # with a number alone the launcher ignores it, and takes the machine's first GPUs
        where = ["--include", f"localhost:{','.join(visible.split(',')[: step.processes])}"]
    else:
        where = ["--num_accelerators", str(step.processes)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", *where]
    return [*launcher, "--master_port", str(free_port()), "--module", *stage]


def closing_tables(manifests: Sequence[tuple[str, dict[str, Any]]]) -> list[Table]:
    """Before and after by stage from `results["table"]`, and three of each stage's `results["samples"]`."""
    measures = make_table("Before and after", "stage", "measure", "before", "after")
    examples = []
    for name, manifest in manifests:
        results = manifest.get("results", {})
        for measure, before, after in results.get("table", []):
            measures.add_row(name, cell(measure), cell(before), cell(after))
        for path, card in report_cards(results).items():
            measures.add_row(name, f"report card ({path})", "", cell(card.get("summary")))
        if samples := results.get("samples"):
            examples.append(make_table(f"Responses ({name})", *samples[0]))
            for sample in samples[:3]:
                examples[-1].add_row(*map(cell, sample.values()))
    return [*([measures] if measures.row_count else []), *examples]
