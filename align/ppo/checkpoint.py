"""Checkpoints of a PPO run, for an exact resume."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.config.judge import SCORE, best_metric
from align.config.ppo import PPORecipe
from align.engine.faults import during
from align.engine.stopping import stop, stop_asked
from align.maths.running_moments import RunningMoments
from align.ppo.ppo_run import PPORun, Progress
from align.runs.checkpoint import mark_complete, read_state
from align.runs.own_files import own
from align.runs.records import COUNT, MAPPING, NUMBER, Kind, Record, check_record, is_number, list_of, or_null
from align.runs.schemas import COMPLETE
from align.runs.stage import layout

MOMENTS = Record(dict.fromkeys(("count", "mean", "squares"), NUMBER))
NAME_LIST = list_of("a list of texts", lambda each: isinstance(each, str))


def progress_record(metric: str, held_out: int) -> Record:
    """The schema of `progress` in a checkpoint.

    Args:
        metric: `metric_for_best_model`.
        held_out: number of held-out prompts.
    """

    def is_evaluation(value: Any) -> bool:
        numbers = isinstance(value, dict) and all(each is None or is_number(each) for each in value.values())
        return numbers and {"update", "eval/kl", SCORE, metric} <= value.keys()

    def is_value_list(value: Any) -> bool:
        return (
            isinstance(value, list)
            and all(each is None or is_number(each) for each in value)
            and len(value) in (0, held_out)
        )

    return Record(
        {
            "kl_coef": NUMBER,
            "score_moments": MAPPING,
            "best": or_null(Kind(f"metrics of an evaluation, {metric} among them", is_evaluation)),
        },
        {  # earlier versions lack them
            "sampler_gap": or_null(NUMBER),
            "best_worth": Kind(f"a list of {held_out} numbers or null", is_value_list),
            "falls": COUNT,
            "history": list_of("a list of metrics of evaluations", is_evaluation),
            "eos_rate": or_null(NUMBER),
            "warned": NAME_LIST,
            "inherited": NAME_LIST,
        },
    )


def save_if_due(run: PPORun, done: int) -> None:
    """Save a checkpoint if one is due after `done` updates, or if a SIGTERM asked the run to stop.

    Raises:
        Stopped: after a SIGTERM.
    """
    stopping, save_steps = stop_asked(run.world), run.recipe.save_steps
    if stopping or (save_steps and done % save_steps == 0):
        save_checkpoint(run, done)
    if stopping:
        stop(_folder(run.recipe, done), run.world)


def _folder(recipe: PPORecipe, step: int) -> Path:
    return Path(recipe.output_dir) / f"checkpoint-{step}"


def save_checkpoint(run: PPORun, step: int) -> None:
    """Save the state of a run. Data order and sampling noise are functions of the step, so no generator is saved."""
    recipe, world = run.recipe, run.world
    folder = _folder(recipe, step)
    if world.is_main:
        own(folder)
    world.barrier()
    saved = {
        "policy": run.models.policy,
        "value": run.models.value,
        "ema": run.ema,
        "replay": run.replay,
        "ahead": run.ahead,
    }
    sums: dict[str, list[int]] = {}
    with during("checkpoint", folder):
        for name, saveable in saved.items():
            if saveable is not None:
                sums |= {
                    f"{name}/{file}": size_and_sum
                    for file, size_and_sum in saveable.save_checkpoint(folder / name).items()
                }
        state = {"step": step, "progress": asdict(run.progress), "layout": layout(recipe, world.size)}
        mark_complete(folder, state, recipe.save_total_limit, world, sums)


def load_checkpoint(run: PPORun, checkpoint: Path, held_out: int) -> None:
    """Continue from a checkpoint: weights, optimizer states, moving average, responses kept or sampled ahead, and progress.

    Args:
        held_out: number of held-out prompts.

    Raises:
        UserError: it is damaged.
    """
    run.models.policy.load_checkpoint(checkpoint / "policy")
    if run.models.value is not None:
        run.models.value.load_checkpoint(checkpoint / "value")
    if run.ema is not None:
        run.ema.load_checkpoint(checkpoint / "ema")
    if run.replay is not None:
        run.replay.load_checkpoint(checkpoint / "replay")
    if run.ahead is not None and (checkpoint / "ahead").is_dir():  # not if one_step_off_policy was turned on since
        run.ahead.load_checkpoint(checkpoint / "ahead")
    saved_progress = read_state(checkpoint).get("progress")
    run.progress = read_progress(
        saved_progress, f"{checkpoint / COMPLETE}: progress", best_metric(run.recipe), held_out
    )


def read_progress(state: Any, where: str, metric: str, held_out: int) -> Progress:
    """Progress from what a checkpoint says of it.

    Args:
        where: begins errors.
        metric, held_out: as for `progress_record`.

    Raises:
        BadFile: it is damaged.
    """
    check_record(state, progress_record(metric, held_out), where)
    moments = state["score_moments"]
    check_record(moments, MOMENTS, f"{where}.score_moments")
    gap = state.get("sampler_gap")
    return Progress(
        kl_coef=state["kl_coef"],
        score_moments=RunningMoments(**{name: moments[name] for name in MOMENTS.required}),
        best=None if state["best"] is None else _numbers(state["best"]),
        best_worth=[math.nan if each is None else each for each in state.get("best_worth", [])],
        falls=state.get("falls", 0),
        history=[_numbers(each) for each in state.get("history", [])],
        sampler_gap=math.inf if gap is None else gap,  # infinite before the first comparison, which JSON cannot hold
        eos_rate=state.get("eos_rate"),
        warned=state.get("warned", []),
        inherited=state.get("inherited", []),
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics with NaN where JSON has null."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}
