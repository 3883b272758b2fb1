"""PPO's models on disk: Hugging Face folders for people, checkpoints for an exact resume."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.ppo import PPORecipe
from align.engine.distributed import World
from align.engine.ema import EMA
from align.engine.torch_engine import Engine
from align.maths.running_moments import RunningMoments
from align.ppo.setup import Models
from align.runs.checkpoint import mark_complete, read_state
from align.runs.files import new_folder
from align.runs.stage import layout


def save_policy(
    engine: Engine | EMA, tokenizer: PreTrainedTokenizerBase, world: World, folder: Path, whole_folder: bool = True
) -> None:
    """Write a model and its tokenizer as a Hugging Face folder; a folder of its own appears at once or not at all."""
    fresh = new_folder(folder) if whole_folder and world.is_main else contextlib.nullcontext(folder)
    with fresh as target:
        engine.save_pretrained(target)
        if world.is_main:
            tokenizer.save_pretrained(target)
    world.barrier()


@dataclass(slots=True)
class Progress:
    """What a run carries from update to update beside weights and optimiser states."""

    kl_coef: float
    score_moments: RunningMoments = field(default_factory=RunningMoments)
    best: dict[str, Any] | None = None  # the evaluation of the checkpoint in `best/`
    sampler_gap: float = math.inf  # the largest between sampling's and training's log-probabilities, when last compared


def save_checkpoint(
    recipe: PPORecipe, world: World, models: Models, ema: EMA | None, step: int, progress: Progress
) -> None:
    """Write all that a resume needs. Data order and sampling noise are functions of the step, so no generator is saved."""
    folder = Path(recipe.output_dir) / f"checkpoint-{step}"
    models.policy.save_checkpoint(folder / "policy")
    if models.value is not None:
        models.value.save_checkpoint(folder / "value")
    if ema is not None:
        ema.save_checkpoint(folder / "ema")
    world.barrier()
    if world.is_main:
        state = {"step": step, "progress": asdict(progress), "layout": layout(recipe, world.size)}
        mark_complete(folder, state, recipe.save_total_limit)
    world.barrier()


def load_checkpoint(recipe: PPORecipe, models: Models, ema: EMA | None, checkpoint: Path | None) -> Progress:
    """Continue from a checkpoint, if there is one."""
    if checkpoint is None:
        return Progress(recipe.kl_coef)
    models.policy.load_checkpoint(checkpoint / "policy")
    if models.value is not None:
        models.value.load_checkpoint(checkpoint / "value")
    if ema is not None:
        ema.load_checkpoint(checkpoint / "ema")
    state = read_state(checkpoint)["progress"]
    return Progress(
        state["kl_coef"], RunningMoments(**state["score_moments"]), state["best"], state.get("sampler_gap", math.inf)
    )
