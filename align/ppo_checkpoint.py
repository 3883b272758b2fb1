"""PPO's models on disk: Hugging Face folders for people, checkpoints for an exact resume."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.checkpoint import mark_complete, new_folder, read_state
from align.config import PPORecipe, UserError
from align.engine import Engine, zero_stage
from align.ppo_setup import Models
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
        state = {"step": step, "best": best, "layout": _layout(recipe, world)}
        mark_complete(folder, state, recipe.save_total_limit)
    world.barrier()


def _layout(recipe: PPORecipe, world: World) -> str:
    return f"{world.size} process{'es' * (world.size > 1)} at ZeRO {zero_stage(recipe)}"


def check_layout(recipe: PPORecipe, world: World, checkpoint: Path | None) -> None:
    """See that the checkpoint can be read back: optimiser states are sharded, and fit one layout only.

    Raises:
        UserError: it was written by another number of processes or ZeRO stage.
    """
    if checkpoint is not None and (theirs := read_state(checkpoint)["layout"]) != _layout(recipe, world):
        raise UserError(
            f"{checkpoint}: was saved by {theirs}, and this run has {_layout(recipe, world)}; "
            f"resume in the same way, or delete {checkpoint.parent} to start anew."
        )


def load_checkpoint(models: Models, checkpoint: Path | None) -> dict[str, Any] | None:
    """Continue from a checkpoint, if there is one; returns the best evaluation before it."""
    if checkpoint is None:
        return None
    models.policy.load_checkpoint(checkpoint / "policy")
    models.value.load_checkpoint(checkpoint / "value")
    best: dict[str, Any] | None = read_state(checkpoint)["best"]
    return best
