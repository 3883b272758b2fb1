"""PPO's models on disk: Hugging Face folders for people, checkpoints for an exact resume."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.checkpoint import mark_complete, new_folder, read_state
from align.config import PPORecipe
from align.engine import Engine
from align.ppo_setup import Models
from align.stage import check_layout as check_layout
from align.stage import layout
from align.world import World


def save_policy(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, world: World, folder: Path, whole_folder: bool = True
) -> None:
    """Write a model and its tokenizer as a Hugging Face folder; a folder of its own appears at once or not at all."""
    fresh = new_folder(folder) if whole_folder and world.is_main else contextlib.nullcontext(folder)
    with fresh as target:
        engine.save_pretrained(target)
        if world.is_main:
            tokenizer.save_pretrained(target)
    world.barrier()


def save_checkpoint(recipe: PPORecipe, world: World, models: Models, step: int, best: dict[str, Any] | None) -> None:
    """Write all that a resume needs. Data order and sampling noise are functions of the step, so no generator is saved."""
    folder = Path(recipe.output_dir) / f"checkpoint-{step}"
    models.policy.save_checkpoint(folder / "policy")
    models.value.save_checkpoint(folder / "value")
    world.barrier()
    if world.is_main:
        state = {"step": step, "best": best, "layout": layout(recipe, world.size)}
        mark_complete(folder, state, recipe.save_total_limit)
    world.barrier()


def load_checkpoint(models: Models, checkpoint: Path | None) -> dict[str, Any] | None:
    """Continue from a checkpoint, if there is one; returns the best evaluation before it."""
    if checkpoint is None:
        return None
    models.policy.load_checkpoint(checkpoint / "policy")
    models.value.load_checkpoint(checkpoint / "value")
    best: dict[str, Any] | None = read_state(checkpoint)["best"]
    return best
