"""A report card for a reward model or a Python reward: `align judge-reward`.

    align judge-reward recipes/mine/3_judge.yaml
    deepspeed --num_gpus 8 --module align judge-reward recipes/mine/3_judge.yaml

Scores preference pairs that the reward was not trained on, computes metrics with intervals over prompts, and gives each a
verdict: good, doubtful or bad. Benchmarks, the spread of scores among samples of one prompt and the agreement with people's
ratings are measured if the recipe names them. Each process holds the whole model and scores its share. A killed run starts over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.judge_reward import JudgeRewardRecipe
from align.data.rows import Prompt, render_text
from align.engine.distributed import connect, disconnect
from align.engine.faults import during
from align.judge.agreement import agreement
from align.judge.benchmarks import score_benchmark
from align.judge.card import FILES, tables, verdict_table, write_card
from align.judge.display import PartsDisplay
from align.judge.inputs import JudgeInputs, Policy, load_scorer, prepare_inputs
from align.judge.measure import confident_errors, measure_pairs
from align.judge.pairs import number_prompts
from align.judge.probes import max_probe_responses
from align.judge.ratings import rating_agreement
from align.judge.results import AGAIN, finished
from align.judge.rows import ModelScorer, ScoredPairs, Scorer
from align.judge.slices import MIN_SLICE_PAIRS
from align.judge.spread import Sampling, rows_of_file, sampled_rows, spread
from align.judge.verdicts import judge, overall, summary
from align.models.context_length import max_positions
from align.models.virtual_tokens import load_language_model
from align.runs.files import write_json
from align.runs.measurement import claim_measurement, print_finished
from align.runs.output_folder import RESULTS, one_run_per_folder, share
from align.runs.own_files import RUN, own
from align.runs.quiet import quiet
from align.runs.results import JudgeResult
from align.runs.tables import make_console


@one_run_per_folder
def run(recipe: JudgeRewardRecipe) -> JudgeResult | None:
    """Judge a reward; returns the content of `results.json` on rank 0, None on the others."""
    quiet()
    if (earlier := finished(recipe)) is not None:
        print_finished(recipe, "judged already; see card.md there")
        return JudgeResult.from_json(recipe.output_dir, earlier)
    this = claim_measurement(recipe, AGAIN)
    inputs = prepare_inputs(recipe)
    world = connect(deepspeed_files=False, reward_timeout=recipe.reward_timeout, tf32=recipe.tf32)
    folder = Path(recipe.output_dir)
    if not world.is_main:
        share(folder)
    with_samples = bool(inputs.policy or inputs.samples)
    with_second = bool(inputs.pairs and inputs.rewards[1:])
    sampled = with_samples + bool(inputs.policy) + (with_second and inputs.ratings is not None)
    display = PartsDisplay(world, bool(inputs.pairs) + with_second + sampled + len(inputs.benchmarks))
    scorer = load_scorer(inputs.rewards[0], recipe, world, display.add)
    second = load_scorer(inputs.rewards[1], recipe, world, display.add) if with_second else None
    card: dict[str, Any] = {}
    errors: list[dict[str, Any]] = []
    if inputs.pairs:
        display.start("pairs and probes", 2 * len(inputs.pairs) + max_probe_responses(inputs.pairs))
        scored = ScoredPairs.from_scorer(scorer, inputs.pairs)
        card |= measure_pairs(
            scored,
            scorer,
            inputs.training,
            slice_by=recipe.slice_by,
            iterations=recipe.bootstrap_iters,
            seed=recipe.seed,
        )
        if inputs.trained_on:
            card["trained_on"] = {"count": inputs.trained_on, "pairs": len(inputs.pairs)}
        errors = confident_errors(scored)
        if second is not None:
            display.start("second reward", 2 * len(inputs.pairs))
            others = ScoredPairs.from_scorer(second, inputs.pairs)
            card["agreement"] = agreement(scored, others, recipe.bootstrap_iters, recipe.seed)
    if with_samples:
        card |= measure_samples(recipe, inputs, scorer, second, display)
    chat = isinstance(scorer, ModelScorer) and not scorer.is_encoder and bool(scorer.tokenizer.chat_template)
    card["benchmarks"] = []
    for each in inputs.benchmarks:
        display.start(each.kind, each.responses)
        card["benchmarks"].append(score_benchmark(each, scorer, chat))
    display.stop()
    card["notes"] = notes(scorer, inputs, [name for name in recipe.slice_by if name not in card.get("slices", {})])
    card["verdicts"] = judge(card)
    result = None
    if world.is_main:
        results = {
            **this,
            "verdict": overall(card["verdicts"]),
            "summary": summary(card["verdicts"]),
            "card": card,
            "data": inputs.report,
        }
        name = recipe.reward_model_path or " + ".join(recipe.reward_funcs)
        with during("records", folder):
            own(*(folder / each for each in (*FILES, RESULTS)))
            write_card(folder, card, errors, name)
            write_json(folder / RESULTS, results)  # the last: it marks the card as finished
        (folder / RUN).unlink()
        result = JudgeResult.from_json(recipe.output_dir, results)
        console = make_console()
        for table in (verdict_table(card), *tables(card)[1:]):
            console.print(table.to_rich())
    world.barrier()
    disconnect()
    return result


def measure_samples(
    recipe: JudgeRewardRecipe, inputs: JudgeInputs, scorer: Scorer, second: Scorer | None, display: PartsDisplay
) -> dict[str, Any]:
    """The spread of scores among samples of one prompt, from `samples_dataset` or sampled from the policy, and their agreement
    with the samples' ratings."""
    rows = (
        rows_of_file(inputs.samples) if inputs.policy is None else sample_policy(recipe, inputs.policy, inputs, display)
    )
    responses = [row.chosen for row in rows]
    display.start("scores of samples", len(rows))
    scores = scorer.score(rows, responses)
    found = {"spread": spread(rows, scores, recipe.bootstrap_iters, recipe.seed)}
    if inputs.ratings is not None:
        others = None
        if second is not None:
            display.start("second reward on samples", len(rows))
            others = second.score(rows, responses)
        prompts = number_prompts([render_text(row.prompt) for row in rows])
        found["ratings"] = rating_agreement(
            scores, others, inputs.ratings, prompts, recipe.bootstrap_iters, recipe.seed
        )
    return found


