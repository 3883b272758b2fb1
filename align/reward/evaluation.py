"""Judging a trained reward model on held-out pairs and against a known truth, and setting its zero."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.config.reward import RewardRecipe
from align.data.encode import encode_pair
from align.data.rows import Preference, Turns, render_text
from align.engine.build import frozen_engine
from align.engine.distributed import World
from align.engine.sharding import sharded_load
from align.errors import UserError
from align.evaluate.statistics import preference_accuracy
from align.generation.scoring import score_ids
from align.models.context_length import max_positions
from align.reward.inputs import Inputs
from reward_models.heads import load_reward_model
from reward_models.responses import Responses
from reward_models.trained import ModelReward

CHECKED_PAIRS = 8  # pairs that the manifest holds with their scores


def load_scorer(recipe: RewardRecipe, world: World) -> ModelReward:
    """The trained model, loaded as PPO loads it."""
    with sharded_load(recipe):
        model = load_reward_model(
            recipe.output_dir,
            dtype=frozen_dtype(recipe),
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
        )
    engine = frozen_engine(model, recipe, world)
    return ModelReward(
        "reward_model",
        engine.module,
        batch_size=recipe.per_device_eval_batch_size,
        max_length=max_positions(model.config),
    )


def frozen_dtype(recipe: RewardRecipe) -> torch.dtype:
    return torch.bfloat16 if recipe.bf16 else torch.float32


def judge_pairs(reward: ModelReward, world: World, ids: Dataset, truth: Tensor | None) -> dict[str, float]:
    """Loss and accuracy on held-out pairs; with a known truth also its accuracy, the ceiling, and agreement with it.

    Args:
        truth: true score of the chosen response less that of the rejected, [B]; negative where the annotator erred.
    """
    chosen, rejected = (score_ids(reward, world, list(ids[name])) for name in ("chosen_ids", "rejected_ids"))
    measured = preference_accuracy(chosen.tolist(), rejected.tolist())
    results = {
        "eval_loss": float(-logsigmoid(chosen - rejected).mean()),
        "eval_accuracy": measured["accuracy"],
        "eval_accuracy_low": measured["low"],
        "eval_accuracy_high": measured["high"],
        "pairs": len(chosen),
    }
    if truth is not None:
        sign, decided = truth.sign(), truth != 0
        results["eval_ceiling"] = preference_accuracy(truth.tolist(), [0.0] * len(truth))["accuracy"]
        agreement = preference_accuracy((sign * chosen)[decided].tolist(), (sign * rejected)[decided].tolist())
        results["agreement"] = agreement["accuracy"]
    return results


def kept_rows(rows: Sequence[Preference], ids: Dataset, inputs: Inputs) -> list[Preference]:
    """The rows that `ids` was made of: without the bad rows that were skipped."""
    if len(rows) == len(ids):
        return list(rows)
    left = iter(rows)
    encode = partial(encode_pair, inputs.tokenizer, is_encoder=inputs.encoder)
    return [
        next(
            row
            for row in left
            if encode(row.prompt, row.chosen) == pair["chosen_ids"]
            and encode(row.prompt, row.rejected) == pair["rejected_ids"]
        )
        for pair in ids
    ]


def true_margins(inputs: Inputs, rows: Sequence[Preference], ids: Dataset) -> Tensor | None:
    """By how much the known truth prefers each chosen response, [B] float32; None where no truth is known.

    Raises:
        UserError: a reward function failed.
    """
    if inputs.truth is None:
        return None
    kept = kept_rows(rows, ids, inputs)
    names = dict.fromkeys(name for row in kept for name in row.extra)
    columns = {name: [row.extra.get(name) for row in kept] for name in names}
    scores = []
    for side in ("chosen", "rejected"):
        responses: list[Turns] = [getattr(row, side) for row in kept]
        texts = [render_text(response) for response in responses]
        token_ids = inputs.tokenizer(texts, add_special_tokens=False)["input_ids"]
        batch = Responses([row.prompt for row in kept], texts, responses, [[] for _ in kept], token_ids, columns)
        try:
            scores.append(inputs.truth.score(batch)[0])
        except ValueError as error:
            raise UserError(f"eval_reward_funcs: {error}") from error
    return scores[0] - scores[1]


def closing_table(before: float, results: dict[str, Any]) -> list[list[Any]]:
    """Rows of measure, before, after."""
    table: list[list[Any]] = [["held-out pair accuracy", before, results["eval_accuracy"]]]
    if "eval_ceiling" in results:
        table.append(["accuracy ceiling (annotator noise)", None, results["eval_ceiling"]])
        table.append(["agreement with the true preference", None, results["agreement"]])
    return table


def score_check(reward: ModelReward, world: World, rows: Dataset) -> dict[str, list[Any]]:
    """A few short sequences and their scores, by which a later stage can see that it reads the model as this one did."""
    some = rows.select(range(min(len(rows), 100)))
    pairs = sorted(zip(some["chosen_ids"], some["rejected_ids"], strict=True), key=lambda pair: sum(map(len, pair)))
    ids = [list(sequence) for pair in pairs[:CHECKED_PAIRS] for sequence in pair]
    return {"ids": ids, "scores": score_ids(reward, world, ids).tolist()}
