"""`align check` of a recipe for `align judge-reward`: its models and rows, without weights."""

from __future__ import annotations

from pathlib import Path

from align.cli.check.findings import Context, describe, with_stand_ins, writable
from align.config.judge_reward import JudgeRewardRecipe
from align.evaluate.reward_model import RewardModel
from align.judge.inputs import prepare_inputs
from align.judge.results import finished
from align.judge.verdicts import MIN_PAIRS
from align.models.inspect_folder import inspect_inputs
from align.runs.output_folder import find_mark


def check(recipe: JudgeRewardRecipe, context: Context) -> None:
    """Report what can be found out about a recipe without loading weights."""
    report = context.report
    with report.part():
        mark = None if (done := finished(recipe)) else find_mark(recipe.output_dir)
        state = "is finished; the step would be skipped" if done else "which would start over" if mark else "new"
        report.say(f"output_dir: {writable(Path(recipe.output_dir))}, {state}")
    with report.part():
        inspect_inputs(recipe, context.stand_ins)
        inputs = prepare_inputs(with_stand_ins(recipe, context.stand_ins, report))
        for name, reward in zip(("judged", "second"), inputs.rewards, strict=False):
            what = f"{reward.path}, {describe(reward.tokenizer)}" if isinstance(reward, RewardModel) else ", ".join(
                source.name for source in reward.sources
            )  # fmt: skip
            report.say(f"{name} reward: {what}")
        if inputs.policy is not None:
            report.say(f"policy: {inputs.policy.path}, {describe(inputs.policy.tokenizer)}")
        if inputs.pairs:
            bad = "".join(f"; {each['count']} skipped: {reason}" for reason, each in inputs.report["bad_rows"].items())
            few = len(inputs.pairs) < MIN_PAIRS
            more = f"; {MIN_PAIRS} or more are needed for a verdict" * few
            counts = f"{len(inputs.pairs)} to judge on, {len(inputs.training)} of its training"
            report.say(f"pairs: {counts}{bad}{more}", "warning" if few else "ok")
        if inputs.samples:
            report.say(f"samples: {len(inputs.samples)}{', rated' * (inputs.ratings is not None)}")
        for benchmark in inputs.benchmarks:
            report.say(f"benchmark: {benchmark.kind}, {len(benchmark.rows)} rows")
