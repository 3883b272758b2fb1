"""Evaluation of the trained reward model: on held-out pairs, and against a known true reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.config.reward import RewardRecipe
from align.data.encode import encode_example
from align.data.reasoning import scored_turns
from align.data.rows import Preference, Turns, is_tie, render_text, tools_of
from align.data.templates import TASK
from align.engine.build import frozen_engine
from align.engine.distributed import World
from align.engine.engine import Engine
from align.engine.sharding import load_device, sharded_load
from align.errors import UserError
from align.evaluate.bootstrap import mean_interval
from align.evaluate.statistics import preference_accuracy
from align.generation.scoring import score_ids
from align.judge.measure import confident_errors, measure_pairs
from align.judge.rows import ModelScorer, ScoredPairs
from align.judge.verdicts import judge
from align.models.context_length import max_positions
from align.models.load import load_policy
from align.reward.inputs import RewardInputs
from reward_models.load import load_reward_model
from reward_models.responses import Responses
from reward_models.trained import ModelReward

RESAMPLES = 1000  # for each interval of the report card
MAX_SOURCES = 20  # whose accuracies are told apart
CHECKED_PAIRS = 8  # pairs whose ids and scores the manifest records


def load_trained_reward(recipe: RewardRecipe, world: World) -> ModelReward:
    """The model in `output_dir`, loaded as PPO loads it."""
    with sharded_load(recipe):
        model = load_reward_model(
            recipe.output_dir,
            dtype=_frozen_dtype(recipe.bf16),
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            device=load_device(world),
        )
    engine = frozen_engine(model, recipe, world)
    return ModelReward(
        "reward_model",
        engine.module,
        batch_size=recipe.per_device_eval_batch_size,
        max_length=max_positions(model.config),
    )


def load_sft_model(path: str, recipe: RewardRecipe, world: World) -> Engine:
    """The SFT model, frozen, to sample from."""
    with sharded_load(recipe):
        model = load_policy(
            path,
            dtype=_frozen_dtype(recipe.bf16),
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            device=load_device(world),
        )
    return frozen_engine(model, recipe, world)


def _frozen_dtype(bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def score_pairs(reward: ModelReward, world: World, pairs: Dataset) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected responses, [B] each, on every rank."""
    chosen, rejected = (score_ids(reward, world, list(pairs[name])) for name in ("chosen_ids", "rejected_ids"))
    return chosen, rejected


def evaluate_pairs(
    scores: tuple[Tensor, Tensor], pairs: Dataset, margins: Tensor | None, prompts: Sequence[str] = ()
) -> dict[str, float]:
    """Loss and accuracy on held-out pairs, and measures against the true reward where it is known.

    Args:
        scores: `score_pairs` of them.
        margins: `true_margins` of the pairs, [B].
        prompts: `prompts_of` the pairs; where some repeat, the interval is bootstrapped by prompt.

    Returns:
        eval_loss (nats per pair, with the rows' own `margin` and `tie` as in training), eval_accuracy (of the pairs that are
        no ties) and its 95% interval eval_accuracy_low, eval_accuracy_high, pairs (of these), ties (how many others there are).
        With `margins` also, each with its interval, eval_ceiling, the accuracy of the true reward itself, which annotator noise keeps below 1,
        and agreement, the accuracy on the pairs as the true reward orders them, without its ties.
    """
    chosen, rejected = scores
    given, tie = (torch.tensor(pairs[name][:]) if name in pairs.column_names else None for name in ("margin", "tie"))
    loss = -logsigmoid(chosen - rejected - (0.0 if given is None else given))
    decided = torch.ones(len(chosen), dtype=torch.bool)
    if tie is not None:
        loss, decided = loss + tie * (chosen - rejected) / 2, tie == 0
    accuracy = pairs_accuracy(scores, decided.nonzero().flatten().tolist(), prompts)
    results = {
        "eval_loss": float(loss.mean()),
        "eval_accuracy": accuracy["accuracy"],
        "eval_accuracy_low": accuracy["low"],
        "eval_accuracy_high": accuracy["high"],
        "pairs": int(decided.sum()),
        "ties": int((~decided).sum()),
    }
    if margins is not None:
        truth = margins[decided].tolist()
        ceiling = preference_accuracy(truth, [0.0] * len(truth))
        results |= {"eval_ceiling": ceiling["accuracy"], "ceiling_low": ceiling["low"], "ceiling_high": ceiling["high"]}
        sign, decided = margins.sign(), decided & (margins != 0)
        agreement = preference_accuracy((sign * chosen)[decided].tolist(), (sign * rejected)[decided].tolist())
        results |= {"agreement": agreement["accuracy"], "agreement_pairs": int(decided.sum())}
        results |= {"agreement_low": agreement["low"], "agreement_high": agreement["high"]}
    return results


def pairs_accuracy(scores: tuple[Tensor, Tensor], used: Sequence[int], prompts: Sequence[str]) -> dict[str, float]:
    """`preference_accuracy` of some pairs, with the interval by prompt where prompts repeat among all."""
    chosen, rejected = (each[list(used)] for each in scores)
    accuracy = preference_accuracy(chosen.tolist(), rejected.tolist())
    if len(set(prompts)) < len(prompts):
        right = ((chosen - rejected).sign() + 1) / 2  # a tie counts 1/2
        _, low, high = mean_interval(right.tolist(), [prompts[index] for index in used])
        accuracy |= {"low": max(low, 0.0), "high": min(high, 1.0)}
    return accuracy


