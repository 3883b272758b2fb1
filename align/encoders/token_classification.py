"""Labels inside a text: named entities, slots or parts of speech, by transformers' Trainer.

    align token-classification recipe.yaml
    deepspeed --num_gpus 8 --module align token-classification recipe.yaml

Rows are {tokens, tags} or {text, spans}. An encoder (BERT-like) or a decoder gets a head that labels each token. The loss
of an optimizer step is the mean over the labeled tokens of all microbatches and ranks. Entities are evaluated whole: first
character, last one and type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForTokenClassification

from align.config.extraction import TokenClassificationRecipe
from align.data.batches import pad_to_batches
from align.data.collate import pad_right
from align.data.load import DataSettings, load_rows
from align.data.rows import Tagged
from align.data.tokenize import IGNORE_INDEX
from align.encoders.alignment import Example, check_fast, decode, describe_held_out, describe_split, tokenize_tagged
from align.encoders.classifier_report import evaluation_results
from align.encoders.counted import CountedEvaluation, last_counts
from align.encoders.entity_metrics import (
    TYPE_COLUMNS,
    commonest_tags,
    count_entities,
    entity_metrics,
    type_table,
)
from align.encoders.inputs import HeadInputs, check_has_head, check_head_inputs
from align.encoders.labels import SHOWN
from align.encoders.method import apply_method
from align.encoders.span_cards import tagger_card
from align.encoders.tags import TagSet, find_tags
from align.engine.batch_plan import batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import connect, disconnect
from align.models.context_length import check_rows_fit
from align.models.load import new_head
from align.models.new_modules import trained_whole
from align.runs.checkpoint import step_of
from align.runs.manifest import open_stage
from align.runs.output_folder import one_run_per_folder
from align.runs.quiet import quiet
from align.runs.results import TokenClassificationResult
from align.runs.stage import finish, finished_results, last_checkpoint, write_untrained
from align.runs.tables import markdown_table
from align.runs.tracker import Tracker
from align.trainer.arguments import eval_batch_size, total_steps, training_arguments
from align.trainer.hf_trainer import save_trained, train, untrained_is_best
from align.trainer.row_trainer import RowCollator, row_training_arguments
from reward_models.bottleneck import base_of


@one_run_per_folder
def run(recipe: TokenClassificationRecipe) -> TokenClassificationResult:
    """Train a token classifier; returns the results, which are also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return TokenClassificationResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe), tf32=recipe.tf32)
    plan = batch_plan(recipe, world.size)
    inputs = check_tagger_inputs(recipe)
    rows = load_rows(DataSettings.from_recipe(recipe), Tagged)
    tag_set = find_tags(rows.train, rows.evaluation, recipe.label_names, recipe.on_bad_row)
    tokenize = partial(
        tokenize_tagged,
        tokenizer=inputs.tokenizer,
        tag_set=tag_set,
        max_length=recipe.max_length,
        on_bad_row=recipe.on_bad_row,
    )
    skipped = {}
    train_rows, examples, skipped["train"] = tokenize(rows.train)
    check_rows_fit(train_rows["input_ids"], inputs.config)
    world.check_rows(len(train_rows))
    padded = pad_to_batches(train_rows, plan.batch_size)
    eval_rows = baseline = None
    held_out: list[Example] = []
    if rows.evaluation:
        eval_rows, held_out, skipped["evaluation"] = tokenize(rows.evaluation)
        check_rows_fit(eval_rows["input_ids"], inputs.config)
        baseline = entity_metrics(commonest_tags(tag_set, examples, held_out))
        eval_rows = pad_to_batches(eval_rows, world.size * eval_batch_size(recipe, len(eval_rows), world.size))
    steps = total_steps(recipe, len(padded), plan)

    checkpoint = last_checkpoint(recipe, world, rows.report)
    start = write_untrained(
        recipe.output_dir, recipe.seed, world, checkpoint is not None, partial(write_tagger, recipe, tag_set)
    )
    with Tracker(recipe, "token-classification", steps, resume_step=step_of(checkpoint)) as tracker:
        tracker.say(plan.describe())
        tracker.say(tag_set.describe())
        if split := describe_split([*examples, *held_out]):
            tracker.say(split)
        if unmeasured := describe_held_out(held_out):
            tracker.say(unmeasured)
        arguments = row_training_arguments(
            training_arguments(recipe, plan, world, eval_rows, resuming=checkpoint is not None)
        )
        load_untrained = partial(
            new_head,
            AutoModelForTokenClassification,
            start,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
        )
        model = load_untrained()
        whole = trained_whole(model, base_of(recipe.model_name_or_path))
        model = apply_method(model, recipe, "TOKEN_CLS", model.get_submodule(whole[-1]), whole)
        trainer = TagTrainer(
            tag_set,
            held_out,
            model=model,
            args=arguments,
            train_dataset=padded,
            eval_dataset=eval_rows,
            data_collator=TagCollator(inputs.tokenizer),
            processing_class=inputs.tokenizer,
        )
        before, after = train(trainer, recipe, tracker, checkpoint)
        per_type = []
        if eval_rows and not untrained_is_best(trainer, recipe):
            per_type = type_table(tag_set, last_counts(trainer).numpy())
        save_trained(trainer, recipe, world, load_untrained)
        rule = "the commonest tag of each word"
        results = evaluation_results(before, after, baseline, steps, item="token", rule=rule)
        if per_type:
            tracker.table(trainer.state.global_step, "entities", TYPE_COLUMNS, per_type)
            more = f"({len(per_type) - SHOWN} more in README.md)\n" if len(per_type) > SHOWN else ""
            tracker.say("\n" + markdown_table(TYPE_COLUMNS, per_type[:SHOWN]) + more)
        if results["table"]:
            tracker.say("\n" + markdown_table(["measure", "before", "after"], results["table"]))
        if world.is_main:
            data = {**rows.report, "skipped": skipped, "split_spans": sum(each.split for each in examples)}
            card = tagger_card(recipe.model_name_or_path, recipe.output_dir, tag_set)
            if per_type:
                card += f"\n## Entities\n\n{markdown_table(TYPE_COLUMNS, per_type)}"
            finish(recipe, inputs.tokenizer, data, results, card, scheme=tag_set.scheme, labels=tag_set.labels)
    world.barrier()
    disconnect()
    return TokenClassificationResult.from_json(recipe.output_dir, results)


