"""Several reward models of one recipe (`ensemble_size`, `train_judge`), one after the other: each an output of the stage in a
folder of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.config.ensemble import JUDGE, MEMBER
from align.config.paths import dataset_keys
from align.config.reward import RewardRecipe
from align.data.load import Rows
from align.engine.distributed import World
from align.errors import OtherRun
from align.reward.inputs import RewardInputs
from align.reward.pairs import Pairs, describe_halves
from align.runs.checkpoint import complete_checkpoints, models_inside
from align.runs.fingerprints import row_fingerprints
from align.runs.manifest import is_finished, open_stage
from align.runs.markdown import markdown_text
from align.runs.output_folder import one_run_per_folder
from align.runs.own_files import MANIFEST, delete, own
from align.runs.records import read_record
from align.runs.run_record import check_rows, record_run
from align.runs.same_run import input_changes
from align.runs.schemas import MANIFEST_RECORD
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


def models_of(recipe: RewardRecipe) -> list[RewardRecipe]:
    """The recipes of the models that are trained into folders inside: members, and then the judge."""
    members = range(1, recipe.ensemble_size + 1) if recipe.ensemble_size > 1 else ()
    return [*(member_recipe(recipe, number) for number in members), *([judge_recipe(recipe)] * recipe.train_judge)]


def check_models_inside(recipe: RewardRecipe, parts: Sequence[Rows]) -> None:
    """Check that a run of several models goes on with the pairs that it began with, and that those of its models that are finished
    were trained on them.

    Args:
        parts: the rows of the reward model, and with `train_judge` those of its judge.

    Raises:
        OtherRun: they were not, or a finished one is not whole. `accept_changes` lets a model that is being trained go on with other
            pairs; it does not make a finished one a model of these.
    """
    if found := models_of(recipe):
        check_rows(recipe, parts[0].report)
    for each in found:
        accepted = [*each.accept_changes, *dataset_keys(RewardRecipe)]  # rows are compared next
        if is_finished(dataclasses.replace(each, accept_changes=accepted)):
            rows = parts[-1 if Path(each.output_dir).name == JUDGE else 0]
            before = read_record(Path(each.output_dir) / MANIFEST, MANIFEST_RECORD)
            if different := input_changes(before, row_fingerprints(rows.report), each):
                raise OtherRun(
                    f"output_dir: {each.output_dir} holds a finished model that was trained on other pairs than this run has: "
                    f"{', '.join(change.description for change in different)}; put the pairs back as they were, or delete "
                    f"{each.output_dir} to train it again."
                )


def delete_unused(recipe: RewardRecipe) -> None:
    """Delete the folders inside that a start without progress left for models that this one does not train. For rank 0."""
    names = {Path(each.output_dir).name for each in models_of(recipe)}
    for folder in models_inside(recipe.output_dir):
        if folder.name not in names:
            delete(folder)


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
        if not complete_checkpoints(recipe.output_dir):  # of the reward model, which renews the record
            record_run(recipe, pairs.rows.report, None)
        say(describe_halves(len(pairs.train), len(of_judge.train)))
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
