"""Stage 2: a reward model from preference pairs, by TRL's RewardTrainer.

    align reward recipes/quickstart/2_reward.yaml
    deepspeed --num_gpus 8 --module align.reward recipes/hh-rlhf/2_reward.yaml

A scalar head on a decoder or an encoder (BERT-like) learns -log sigmoid(chosen - rejected), usually for one epoch.
Afterwards the score is normalized: the mean score of responses of the SFT model is subtracted (arXiv 2009.01325,
2203.02155). The loss depends only on differences of scores, but PPO adds the score itself to the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig

from align.config.reward import RewardRecipe
from align.data.batches import pad_to_batches
from align.data.duplicates import describe_duplicates
from align.data.end_tokens import end_ids
from align.data.rows import Prompt
from align.engine.batch_plan import BatchPlan, batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import World, connect, disconnect
from align.engine.faults import during
from align.engine.sequence_parallel import SequenceGroup
from align.engine.sharding import load_device
from align.judge.card import manifest_entry, write_card
from align.models.bottleneck import add_entries, continue_adapter
from align.models.load import new_reward_model
from align.models.model_types import is_encoder, is_encoder_decoder
from align.models.new_modules import trained_whole
from align.models.scalar_head import start_reward_model
from align.models.tokenizer import saved_pad_id
from align.models.trainable import check_target_modules, freeze, peft_config
from align.reward.evaluation import (
    accuracy_by_source,
    before_after_table,
    evaluate_pairs,
    judge_held_out,
    load_sft_model,
    load_trained_reward,
    prompts_of,
    score_check,
    score_pairs,
)
from align.reward.imbalance import describe_imbalance, imbalance_section, measure_imbalance, warn_of_imbalance
from align.reward.inputs import RewardInputs, check_reward_inputs
from align.reward.members import check_models_inside, delete_unused, train_judge, train_members, with_judge
from align.reward.model_card import reward_card
from align.reward.normalization import chosen_responses, normalization_prompts, normalize_scores, sft_responses
from align.reward.pairs import Pairs, load_pairs
from align.reward.trainer import PairCollator, PairTrainer
from align.runs.checkpoint import step_of
from align.runs.files import write_json
from align.runs.manifest import open_stage
from align.runs.output_folder import RESULTS, one_run_per_folder
from align.runs.own_files import new_folder
from align.runs.quiet import quiet
from align.runs.results import RewardResult
from align.runs.stage import finish, finished_results, last_checkpoint, write_untrained
from align.runs.tracker import Tracker
from align.terminal import say
from align.trainer.arguments import eval_batch_size, total_steps, training_arguments
from align.trainer.hf_trainer import save_trained, train
from reward_models.bottleneck import base_of
from reward_models.heads import keep_head_float32, score_head


@one_run_per_folder
def run(recipe: RewardRecipe) -> RewardResult:
    """Train a reward model, or several; returns the results, which are also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return RewardResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe), recipe.reward_timeout, recipe.tf32)
    plan = batch_plan(recipe, world.size)
    inputs = check_reward_inputs(recipe)
    pairs, of_judge = load_pairs(recipe, inputs)
    world.check_rows(len(pairs.train), plan.world_size)
    size = recipe.sequence_parallel_size
    sequence = SequenceGroup(world, size) if size > 1 else None
    train_one = partial(train_model, world=world, plan=plan, sequence=sequence)
    check_models_inside(recipe, [pairs.rows, *([of_judge.rows] if of_judge is not None else ())])
    if world.is_main:
        delete_unused(recipe)
    judge = None
    if of_judge is not None:
        world.check_rows(len(of_judge.train), plan.world_size)
        judge = train_judge(recipe, inputs, pairs, of_judge, world, train_one)
    if recipe.ensemble_size > 1:
        results = train_members(recipe, inputs, pairs, world, train_one, judge)
    else:
        if judge is not None and world.is_main:
            say(f"reward model: seed {recipe.seed}, into {recipe.output_dir}")
        results = train_one(recipe, inputs, pairs, judge=judge)
    world.barrier()
    disconnect()
    return RewardResult.from_json(recipe.output_dir, results)


