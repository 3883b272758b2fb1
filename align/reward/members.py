"""Several reward models of one recipe (`ensemble_size`), one after the other: each an output of the stage in a folder of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.config.ensemble import MEMBER
from align.config.reward import RewardRecipe
from align.engine.distributed import World
from align.reward.inputs import RewardInputs
from align.reward.pairs import Pairs
from align.runs.manifest import open_stage
from align.runs.markdown import markdown_text
from align.runs.output_folder import one_run_per_folder
from align.runs.own_files import own
from align.runs.run_record import record_run
from align.runs.stage import finish, finished_results
from align.terminal import say

Train = Callable[[RewardRecipe, RewardInputs, Pairs], dict[str, Any]]

CARD = """# Reward models

{count} reward models, trained from {base} by the `reward` stage of align with the seeds {first} to {last}, each in a folder of its own:
`{member}1` and so on. `reward_model_path` of the ppo stage takes this folder as an ensemble of them.
"""


def member_recipe(recipe: RewardRecipe, number: int) -> RewardRecipe:
    """The recipe of the member `number`, from 1: that of a single model with the next seed."""
    folder = Path(recipe.output_dir) / f"{MEMBER}{number}"
    return dataclasses.replace(recipe, output_dir=str(folder), seed=recipe.seed + number - 1, ensemble_size=1)


def train_members(
    recipe: RewardRecipe, inputs: RewardInputs, pairs: Pairs, world: World, train: Train
) -> dict[str, Any]:
    """Train the members that are not finished, and close the stage; returns the results, those of the members among them."""
    if world.is_main:
        record_run(recipe, pairs.rows.report, None)

    @one_run_per_folder
    def train_member(member: RewardRecipe) -> dict[str, Any]:
        return finished_results(member.output_dir) if open_stage(member) else train(member, inputs, pairs)

    found = []
    for number in range(1, recipe.ensemble_size + 1):
        member = member_recipe(recipe, number)
        if world.is_main:
            own(Path(member.output_dir))
            say(f"reward model {number} of {recipe.ensemble_size}: seed {member.seed}, into {member.output_dir}")
        world.barrier()
        found.append(train_member(member))
        world.barrier()
    table = [
        [f"{measure} ({MEMBER}{number})", *values]
        for number, each in enumerate(found, start=1)
        for measure, *values in each["table"]
    ]
    results = {"steps": sum(each["steps"] for each in found), "table": table, "members": found}
    if world.is_main:
        card = CARD.format(
            count=recipe.ensemble_size,
            base=markdown_text(recipe.model_name_or_path),
            first=recipe.seed,
            last=recipe.seed + recipe.ensemble_size - 1,
            member=MEMBER,
        )
        finish(recipe, inputs.tokenizer, {**pairs.rows.report, "skipped": pairs.skipped}, results, card)
    return results