def sample_policy(recipe: JudgeRewardRecipe, policy: Policy, inputs: JudgeInputs, display: PartsDisplay) -> list[Any]:
    """Responses of the policy to `num_prompts` of the pairs' prompts."""
    prompts = list({render_text(row.prompt): Prompt(row.prompt, row.where, row.extra) for row in inputs.pairs}.values())
    drawn = random.Random(f"{recipe.seed} prompts").sample(prompts, min(recipe.num_prompts, len(prompts)))
    display.start("samples of the policy", len(drawn) * recipe.num_generations)
    model = load_language_model(
        policy.path,
        dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
    )
    limits = [policy.tokenizer.model_max_length, max_positions(policy.config) or policy.tokenizer.model_max_length]
    return sampled_rows(
        model.to(display.world.device).eval(),
        policy.tokenizer,
        display.world,
        drawn,
        int(min(limits)) - recipe.response_length,
        Sampling(
            recipe.num_generations,
            recipe.response_length,
            recipe.temperature,
            recipe.per_device_eval_batch_size,
            recipe.seed,
        ),
        display.add,
    )


def notes(scorer: Scorer, inputs: JudgeInputs, unsliced: Sequence[str]) -> list[str]:
    """Notes on the data for the card: skipped and truncated rows, missing slices, missing training pairs.

    Args:
        unsliced: columns of `slice_by` without two groups that are large enough.
    """
    found = [f"{each['count']} pairs skipped: {reason}" for reason, each in inputs.report.get("bad_rows", {}).items()]
    if isinstance(scorer, ModelScorer) and scorer.reward.truncated:
        found.append(
            f"{scorer.reward.truncated} sequences were longer than the model's {scorer.reward.max_length} positions, and lost their beginning"
        )
    found += [f"No accuracy by {name}: fewer than two groups of {MIN_SLICE_PAIRS} pairs" for name in unsliced]
    if inputs.pairs and not inputs.training:
        found.append(
            "No training pairs are given: words alone were fitted on the judged pairs themselves, by cross-validation."
        )
    return found
