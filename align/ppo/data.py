"""The data of a PPO run: tokenized prompts for training and evaluation, and text for PPO-ptx."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from align.config.ppo import PPORecipe
from align.data.load import DataSettings, load_rows
from align.data.rows import Demonstration, Prompt
from align.data.tokenize import tokenize_demonstrations, tokenize_prompts
from align.engine.distributed import World
from align.models.context_length import check_responses_fit
from align.ppo.inputs import PPOInputs
from align.ppo.ppo_run import TokenizedPrompt


@dataclass(frozen=True, slots=True)
class PPOData:
    """`report` is JSON-able: sources with fingerprints, counts, and skipped rows by reason."""

    prompts: Sequence[TokenizedPrompt]
    held_out: Sequence[TokenizedPrompt]
    ptx: Dataset | None
    report: dict[str, Any]

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, of training or evaluation."""
        return max(len(ids) for _, ids in (*self.prompts, *self.held_out))


def load_data(recipe: PPORecipe, inputs: PPOInputs, world: World) -> PPOData:
    """Load and tokenize all rows.

    Raises:
        UserError: rows that cannot be used, fewer prompts than processes, or a prompt that leaves no room for a response.
    """
    rows = load_rows(DataSettings.from_recipe(recipe), Prompt)
    prompts, skipped = tokenize_prompts(rows.train, inputs.tokenizer, recipe.max_prompt_length, recipe.on_bad_row)
    held_out, skipped_held_out = tokenize_prompts(
        rows.evaluation, inputs.tokenizer, recipe.max_prompt_length, recipe.on_bad_row
    )
    world.check_rows(len(prompts))
    check_responses_fit([ids for _, ids in (*prompts, *held_out)], recipe.response_length, inputs.config)
    report = {**rows.report, "skipped": {"train": skipped, "evaluation": skipped_held_out, "ptx": {}}}
    if not recipe.ptx_dataset:
        return PPOData(prompts, held_out, None, report)
    text = load_rows(ptx_settings(recipe), Demonstration, "ptx_dataset")
    ptx, report["skipped"]["ptx"] = tokenize_demonstrations(
        text.train,
        inputs.tokenizer,
        max_length=recipe.max_prompt_length + recipe.response_length,
        on_bad_row=recipe.on_bad_row,
    )
    return PPOData(prompts, held_out, ptx, {**report, "ptx": text.report})


def ptx_settings(recipe: PPORecipe) -> DataSettings:
    """Settings to load `ptx_dataset` by; nothing is held out."""
    return DataSettings(
        train_dataset=recipe.ptx_dataset,
        mixture_temperature=recipe.mixture_temperature,
        on_bad_row=recipe.on_bad_row,
        seed=recipe.seed,
    )
