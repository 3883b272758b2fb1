"""`align run DIR`: the numbered recipes of a folder in order, each stage in processes of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from align.checkpoint import is_finished, read_manifest
from align.config import CLASSES, EvaluateRecipe, StageRecipe, UserError
from align.evaluate_record import finished, tables
from align.recipes import batch_plan, load_any, read_stage, stage_inputs
from align.strict import nearest
from align.tables import cell, make_console, make_table

GRACE = 10.0  # seconds that a process has after SIGTERM
PIPELINE = "ALIGN_PIPELINE"  # set in the stages started here, which end when this process is gone


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One numbered recipe: where it is, what it says, and how it will be run."""

    path: str
    stage: str
    recipe: StageRecipe | EvaluateRecipe
    overrides: list[str]
    processes: int

    @property
    def name(self) -> str:
        return Path(self.path).name


def run(directory: str, num_gpus: int | None = None, overrides: Sequence[str] = ()) -> int:
    """Run what is not finished, in order, and close with the table of before and after; returns 0.

    Raises:
        UserError: no recipes, a recipe that is wrong (all are read before the first starts), or a stage that failed.
    """
    steps = read_steps(directory, num_gpus, overrides)
    signal.signal(signal.SIGTERM, _terminated)
    console = make_console()
    for step in steps:
        if (found := already_done(step)) is not None:
            print(f"{step.name}: finished already, in {step.recipe.output_dir}", flush=True)
            for renderable in found:
                console.print(renderable)
            continue
        words = command(step)
        launched = "--module" in words
        how = f"deepspeed with {step.processes} process{'es' * (step.processes > 1)}" if launched else "one process"
        print(f"{step.name}: {step.stage}, {how}, into {step.recipe.output_dir}", flush=True)
        began = time.monotonic()
        code = _run_process(words, _quiet_launcher() if launched else {})
        if code:
            metrics = Path(step.recipe.output_dir) / "metrics.jsonl"
            raise UserError(
                f"{step.path}: the {step.stage} stage {_ending(code)} after {time.monotonic() - began:.0f} s"
                f"{f'; what it measured is in {metrics}' if metrics.exists() else ''}. The same command continues from there."
            )
        print(f"{step.name}: finished in {time.monotonic() - began:.0f} s", flush=True)
    manifests = [(step.name, read_manifest(step.recipe.output_dir) or {}) for step in steps]
    for renderable in closing_tables(manifests):
        console.print(renderable)
    return 0


def already_done(step: Step) -> list[Table] | None:
    """None when there is something to do; else what only the step itself would have shown: an evaluation's tables.

    Raises:
        UserError: its output folder holds something else.
    """
    if isinstance(step.recipe, EvaluateRecipe):
        results = finished(step.recipe)
        return None if results is None else [table.drawn() for table in tables(step.recipe, results)]
    return [] if is_finished(step.recipe, step.stage, stage_inputs(step.recipe)) else None


def read_steps(directory: str, num_gpus: int | None, overrides: Sequence[str]) -> list[Step]:
    """The folder's recipes `N_name.yaml` by number, checked, each with those overrides whose key its stage has.

    Raises:
        UserError: no such folder or recipes, a wrong recipe or override, two recipes with one `output_dir`.
    """
    paths = numbered_recipes(directory)
    stages = {path: read_stage(path) for path in paths}
    shared = {stage: known_overrides(stage, overrides, set(stages.values())) for stage in set(stages.values())}
    steps: list[Step] = []
    for path, stage in stages.items():
        recipe = load_any(stage, path, shared[stage])
        count = processes(recipe, num_gpus)
        for other in steps:
            if Path(other.recipe.output_dir).resolve() == Path(recipe.output_dir).resolve():
                raise UserError(
                    f"{path}: output_dir: expected a folder of its own, got that of {other.path} ({recipe.output_dir})"
                )
        try:
            if isinstance(recipe, StageRecipe):
                batch_plan(recipe, count)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        steps.append(Step(path, stage, recipe, shared[stage], count))
    return steps


def numbered_recipes(directory: str) -> list[str]:
    """Paths of `N_name.yaml` in a folder, by number.

    Raises:
        UserError: no such folder, no such recipes, or two with one number.
    """
    if not Path(directory).is_dir():
        beside = Path(directory).parent
        known = [str(folder) for folder in beside.iterdir() if folder.is_dir()] if beside.is_dir() else []
        raise UserError(f"{directory}: no such folder of recipes{nearest(directory, known)}")
    numbered: dict[int, str] = {}
    for path in sorted(Path(directory).iterdir()):
        if match := re.fullmatch(r"(\d+)_.+\.ya?ml", path.name):
            number = int(match[1])
            if number in numbered:
                raise UserError(
                    f"{path}: {numbered[number]} has the number {number} too; number the recipes in their order."
                )
            numbered[number] = str(path)
    if not numbered:
        raise UserError(f"{directory}: expected recipes named like 1_sft.yaml, found none")
    return [numbered[number] for number in sorted(numbered)]