def train_model(
    recipe: RewardRecipe,
    inputs: RewardInputs,
    pairs: Pairs,
    *,
    world: World,
    plan: BatchPlan,
    sequence: SequenceGroup | None,
    judge: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train one reward model into `output_dir`, and close the stage there; returns the results.

    Args:
        sequence: the processes that share rows with this one, if any.
        judge: results of the judge that was trained beside it.
    """
    train_rows, eval_rows = pairs.train, pairs.evaluation
    prompts = normalization_prompts(
        inputs,
        pairs.rows.train,
        count=recipe.normalize_prompts,
        response_length=recipe.response_length,
        seed=recipe.seed,
    )
    padded = pad_to_batches(train_rows, plan.batch_size)
    steps = total_steps(recipe, len(padded), plan)

    checkpoint = last_checkpoint(recipe, world, pairs.rows.report)
    start = write_untrained(
        recipe.output_dir,
        recipe.seed,
        world,
        checkpoint is not None,
        partial(write_untrained_model, recipe, inputs),
    )
    with Tracker(recipe, "reward", steps, resume_step=step_of(checkpoint)) as tracker:
        tracker.say(plan.describe())
        tracker.say(f"scalar head: {inputs.describe_head()}")
        if (line := describe_duplicates(pairs.rows.report)) is not None:
            tracker.say(line)
        for use, reasons in pairs.skipped.items():
            for reason, found in reasons.items():
                tracker.say(f"pairs skipped ({use}): {found['count']}, {reason}")
        imbalance = measure_imbalance(pairs.trained_rows)
        for line in (*describe_imbalance(imbalance), *warn_of_imbalance(imbalance)):
            tracker.say(line)
        before = fit(recipe, plan, world, sequence, inputs.tokenizer, start, padded, eval_rows, tracker, checkpoint)

        # From here on the saved model, loaded and scored as PPO does it.
        reward = load_trained_reward(recipe, world)
        results: dict[str, Any] = {"steps": steps, "table": []}
        judged = None
        if eval_rows is not None:
            scores = score_pairs(reward, world, eval_rows)
            results |= evaluate_pairs(scores, eval_rows, pairs.margins, prompts_of(pairs.held_out_rows))
            results["by_source"] = accuracy_by_source(pairs.held_out_rows, scores)
            tracker.log(
                steps, {f"eval/{name[5:]}": value for name, value in results.items() if name.startswith("eval_")}
            )
            results["table"] = before_after_table(
                before["eval_accuracy"], results, sum(each["count"] for each in pairs.skipped["evaluation"].values())
            )
            judged = judge_held_out(
                recipe,
                inputs,
                reward,
                world,
                pairs.trained_rows,
                pairs.held_out_rows,
                scores,
                results.get("eval_ceiling"),
            )
            results["card"] = manifest_entry(judged[0])
        mean, std = normalize_scores(reward, world, normalization_rows(recipe, inputs, world, prompts, train_rows))
        check = score_check(reward, world, eval_rows or train_rows)
        results = with_judge(results, judge)
        if world.is_main:
            scale = {"score_mean": mean, "score_std": std}
            config = add_entries(Path(recipe.output_dir), scale)
            data = {**pairs.rows.report, "skipped": pairs.skipped, "imbalance": imbalance}
            card = reward_card(recipe, inputs) + imbalance_section(imbalance)
            if judged is not None:
                with during("records", config), new_folder(Path(recipe.output_dir) / "card") as folder:
                    write_card(folder, *judged, f"{recipe.output_dir}, on its held-out pairs")
                    write_json(folder / RESULTS, {**results["card"], "card": judged[0]})
            head = inputs.describe_head()
            finish(recipe, inputs.tokenizer, data, results, card, **scale, score_check=check, head=head)
    return results


def write_untrained_model(recipe: RewardRecipe, inputs: RewardInputs, folder: Path) -> None:
    """Write the model that training starts from: the backbone with the head of its files, or with a new one."""
    base = base_of(recipe.model_name_or_path)
    model = start_reward_model(
        base,
        inputs.head if base == recipe.model_name_or_path else None,  # one in an adapter comes with that
        recipe.new_head,
        recipe.seed,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
    )
    config = model.config.get_text_config()
    config.pad_token_id = saved_pad_id(model.config, inputs.tokenizer, scores=True)
    reads_end = is_encoder(model.config) or is_encoder_decoder(model.config)  # and writes none
    if not reads_end and len(ends := end_ids(inputs.tokenizer)) > 1:
        config.eos_token_id = list(ends)  # a classifier has no generation config to keep them in
    model.config.score_mean = 0.0  # until the zero of the score is set, after training
    model.save_pretrained(folder)


def normalization_rows(
    recipe: RewardRecipe,
    inputs: RewardInputs,
    world: World,
    prompts: Sequence[tuple[Prompt, list[int]]],
    train_rows: Dataset,
) -> list[list[int]]:
    """The sequences that get mean score 0: SFT responses to `prompts`, or chosen responses where there are none."""
    if inputs.sft is None:
        return chosen_responses(train_rows, recipe.normalize_prompts, recipe.seed)
    return sft_responses(
        load_sft_model(inputs.sft.path, recipe, world),
        world,
        inputs,
        prompts,
        response_length=recipe.response_length,
        batch_size=recipe.per_device_eval_batch_size,
        seed=recipe.seed,
    )


def fit(
    recipe: RewardRecipe, plan: BatchPlan, world: World, sequence: SequenceGroup | None,
    tokenizer: PreTrainedTokenizerBase, start: str,
    train_rows: Dataset, eval_rows: Dataset | None, tracker: Tracker, checkpoint: Path | None,
) -> dict[str, float]:  # fmt: skip
    """Train the model in `start` and save it; returns the evaluation log of the untrained model."""
    if eval_rows is not None:
        eval_rows = pad_to_batches(
            eval_rows, plan.world_size * eval_batch_size(recipe, len(eval_rows), plan.world_size)
        )
    arguments = RewardConfig(
        **training_arguments(recipe, plan, world, eval_rows, resuming=checkpoint is not None),
        center_rewards_coefficient=recipe.center_rewards_coefficient,
    )
    model = new_reward_model(
        start,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        device=load_device(world),
    )
    keep_head_float32(model)
    check_target_modules(model, recipe.lora_target_modules)
    head, whole = score_head(model)[1], trained_whole(model, base_of(recipe.model_name_or_path))
    freeze(model, head, recipe.method, recipe.freeze_layers, recipe.trainable_pattern, whole)
    trainer = PairTrainer(
        sequence=sequence,
        model=model,
        args=arguments,
        data_collator=PairCollator(tokenizer.pad_token_id),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config(recipe, model.config, "SEQ_CLS", whole),
    )
    continue_adapter(trainer.model, recipe.model_name_or_path, recipe.new_head)
    before, _ = train(trainer, recipe, tracker, checkpoint)
    save_trained(
        trainer,
        recipe,
        world,
        lambda: new_reward_model(
            start, attn_implementation=recipe.attn_implementation, trust_remote_code=recipe.trust_remote_code
        ),
    )
    return before
