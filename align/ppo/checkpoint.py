"""Checkpoints of a PPO run, for an exact resume."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.config.ppo import PPORecipe
from align.engine.faults import during
from align.engine.stopping import stop, stop_asked
from align.maths.running_moments import RunningMoments
from align.ppo.ppo_run import PPORun, Progress
from align.runs.checkpoint import mark_complete, read_state
from align.runs.own_files import own
from align.runs.records import COUNT, MAPPING, NUMBER, Record, check_record, is_number, list_of, or_null
from align.runs.schemas import COMPLETE
from align.runs.stage import layout

MOMENTS = Record(dict.fromkeys(("count", "mean", "squares"), NUMBER))
PROGRESS = Record(
    {
        "kl_coef": NUMBER,
        "score_moments": MAPPING,
        "best": or_null(MAPPING),
    },
    {  # earlier versions lack them
        "sampler_gap": or_null(NUMBER),
        "best_worth": list_of("a list of numbers or null", lambda each: each is None or is_number(each)),
        "falls": COUNT,
        "history": list_of("a list of mappings", lambda each: isinstance(each, dict)),
    },
)


def save_if_due(run: PPORun, done: int) -> None:
    """Save a checkpoint if `save_steps` asks for one after `done` updates; at a SIGTERM in any case, and end then.

    Raises:
        Stopped: at a SIGTERM.
    """
    stopping, save_steps = stop_asked(run.world), run.recipe.save_steps
    if stopping or (save_steps and done % save_steps == 0):
        save_checkpoint(run, done)
    if stopping:
        stop(_folder(run.recipe, done), run.world)


def _folder(recipe: PPORecipe, step: int) -> Path:
    return Path(recipe.output_dir) / f"checkpoint-{step}"


def save_checkpoint(run: PPORun, step: int) -> None:
    """Write all that a resume needs. Data order and sampling noise are functions of the step: no generator is saved."""
    recipe, world = run.recipe, run.world
    folder = _folder(recipe, step)
    if world.is_main:
        own(folder)
    world.barrier()
    saved = {"policy": run.models.policy, "value": run.models.value, "ema": run.ema, "replay": run.replay}
    sums: dict[str, list[int]] = {}
    with during("checkpoint", folder):
        for name, saveable in saved.items():
            if saveable is not None:
                sums |= {f"{name}/{file}": told for file, told in saveable.save_checkpoint(folder / name).items()}
        state = {"step": step, "progress": asdict(run.progress), "layout": layout(recipe, world.size)}
        mark_complete(folder, state, recipe.save_total_limit, world, sums)


def load_checkpoint(run: PPORun, checkpoint: Path) -> None:
    """Continue from a checkpoint: weights, optimizer states, moving average, kept responses and progress."""
    run.models.policy.load_checkpoint(checkpoint / "policy")
    if run.models.value is not None:
        run.models.value.load_checkpoint(checkpoint / "value")
    if run.ema is not None:
        run.ema.load_checkpoint(checkpoint / "ema")
    if run.replay is not None:
        run.replay.load_checkpoint(checkpoint / "replay")
    state: Any = read_state(checkpoint).get("progress")
    check_record(state, PROGRESS, f"{checkpoint / COMPLETE}: progress")
    moments = state["score_moments"]
    check_record(moments, MOMENTS, f"{checkpoint / COMPLETE}: progress.score_moments")
    gap = state.get("sampler_gap")
    run.progress = Progress(
        state["kl_coef"],
        RunningMoments(**{name: moments[name] for name in MOMENTS.required}),
        state["best"],
        [math.nan if each is None else each for each in state.get("best_worth", [])],
        state.get("falls", 0),
        state.get("history", []),
        math.inf if gap is None else gap,  # infinite before the first comparison, which JSON cannot hold
    )