def check_tagger_inputs(recipe: TokenClassificationRecipe) -> HeadInputs:
    """`check_head_inputs` of a token classifier, whose tokenizer must know the characters of its tokens; errors as there."""
    inputs = check_head_inputs(recipe, recipe.model_name_or_path, AutoModelForTokenClassification)
    check_has_head(AutoModelForTokenClassification, recipe.model_name_or_path, inputs.config)
    check_fast(inputs.tokenizer, recipe.model_name_or_path)
    return inputs


def write_tagger(recipe: TokenClassificationRecipe, tag_set: TagSet, folder: Path) -> None:
    """Write the model that training starts from. An existing head of the right size is kept, else the head is new."""
    names = dict(enumerate(tag_set.labels))
    model = new_head(
        AutoModelForTokenClassification,
        base_of(recipe.model_name_or_path),
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model.save_pretrained(folder)


class TagCollator(RowCollator):
    """`RowCollator` of rows with a label for each token, and with their number; padding rows have no label."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return {**super().__call__(rows), "row": torch.tensor([row["row"] for row in rows])}

    def labels(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        labels = [row["labels"] if row["weight"] else [IGNORE_INDEX] * len(row["labels"]) for row in rows]
        return pad_right(labels, IGNORE_INDEX)[0]


class TagTrainer(CountedEvaluation):
    """Trainer with the loss of labeled tokens and the metrics of entities, exact over all rows and ranks."""

    accuracy = "accuracy"

    def __init__(self, tag_set: TagSet, held_out: Sequence[Example], **kwargs: Any):
        super().__init__(**kwargs)
        self.tag_set, self.held_out = tag_set, held_out
        self.names = tag_set.labels

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.numbers = inputs["row"].tolist()
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "row"}, *args, **kwargs)

    def no_counts(self) -> Tensor:
        return torch.zeros(len(self.held_out), len(self.tag_set.types), 3, dtype=torch.float64)

    def loss_and_correct(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        predicted = logits.argmax(dim=-1)
        if not self.model.training:
            for number, ids, items in zip(self.numbers, predicted.tolist(), weight.tolist(), strict=True):
                if items:
                    self.counts[number] = self._count(self.held_out[number], ids).to(self.counts.device)
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        return total, (predicted == labels).sum()

    def _count(self, example: Example, ids: Sequence[int]) -> Tensor:
        found = decode([self.names[ids[place]] for place in example.places], example.units, self.tag_set.scheme)
        return torch.from_numpy(count_entities(self.tag_set.types, found, example.gold))

    def summarize(self, counts: Tensor, correct: float, items: float) -> dict[str, float]:
        return entity_metrics(counts.numpy())
