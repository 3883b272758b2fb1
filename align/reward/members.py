"""Several reward models of one recipe (`ensemble_size`, `train_judge`), one after the other: each an output of the stage in a
folder of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.config.ensemble import JUDGE, MEMBER
from align.config.reward import RewardRecipe
from align.engine.distributed import World
from align.errors import UserError
from align.reward.inputs import RewardInputs
from align.reward.pairs import Pairs, describe_halves
from align.runs.checkpoint import complete_checkpoints
from align.runs.manifest import open_stage
from align.runs.markdown import markdown_text
from align.runs.output_folder import one_run_per_folder
from align.runs.own_files import own, owned
from align.runs.run_record import record_run
from align.runs.stage import finish, finished_results
from align.terminal import say

Train = Callable[[RewardRecipe, RewardInputs, Pairs], dict[str, Any]]

CARD = """# Reward models

{count} reward models, trained from {base} by the `reward` stage of align with the seeds {first} to {last}, each in a folder of its own:
`{member}1` and so on. `reward_model_path` of the ppo stage takes this folder as an ensemble of them.
"""
JUDGED = """
A judge in the folder `judge`, for `judge_reward_model_path`, was trained on the other half of the pairs, which shares no prompt with theirs.
"""


def member_recipe(recipe: RewardRecipe, number: int) -> RewardRecipe:
    """The recipe of the member `number`, from 1: that of a single model with the next seed."""
    folder = Path(recipe.output_dir) / f"{MEMBER}{number}"
    return dataclasses.replace(recipe, output_dir=str(folder), seed=recipe.seed + number - 1, ensemble_size=1)


def judge_recipe(recipe: RewardRecipe) -> RewardRecipe:
    """The recipe of the judge: that of a single model with the seed after the last member's."""
    return dataclasses.replace(
        member_recipe(recipe, recipe.ensemble_size + 1), output_dir=str(Path(recipe.output_dir) / JUDGE)
    )


def check_no_judge(recipe: RewardRecipe) -> None:
    """Check that the output folder holds no judge of an earlier start, if the recipe trains none.

    Raises:
        UserError: it does; the reward model would be trained on the judge's pairs.
    """
    if JUDGE in owned(recipe.output_dir):
        raise UserError(
            f"train_judge: {recipe.output_dir} holds a judge that was trained with train_judge: true, on pairs that the reward model "
            f"would be trained on now; set train_judge: true, or delete {recipe.output_dir} to start over."
        )


def train_judge(
    recipe: RewardRecipe, inputs: RewardInputs, pairs: Pairs, of_judge: Pairs, world: World, train: Train
) -> dict[str, Any]:
    """Train the judge on its pairs, if it is not finished; returns its results.

    It comes before the reward model, whose training closes the stage.

    Args:
        pairs: those of the reward model.
    """
    judge = judge_recipe(recipe)
    if world.is_main:
        if not complete_checkpoints(recipe.output_dir):  # of the reward model, in whose record the rows are compared
            record_run(recipe, pairs.rows.report, None)
        say(describe_halves(pairs.rows, of_judge.rows))
        say(f"judge: seed {judge.seed}, into {judge.output_dir}")
    return _train_inside(judge, inputs, of_judge, world, train)


def _train_inside(
    recipe: RewardRecipe, inputs: RewardInputs, pairs: Pairs, world: World, train: Train
) -> dict[str, Any]:
    """Train one model into a folder inside the stage's own, if it is not finished there; returns its results."""

    @one_run_per_folder
    def run(recipe: RewardRecipe) -> dict[str, Any]:
        return finished_results(recipe.output_dir) if open_stage(recipe) else train(recipe, inputs, pairs)

    if world.is_main:
        own(Path(recipe.output_dir))
    world.barrier()
    results = run(recipe)
    world.barrier()
    return results


def with_judge(results: dict[str, Any], judge: dict[str, Any] | None) -> dict[str, Any]:
    """The results of the reward stage with those of the judge, if there is one: its rows close the table."""
    if judge is None:
        return results
    table = [*results["table"], *([f"{measure} ({JUDGE})", *values] for measure, *values in judge["table"])]
    return {**results, "table": table, "judge": judge}


def train_members(
    recipe: RewardRecipe, inputs: RewardInputs, pairs: Pairs, world: World, train: Train, judge: dict[str, Any] | None
) -> dict[str, Any]:
    """Train the members that are not finished, and close the stage; returns the results, those of the members among them.

    Args:
        judge: results of the judge, if there is one.
    """
    if world.is_main:
        record_run(recipe, pairs.rows.report, None)
    found = []
    for number in range(1, recipe.ensemble_size + 1):
        member = member_recipe(recipe, number)
        if world.is_main:
            say(f"reward model {number} of {recipe.ensemble_size}: seed {member.seed}, into {member.output_dir}")
        found.append(_train_inside(member, inputs, pairs, world, train))
    table = [
        [f"{measure} ({MEMBER}{number})", *values]
        for number, each in enumerate(found, start=1)
        for measure, *values in each["table"]
    ]
    results = with_judge({"steps": sum(each["steps"] for each in found), "table": table, "members": found}, judge)
    if world.is_main:
        card = CARD.format(
            count=recipe.ensemble_size,
            base=markdown_text(recipe.model_name_or_path),
            first=recipe.seed,
            last=recipe.seed + recipe.ensemble_size - 1,
            member=MEMBER,
        ) + JUDGED * (judge is not None)
        finish(recipe, inputs.tokenizer, {**pairs.rows.report, "skipped": pairs.skipped}, results, card)
    return results
