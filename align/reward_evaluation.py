"""Judging a trained reward model on held-out pairs and against a known truth, and setting its zero."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from align.checkpoint import tokenizer_digest
from align.config import RewardRecipe, UserError
from align.data import Preference, Prompt, Turns, render_text
from align.engine import frozen_engine, sharded_load
from align.evaluation import preference_accuracy
from align.models import load_policy
from align.reward_setup import Inputs, positions
from align.rollout import Sampler
from align.tokenization import encode_pair
from align.world import World, spread
from reward_models import ModelReward, Responses, load_reward_model

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
        max_length=positions(model.config),
    )


def frozen_dtype(recipe: RewardRecipe) -> torch.dtype:
    return torch.bfloat16 if recipe.bf16 else torch.float32


def score_ids(reward: ModelReward, world: World, ids: Sequence[list[int]]) -> Tensor:
    """Scores of all sequences, on every rank, each rank having scored its share. [B] float32, on the CPU."""
    mine = [ids[index] for index in spread(world, len(ids))]
    texts = [""] * len(mine)
    batch = Responses([*texts], texts, [*texts], prompt_ids=[[] for _ in mine], response_ids=mine)
    return world.gather(reward.score(batch).to(world.device))[: len(ids)].cpu()


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


def sample_answers(
    recipe: RewardRecipe, inputs: Inputs, world: World, prompts: Sequence[tuple[Prompt, list[int]]]
) -> list[list[int]]:
    """What the SFT model answers, at temperature 1, as the reward model reads it: ids of prompt and answer, on every rank."""
    assert inputs.answering is not None
    assert inputs.answering_tokenizer is not None
    with sharded_load(recipe):
        model = load_policy(inputs.answering, recipe, frozen_dtype(recipe))
    engine = frozen_engine(model, recipe, world)
    sampler = Sampler(
        tokenizer=inputs.answering_tokenizer,
        temperature=1.0,
        response_length=recipe.response_length,
        batch_size=recipe.per_device_eval_batch_size,
        seed=recipe.seed,
    )
    mine = spread(world, len(prompts))
    _, _, ids, mask, _ = sampler.respond(
        engine, world, [prompts[index][1] for index in mine], "zero of the score", mine
    )
    missing = (0, recipe.response_length - ids.shape[1])
    ids, mask = (world.gather(pad(tensor, missing))[: len(prompts)] for tensor in (ids, mask))
    answers: list[list[int]] = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    vocabularies = [tokenizer_digest(t)["vocabulary"] for t in (inputs.tokenizer, inputs.answering_tokenizer)]
    if vocabularies[0] == vocabularies[1] and not inputs.encoder:
        return [prompt_ids + answer for (_, prompt_ids), answer in zip(prompts, answers, strict=True)]
    texts = inputs.answering_tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [
        encode_pair(inputs.tokenizer, prompt.prompt, text, inputs.encoder)
        for (prompt, _), text in zip(prompts, texts, strict=True)
    ]


def demonstrations(recipe: RewardRecipe, rows: Dataset) -> list[list[int]]:
    """Chosen responses instead of answers, where no model is there to answer: ids of prompt and response."""
    some = random.Random(recipe.seed).sample(range(len(rows)), min(recipe.normalize_prompts, len(rows)))
    return [rows[index]["chosen_ids"] for index in some]


def set_zero(reward: ModelReward, world: World, answers: Sequence[list[int]]) -> tuple[float, float]:
    """Make 0 the mean score of `answers` from here on; returns the mean and standard deviation that they had."""
    scores = score_ids(reward, world, answers).double()
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    reward.model.config.score_mean = mean
    return mean, std


def score_check(reward: ModelReward, world: World, rows: Dataset) -> dict[str, list[Any]]:
    """A few short sequences and their scores, by which a later stage can see that it reads the model as this one did."""
    some = rows.select(range(min(len(rows), 100)))
    pairs = sorted(zip(some["chosen_ids"], some["rejected_ids"], strict=True), key=lambda pair: sum(map(len, pair)))
    ids = [list(sequence) for pair in pairs[:CHECKED_PAIRS] for sequence in pair]
    return {"ids": ids, "scores": score_ids(reward, world, ids).tolist()}