def accuracy_by_source(
    rows: Sequence[Preference], scores: tuple[Tensor, Tensor], column: str = TASK
) -> dict[str, dict[str, float]]:
    """accuracy, its 95% interval low and high, and n of the pairs of each source that are no ties; {} with one source.

    All but the most common sources count together as "others".

    Args:
        rows: the row of each pair.
        scores: `score_pairs` of them, or other numbers by which to choose.
        column: that names the source of a row.
    """
    names, prompts = [str(row.extra.get(column)) for row in rows], prompts_of(rows)
    common = [name for name, _ in Counter(names).most_common(MAX_SOURCES)]
    used: dict[str, list[int]] = {}
    for index, (name, row) in enumerate(zip(names, rows, strict=True)):
        if not is_tie(row):
            used.setdefault(name if name in common else "others", []).append(index)
    return {name: pairs_accuracy(scores, each, prompts) for name, each in used.items()} if len(used) > 1 else {}


def judge_held_out(
    recipe: RewardRecipe, inputs: RewardInputs, reward: ModelReward, world: World, trained: Sequence[Preference],
    held_out: Sequence[Preference], scores: tuple[Tensor, Tensor], ceiling: float | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """The report card of the held-out pairs, and those that are most confidently wrong. Every rank must call it.

    Args:
        trained, held_out: the row of each pair that was trained on and that is judged.
        scores: `score_pairs` of the latter.
        ceiling: accuracy of the true reward, where it is known.
    """
    scored = ScoredPairs(list(held_out), *(np.asarray(each.double().numpy()) for each in scores))
    scorer = ModelScorer(reward, world, inputs.tokenizer, inputs.is_encoder)
    card = measure_pairs(scored, scorer, trained, iterations=RESAMPLES, seed=recipe.seed)
    if ceiling is not None:
        card["ceiling"] = ceiling
    card["verdicts"] = judge(card)
    return card, confident_errors(scored)


def true_margins(inputs: RewardInputs, rows: Sequence[Preference]) -> Tensor | None:
    """True reward of each chosen response less that of the rejected one, [B] float32; None without a true reward.

    A margin is negative where the annotator preferred the worse response.

    Args:
        rows: the row of each pair.

    Raises:
        UserError: a reward function failed.
    """
    if inputs.true_reward is None:
        return None
    names = dict.fromkeys(name for row in rows for name in row.extra)
    columns = {name: [row.extra.get(name) for row in rows] for name in names}
    scores = []
    for side in ("chosen", "rejected"):
        responses: list[Turns] = [scored_turns(inputs.tokenizer, getattr(row, side)) for row in rows]
        texts = [render_text(response) for response in responses]
        token_ids = [_response_ids(inputs, row, response) for row, response in zip(rows, responses, strict=True)]
        batch = Responses([row.prompt for row in rows], texts, responses, [[] for _ in rows], token_ids, columns)
        try:
            scores.append(inputs.true_reward.score(batch)[0])
        except ValueError as error:
            raise UserError(f"eval_reward_funcs: {error}") from error
    return scores[0] - scores[1]


def _response_ids(inputs: RewardInputs, row: Preference, response: Turns) -> list[int]:
    """Ids of a response without end-of-text."""
    if inputs.is_encoder:
        ids: list[int] = inputs.tokenizer(render_text(response), add_special_tokens=False)["input_ids"]
        return ids
    return encode_example(inputs.tokenizer, row.prompt, response, tools_of(row))[1][:-1]


def prompts_of(rows: Sequence[Preference]) -> list[str]:
    """The prompt of each row, as text."""
    return [render_text(row.prompt) for row in rows]


def before_after_table(accuracy_before: float, results: dict[str, Any], skipped: int) -> list[list[Any]]:
    """Rows of measure, value before training, value after. `skipped`: held-out pairs that could not be used."""

    def of_pairs(count: int, low: float, high: float) -> str:
        return f"{count} pairs, 95% interval {low:.3g} to {high:.3g}"

    whole = of_pairs(results["pairs"], results["eval_accuracy_low"], results["eval_accuracy_high"])
    whole += f"; ties not counted: {results['ties']}" * bool(results["ties"])
    whole += f"; {skipped} skipped" * bool(skipped)
    table: list[list[Any]] = [[f"held-out pair accuracy ({whole})", accuracy_before, results["eval_accuracy"]]]
    for name, each in results["by_source"].items():
        known = of_pairs(each["n"], each["low"], each["high"])
        table.append([f"accuracy of {name} ({known})", None, each["accuracy"]])
    if "eval_ceiling" in results:
        known = of_pairs(results["pairs"], results["ceiling_low"], results["ceiling_high"])
        table.append([f"accuracy ceiling (annotator noise; {known})", None, results["eval_ceiling"]])
        known = of_pairs(results["agreement_pairs"], results["agreement_low"], results["agreement_high"])
        table.append([f"agreement with the true preference ({known})", None, results["agreement"]])
    return table


def score_check(reward: ModelReward, world: World, pairs: Dataset) -> dict[str, Any]:
    """Ids and scores of a few short sequences, by which a later stage checks that it computes the same scores."""
    some = pairs.select(range(min(len(pairs), 100)))
    by_length = sorted(zip(some["chosen_ids"], some["rejected_ids"], strict=True), key=lambda pair: sum(map(len, pair)))
    ids = [list(sequence) for pair in by_length[:CHECKED_PAIRS] for sequence in pair]
    check = {"ids": ids, "scores": score_ids(reward, world, ids).tolist()}
    return {**check, "tf32": True} if world.tf32 else check
