"""A classifier, or a regression, on texts and pairs of texts, by transformers' Trainer.

    align classify recipe.yaml
    deepspeed --num_gpus 8 --module align classify recipe.yaml

Rows are {text, label} or {text, text_pair, label}. An encoder (BERT-like) or a decoder gets a classification head. The
loss of an optimizer step is the mean over its rows, of all microbatches and ranks, weighted by `class_weights`. A regression on prompts (`text`) and
responses (`text_pair`) is a reward model that PPO can use.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from align.config.encoders import ClassifyRecipe
from align.data.batches import pad_to_batches
from align.data.load import DataSettings, load_rows
from align.data.rows import Labelled
from align.encoders import label_metrics
from align.encoders.classifier_report import constant_answer, evaluation_results, model_card
from align.encoders.counted import CountedEvaluation, last_counts
from align.encoders.imbalance import BalancedSampler, check_imbalance, class_weights
from align.encoders.inputs import HeadInputs, check_head_inputs
from align.encoders.label_metrics import LABEL_COLUMNS
from align.encoders.labels import REGRESSION, SHOWN, LabelSet, find_labels
from align.encoders.method import apply_method
from align.encoders.tokenize import tokenize_labelled
from align.engine.batch_plan import batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import connect, disconnect
from align.models.context_length import check_rows_fit
from align.models.load import new_classifier
from align.models.model_types import is_encoder_decoder
from align.models.new_modules import trained_whole
from align.models.tokenizer import saved_pad_id
from align.runs.checkpoint import step_of
from align.runs.manifest import open_stage
from align.runs.output_folder import one_run_per_folder
from align.runs.quiet import quiet
from align.runs.results import ClassifyResult
from align.runs.stage import finish, finished_results, last_checkpoint, write_untrained
from align.runs.tables import markdown_table
from align.runs.tracker import Tracker
from align.trainer.arguments import eval_batch_size, total_steps, training_arguments
from align.trainer.hf_trainer import save_trained, train, untrained_is_best
from align.trainer.row_trainer import RowCollator, row_training_arguments
from reward_models.bottleneck import base_of


@one_run_per_folder
def run(recipe: ClassifyRecipe) -> ClassifyResult:
    """Train a classifier; returns the results, which are also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return ClassifyResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe), tf32=recipe.tf32)
    plan = batch_plan(recipe, world.size)
    inputs = check_classifier_inputs(recipe)
    rows = load_rows(DataSettings.from_recipe(recipe), Labelled)
    label_set = find_labels(rows.train, rows.evaluation, recipe.problem_type)
    check_imbalance(recipe, label_set)
    tokenize = partial(
        tokenize_labelled,
        tokenizer=inputs.tokenizer,
        label_set=label_set,
        max_length=recipe.max_length,
        on_bad_row=recipe.on_bad_row,
        is_encoder=inputs.is_encoder,
        ends_once=is_encoder_decoder(inputs.config),
    )
    skipped = {}
    train_rows, skipped["train"] = tokenize(rows.train)
    check_rows_fit(train_rows["input_ids"], inputs.config)
    world.check_rows(len(train_rows))
    padded = pad_to_batches(train_rows, plan.batch_size)
    weights = class_weights(recipe.class_weights, label_set, train_rows["labels"][:])
    sampler = None
    if recipe.balanced_sampling:
        sampler = BalancedSampler(train_rows["labels"][:], len(padded), recipe.seed)
    eval_rows = baseline = None
    if rows.evaluation:
        eval_rows, skipped["evaluation"] = tokenize(rows.evaluation)
        check_rows_fit(eval_rows["input_ids"], inputs.config)
        baseline = label_metrics.constant_baseline(label_set, train_rows["labels"][:], eval_rows["labels"][:])
        eval_rows = pad_to_batches(eval_rows, world.size * eval_batch_size(recipe, len(eval_rows), world.size))
    steps = total_steps(recipe, len(padded), plan)

    checkpoint = last_checkpoint(recipe, world, rows.report)
    start = write_untrained(
        recipe.output_dir,
        recipe.seed,
        world,
        checkpoint is not None,
        partial(write_classifier, recipe, inputs.tokenizer, label_set),
    )
    with Tracker(recipe, "classify", steps, resume_step=step_of(checkpoint)) as tracker:
        tracker.say(plan.describe())
        tracker.say(f"{label_set.problem_type}: {label_set.describe()}")
        if weights is not None:
            shown = (f"{name} {weight:.4g}" for name, weight in zip(label_set.names, weights, strict=True))
            tracker.say(f"class_weights: {', '.join(islice(shown, SHOWN))}{', ...' * (len(weights) > SHOWN)}")
        arguments = row_training_arguments(
            training_arguments(recipe, plan, world, eval_rows, resuming=checkpoint is not None)
        )
        load_untrained = partial(
            new_classifier,
            start,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
        )
        model = load_untrained()
        whole = trained_whole(model, base_of(recipe.model_name_or_path))
        model = apply_method(model, recipe, "SEQ_CLS", model.get_submodule(whole[-1]), whole)
        trainer = LabelTrainer(
            label_set,
            weights,
            sampler,
            model=model,
            args=arguments,
            train_dataset=padded,
            eval_dataset=eval_rows,
            data_collator=RowCollator(inputs.tokenizer),
            processing_class=inputs.tokenizer,
        )
        before, after = train(trainer, recipe, tracker, checkpoint)
        per_label = last_label_table(trainer) if eval_rows and not untrained_is_best(trainer, recipe) else []
        save_trained(trainer, recipe, world, load_untrained)
        rule = constant_answer(label_set)
        results = evaluation_results(before, after, baseline, steps, item="row", rule=rule)
        if per_label:
            tracker.table(trainer.state.global_step, "labels", LABEL_COLUMNS, per_label)
            more = f"({len(per_label) - SHOWN} more labels in README.md)\n" if len(per_label) > SHOWN else ""
            tracker.say("\n" + markdown_table(LABEL_COLUMNS, per_label[:SHOWN]) + more)
        if results["table"]:
            tracker.say("\n" + markdown_table(["measure", "before", "after"], results["table"]))
        if world.is_main:
            data = {**rows.report, "skipped": skipped}
            card = model_card(
                recipe.model_name_or_path,
                recipe.output_dir,
                label_set,
                is_encoder=inputs.is_encoder,
                pairs=any(row.text_pair is not None for row in rows.train),
            )
            if per_label:
                card += f"\n## Labels\n\n{markdown_table(LABEL_COLUMNS, per_label)}"
            problem = {"problem_type": label_set.problem_type, "labels": label_set.names, "class_weights": weights}
            finish(recipe, inputs.tokenizer, data, results, card, **problem)
    world.barrier()
    disconnect()
    return ClassifyResult.from_json(recipe.output_dir, results)