def known_overrides(stage: str, overrides: Sequence[str], stages: set[str]) -> list[str]:
    """The overrides, with their values, whose key `stage` has; one that no stage has is an error."""
    keys = {name: {field.name for field in dataclasses.fields(CLASSES[name])} for name in stages}
    kept: list[str] = []
    keep = True
    for word in overrides:
        if word.startswith("--"):
            name = re.split(r"[=.]", word[2:])[0].replace("-", "_")
            keep = name in keys[stage]
            if not any(name in known for known in keys.values()):
                raise UserError(f"--{name}: no stage here has this key{nearest(name, set.union(*keys.values()))}")
        if keep:
            kept.append(word)
    return kept


def processes(recipe: StageRecipe | EvaluateRecipe, num_gpus: int | None) -> int:
    """Processes for a recipe: `num_gpus` if given; else one, or with a `deepspeed` key one per visible GPU."""
    if num_gpus is None and not getattr(recipe, "deepspeed", None):
        return 1
    import torch  # only here: a folder for one process starts at once

    gpus = torch.cuda.device_count()
    if num_gpus is not None and 0 < gpus < num_gpus:
        raise UserError(f"--num_gpus: expected at most the {gpus} visible GPUs, got {num_gpus}")
    return num_gpus or max(gpus, 1)


def command(step: Step) -> list[str]:
    """The command line that runs a stage: alone, or by the `deepspeed` launcher when its recipe or `--num_gpus` asks."""
    stage = [f"align.{step.stage}", step.path, *step.overrides]
    if not getattr(step.recipe, "deepspeed", None) and step.processes == 1:
        return [sys.executable, "-m", *stage]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # With a number alone the launcher ignores CUDA_VISIBLE_DEVICES and takes the machine's first GPUs.
    where = (
        ["--include", f"localhost:{','.join(visible.split(',')[: step.processes])}"]
        if visible
        else ["--num_accelerators", str(step.processes)]
    )
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", *where]
    return [*launcher, "--master_port", str(_free_port()), "--module", *stage]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _terminated(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def _quiet_launcher() -> dict[str, str]:
    """Environment in which DeepSpeed does not warn, process by process, that it found nothing but a CPU."""
    import torch

    return {} if torch.accelerator.is_available() else {"DS_ACCELERATOR": "cpu"}


def _run_process(words: list[str], environment: Mapping[str, str]) -> int:
    """Run a command in a process group of its own, none of which outlives this call; returns its exit code."""
    environment = {**os.environ, PIPELINE: str(os.getpid()), **environment}
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    ended = False
    try:
        code = process.wait()
        ended = code == 0
    finally:
        _end_group(process, patience=5 if ended else 0)
    return code


def _end_group(process: subprocess.Popen[bytes], patience: float) -> None:
    """End what is left of a process group: wait `patience` seconds, then SIGTERM, and at last SIGKILL."""
    for signum, seconds in ((0, patience), (signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                process.poll()  # reaps the leader, which would count as alive
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            continue
        return


def _ending(code: int) -> str:
    """An exit code in words; the launcher reports death by signal n as 256 - n."""
    number = -code if code < 0 else 256 - code if code > 192 else 0
    name = signal.Signals(number).name if number in {*signal.Signals} else ""
    return f"was killed by {name}" if name else f"failed with exit code {code}"


def closing_tables(manifests: Sequence[tuple[str, dict[str, Any]]]) -> list[Table]:
    """Before and after by stage from `results["table"]`, and three of each stage's `results["samples"]`."""
    measures = make_table("Before and after", "stage", "measure", "before", "after")
    examples = []
    for name, manifest in manifests:
        results = manifest.get("results", {})
        for measure, before, after in results.get("table", []):
            measures.add_row(name, cell(measure), cell(before), cell(after))
        if samples := results.get("samples"):
            examples.append(make_table(f"Responses ({name})", *samples[0]))
            for sample in samples[:3]:
                examples[-1].add_row(*map(cell, sample.values()))
    return [*([measures] if measures.row_count else []), *examples]
