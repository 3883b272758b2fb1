"""Two steps of sft, reward and ppo on a model folder, from recipes as a user writes them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from align.cli.check.check import run as run_check
from align.cli.steps import known_overrides
from align.config.load import load_recipe
from align.config.ppo import PPORecipe
from align.config.stages import STAGES
from align.engine.batch_plan import batch_plan
from align.engine.distributed import World
from align.generation.responses import respond_to_batch
from align.models.load import load_policy
from align.models.tokenizer import load_tokenizer
from align.ppo.inputs import check_ppo_inputs
from align.ppo.ppo_run import Models
from align.ppo.setup import load_models

PROMPTS = ("Who was here", "Say", "Tell me of the sea and of the hills", "Where is it now", "A word", "Please go on")
ANSWERS = (" It was the old man", " Yes", " The sea is wide and the hills are green", " Here", " No", " I do not know")
RECIPES = {"sft": "1_sft.yaml", "reward": "2_reward.yaml", "ppo": "3_ppo.yaml"}
BATCH, LENGTH, RESPONSE = 4, 96, 12  # rows on the device, tokens of a row and of a response, at most
TRAINER: dict[str, Any] = {"train_batch_size": BATCH, "max_steps": 2, "eval_fraction": 0.3}


def write_recipes(base: str, folder: Path, packs: bool, positions: int | None) -> None:
    """Write the recipes of three stages that start from the model in `base`, and their rows.

    Args:
        positions: that the model has. Rows are cut so that they, and batches of packed ones, have no more tokens than that.
    """
    length = min(LENGTH, positions or LENGTH)
    response = min(RESPONSE, length // 4)
    batch = max(1, min(BATCH, (positions or BATCH * LENGTH) // length))
    answered, prompted = length // 3, length - length // 3 - 3  # a character is a token at most; BOS, EOS, a space
    rows = [
        {
            "prompt": prompt[:prompted],
            "completion": answer[:answered],
            "chosen": answer[:answered],
            "rejected": other[:answered],
        }
        for prompt, answer, other in zip(PROMPTS, ANSWERS, ANSWERS[::-1], strict=True)
    ]
    forms = {"sft": ("prompt", "completion"), "reward": ("prompt", "chosen", "rejected"), "ppo": ("prompt",)}
    for stage, names in forms.items():
        lines = [json.dumps({name: row[name] for name in names}) + "\n" for row in rows]
        (folder / f"{stage}.jsonl").write_text("".join(lines), encoding="utf-8")
    sizes = {"per_device_train_batch_size": batch, "learning_rate": 1e-3, "logging_steps": 1}
    trainer = {**TRAINER, **sizes, "per_device_eval_batch_size": batch, "max_length": length}
    keys: dict[str, dict[str, Any]] = {
        "sft": {**trainer, "model_name_or_path": base, "packing": packs, "eval_metrics": ["exact_match"]},
        "reward": {**trainer, "model_name_or_path": str(folder / "sft"), "normalize_prompts": 4, "eval_fraction": 0},
        "ppo": {
            **sizes,
            "sft_model_path": str(folder / "sft"),
            "reward_model_path": str(folder / "reward"),
            "eval_fraction": 0,
            "total_episodes": 16,
            "rollout_batch_size": 8,
            "minibatch_size": 8,
            "num_ppo_epochs": 1,
        },
    }
    for stage, name in RECIPES.items():
        keys[stage] |= {"stage": stage, "output_dir": str(folder / stage), "response_length": response}
        keys[stage]["train_dataset"] = str(folder / f"{stage}.jsonl")
        (folder / name).write_text(yaml.safe_dump(keys[stage]), encoding="utf-8")


def check_recipes(folder: Path, overrides: Sequence[str]) -> str:
    """The mistakes that `align check` finds in the recipes; empty if they would run."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = run_check(str(folder), None, overrides)
    return "" if code == 0 else " ".join(line for line in output.getvalue().splitlines() if line.startswith("  error"))


def run_recipe(stage: str, folder: Path, overrides: Sequence[str]) -> None:
    """Run one of the recipes in this process.

    Raises:
        Exception: whatever the stage raises.
    """
    recipe = load_recipe(stage, str(folder / RECIPES[stage]), known_overrides(stage, overrides, set(RECIPES)))
    importlib.import_module(STAGES[stage].module).run(recipe)


def ppo_models(folder: Path, overrides: Sequence[str]) -> Models:
    """The four models of the PPO recipe, as its stage loads them."""
    recipe = load_recipe("ppo", str(folder / RECIPES["ppo"]), known_overrides("ppo", overrides, set(RECIPES)))
    assert isinstance(recipe, PPORecipe)
    world = World(0, 1, torch.device("cpu"))
    return load_models(recipe, check_ppo_inputs(recipe), batch_plan(recipe, 1), world)


@torch.no_grad()
def check_generates(folder: str, prompts: Sequence[list[int]], length: int) -> None:
    """Check that plain transformers' greedy responses of `length` tokens from a saved folder are those of the stages.

    Raises:
        ValueError: they are not.
    """
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
    ours = respond_to_batch(load_policy(folder).eval(), tokenizer, prompts, torch.zeros(len(prompts), length), 0.0)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, response in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        generated = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length, pad_token_id=0
        )
        if (found := generated[0, len(prompt) :].tolist()) != response:
            raise ValueError(f"transformers continues {prompt} by {found}, the stages by {response}")