def check_classifier_inputs(recipe: ClassifyRecipe) -> HeadInputs:
    """`check_head_inputs` of a classifier; errors as there."""
    inputs = check_head_inputs(recipe, recipe.model_name_or_path, AutoModelForSequenceClassification)
    # PPO passes ids alone to a reward model, so it is trained without token types, and the saved tokenizer makes none.
    tokenizer = inputs.tokenizer
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # `save_pretrained` writes `init_kwargs`
    return inputs


def write_classifier(
    recipe: ClassifyRecipe, tokenizer: PreTrainedTokenizerBase, label_set: LabelSet, folder: Path
) -> None:
    """Write the model that training starts from. An existing head of the right size is kept, else the head is new."""
    names = dict(enumerate(label_set.names))
    model = new_classifier(
        base_of(recipe.model_name_or_path),
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        problem_type=label_set.problem_type,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model.config.get_text_config().pad_token_id = saved_pad_id(model.config, tokenizer, scores=True)
    model.config.score_mean = 0.0  # a reward model's normalization does not apply any more
    model.save_pretrained(folder)


class LabelTrainer(CountedEvaluation):
    """Trainer with the loss and the metrics of a label set, exact over all rows and ranks."""

    def __init__(
        self, label_set: LabelSet, class_weights: list[float] | None, sampler: BalancedSampler | None, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.label_set, self.sampler = label_set, sampler
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, device=self.args.device)
        self.accuracy = "mse" if label_set.problem_type == REGRESSION else "accuracy"

    def loss_and_correct(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        losses = label_metrics.losses(self.label_set, logits, labels) * weight
        if not self.model.training:
            self.counts = self.counts + label_metrics.counts(self.label_set, logits, labels, weight)
        elif self.class_weights is not None:
            losses = losses * self.class_weights[labels]
        return losses.sum(), (label_metrics.correct(self.label_set, logits, labels) * weight).sum()

    def loss_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Rows, or the sum of their labels' weights."""
        if self.class_weights is None:
            return super().loss_items(batch)
        return (self.class_weights.to(batch["weight"].device)[batch["labels"]] * batch["weight"]).sum()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler or super()._get_train_sampler(train_dataset)

    def summarize(self, counts: Tensor, correct: float, items: float) -> dict[str, float]:
        return label_metrics.summarize(self.label_set, counts, correct, int(items))


def last_label_table(trainer: LabelTrainer) -> list[list[Any]]:
    """`per_label_table` of the last evaluation. Every rank must call it."""
    return label_metrics.per_label_table(trainer.label_set, last_counts(trainer))
