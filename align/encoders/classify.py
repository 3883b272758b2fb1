"""A classifier, or a regression, on texts and pairs of texts, by transformers' Trainer.

    align classify recipe.yaml
    deepspeed --num_gpus 8 --module align classify recipe.yaml

Rows are {text, label} or {text, text_pair, label}; an encoder (BERT-like) or a decoder gets a classification head. The
loss of an optimiser step is the sum over its rows, of all microbatches and ranks, divided by their number. A regression
on prompts (`text`) and responses (`text_pair`) is a reward model that PPO can use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.compat import pending_metrics
from align.config.encoders import ClassifyRecipe
from align.data.batches import pad_to_batches
from align.data.load import DataSettings, load_rows
from align.data.rows import Labelled
from align.encoders.labels import LABEL_COLUMNS, MULTI, REGRESSION, SHOWN, Labels, find_labels
from align.encoders.tokenize import tokenize_labelled
from align.engine.batch_plan import batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import connect, disconnect
from align.models.context_length import check_rows_fit
from align.models.load import head_modules, is_encoder, load_config, new_classifier
from align.models.tokenizer import load_tokenizer, set_right_padding
from align.models.trainable import freeze, peft_config
from align.runs.manifest import check_tokenizer, open_stage
from align.runs.quiet import quiet
from align.runs.results import ClassifyResult
from align.runs.stage import finish, finished_results, last_checkpoint, step_of, write_untrained
from align.runs.tables import markdown_table
from align.runs.tracker import Tracker
from align.trainer.hf_trainer import (
    ExactEvaluation,
    eval_batch_size,
    save_trained,
    total_steps,
    train,
    training_arguments,
)
from align.trainer.row_trainer import RowCollator, RowTrainer, row_training_arguments


def run(recipe: ClassifyRecipe) -> ClassifyResult:
    """Train a classifier; returns the closing numbers, also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return ClassifyResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe))
    plan = batch_plan(recipe, world.size)
    inputs = check_inputs(recipe)
    rows = load_rows(DataSettings.from_recipe(recipe), Labelled)
    labels = find_labels(rows.train, rows.evaluation, recipe.problem_type)
    skipped = {}
    train_rows, skipped["train"] = tokenize_labelled(rows.train, inputs.tokenizer, labels, recipe, inputs.encoder)
    check_rows_fit(train_rows["input_ids"], inputs.config)
    world.check_rows(len(train_rows))
    padded = pad_to_batches(train_rows, plan.batch_size)
    eval_rows = baseline = None
    if rows.evaluation:
        eval_rows, skipped["evaluation"] = tokenize_labelled(
            rows.evaluation, inputs.tokenizer, labels, recipe, inputs.encoder
        )
        check_rows_fit(eval_rows["input_ids"], inputs.config)
        baseline = labels.baseline(train_rows["labels"][:], eval_rows["labels"][:])
        eval_rows = pad_to_batches(eval_rows, world.size * eval_batch_size(recipe, len(eval_rows), world))
    steps = total_steps(recipe, len(padded), plan)

    checkpoint = last_checkpoint(recipe, world)
    start = write_untrained(
        recipe.output_dir, recipe.seed, world, checkpoint is not None, partial(write_classifier, recipe, inputs, labels)
    )
    with Tracker(recipe, "classify", steps, resume_step=step_of(checkpoint)) as tracker:
        tracker.say(plan.describe())
        tracker.say(f"{labels.problem_type}: {labels.describe()}")
        arguments = row_training_arguments(
            training_arguments(recipe, plan, world, eval_rows, resuming=checkpoint is not None)
        )
        model: Any = new_classifier(
            start, attn_implementation=recipe.attn_implementation, trust_remote_code=recipe.trust_remote_code
        )
        whole = head_modules(model)
        freeze(model, model.get_submodule(whole[-1]), recipe.method, recipe.freeze_layers, recipe.trainable_pattern)
        if adapter := peft_config(recipe, "SEQ_CLS", whole):
            torch.manual_seed(recipe.seed)
            model = get_peft_model(model, adapter)
        trainer = LabelTrainer(
            labels,
            model=model,
            args=arguments,
            train_dataset=padded,
            eval_dataset=eval_rows,
            data_collator=RowCollator(inputs.tokenizer),
            processing_class=inputs.tokenizer,
        )
        before, after = train(trainer, recipe, tracker, checkpoint)
        by_label = label_table(trainer) if eval_rows else []
        save_trained(
            trainer,
            recipe,
            world,
            lambda: new_classifier(
                start, attn_implementation=recipe.attn_implementation, trust_remote_code=recipe.trust_remote_code
            ),
        )
        results = closing_numbers(labels, before, after, baseline, steps)
        if by_label:
            tracker.table(trainer.state.global_step, "labels", LABEL_COLUMNS, by_label)
            more = f"({len(by_label) - SHOWN} more labels in README.md)\n" if len(by_label) > SHOWN else ""
            tracker.say("\n" + markdown_table(LABEL_COLUMNS, by_label[:SHOWN]) + more)
        if results["table"]:
            tracker.say("\n" + markdown_table(["measure", "before", "after"], results["table"]))
        if world.is_main:
            data = {**rows.report, "skipped": skipped}
            card = write_card(recipe, inputs, labels, pairs=any(row.text_pair is not None for row in rows.train))
            if by_label:
                card += f"\n## Labels\n\n{markdown_table(LABEL_COLUMNS, by_label)}"
            told = {"problem_type": labels.problem_type, "labels": labels.names}
            finish(recipe, inputs.tokenizer, data, results, card, **told)
    world.barrier()
    disconnect()
    return ClassifyResult.from_json(recipe.output_dir, results)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known before any weight is loaded."""

    config: PretrainedConfig
    encoder: bool
    tokenizer: PreTrainedTokenizerBase


def check_inputs(recipe: ClassifyRecipe) -> Inputs:
    """Read the configuration, tokenizer and manifest of the model to start from.

    Raises:
        UserError: it is missing, unfinished or of the wrong kind, or the tokenizer is not the one it was trained with.
    """
    path, key = recipe.model_name_or_path, "model_name_or_path"
    config = load_config(path, key, recipe.trust_remote_code)
    tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code)
    check_tokenizer(path, tokenizer, key)
    set_right_padding(tokenizer)
    # PPO shows a reward model ids and nothing else, so it is trained without token types; plain
    # transformers, reading the saved tokenizer, leaves them out too.
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # else it is not saved with the others
    return Inputs(config, is_encoder(config), tokenizer)


def write_classifier(recipe: ClassifyRecipe, inputs: Inputs, labels: Labels, folder: Path) -> None:
    """Write the untrained classifier: the backbone with a new head, or with the one it has if that has the right size."""
    names = dict(enumerate(labels.names))
    model = new_classifier(
        recipe.model_name_or_path,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        problem_type=labels.problem_type,
        id2label=names,
        label2id={name: place for place, name in names.items()},
    )
    model.config.get_text_config().pad_token_id = inputs.tokenizer.pad_token_id
    model.config.score_mean = 0.0  # the zero of a reward model that this one may have been
    model.save_pretrained(folder)


class LabelTrainer(ExactEvaluation, RowTrainer):
    """Trainer with the loss and the measures of a label set, exact over all rows and ranks."""

    counts: Tensor  # of the evaluation, as `Labels.counts`
    judged: Tensor | None = None  # their sum over ranks, once this process has evaluated

    def __init__(self, labels: Labels, **kwargs: Any):
        super().__init__(**kwargs)
        self.labels = labels
        self.accuracy = "mse" if labels.problem_type == REGRESSION else "accuracy"

    def loss_and_correct(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if not self.model.training:
            self.counts = self.counts + self.labels.counts(logits, labels, weight)
        total = (self.labels.losses(logits, labels) * weight).sum()
        return total, (self.labels.correct(logits, labels) * weight).sum()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.counts = torch.zeros((), dtype=torch.float64, device=self.args.device)
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:
            _, correct, count = self.accelerator.reduce(self.sums, "sum").tolist()
            self.judged = self.accelerator.reduce(self.counts, "sum").cpu()
            measures = self.labels.summary(self.judged, correct, count)
            pending_metrics(self, "eval").update({name: [value] for name, value in measures.items()})
        super().log(logs, start_time)


def label_table(trainer: LabelTrainer) -> list[list[Any]]:
    """Precision, recall and errors of each label at the last evaluation, commonest label first. For all ranks."""
    if trainer.judged is None:  # resumed after the last one
        trainer.evaluate()
    assert trainer.judged is not None
    return sorted(trainer.labels.table(trainer.judged), key=lambda row: -row[1])


MEASURES = {
    "accuracy": "accuracy",
    "accuracy_low": "accuracy, 95% interval from",
    "accuracy_high": "accuracy, 95% interval to",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "macro_f1_low": "macro F1, 95% interval from",
    "macro_f1_high": "macro F1, 95% interval to",
    "mse": "mean squared error",
    "pearson": "Pearson correlation",
}


def closing_numbers(
    labels: Labels, before: dict[str, float], after: dict[str, float], baseline: dict[str, float] | None, steps: int
) -> dict[str, Any]:
    """The stage's results, from the evaluation logs before and after training; without these, only the steps."""
    results: dict[str, Any] = {"steps": steps, "table": []}
    if baseline is None:
        return results
    for name in ("loss", *baseline):
        results[f"eval_{name}_before"], results[f"eval_{name}"] = before[f"eval_{name}"], after[f"eval_{name}"]
    results["baseline"] = baseline
    plain = {"regression": "always the mean", MULTI: "always the commonest labels"}.get(
        labels.problem_type, "always the commonest label"
    )
    results["table"] = [["held-out loss (per row)", before["eval_loss"], after["eval_loss"]]]
    named = [name for name in baseline if name in MEASURES]
    results["table"] += [
        [f"held-out {MEASURES[name]}", before[f"eval_{name}"], after[f"eval_{name}"]] for name in named
    ]
    results["table"] += [
        [f"{MEASURES[name]} of {plain}", None, baseline[name]]
        for name in named
        if not name.endswith(("pearson", "_low", "_high"))  # a constant correlates with nothing
    ]
    return results


def write_card(recipe: ClassifyRecipe, inputs: Inputs, labels: Labels, pairs: bool) -> str:
    """The model card: what it tells apart, and how to ask it."""
    ids = 'tokenizer(text)["input_ids"]'
    if pairs:
        ids = PAIR_IDS if inputs.encoder else DECODER_PAIR_IDS
    answers = {
        REGRESSION: "value = float(logits)",
        MULTI: "labels = [model.config.id2label[i] for i, logit in enumerate(logits) if logit > 0]",
    }.get(labels.problem_type, "label = model.config.id2label[int(logits.argmax())]")
    return CARD.format(
        base=recipe.model_name_or_path,
        problem=labels.problem_type.replace("_", " "),
        names="" if labels.problem_type == REGRESSION else f" of {', '.join(f'`{name}`' for name in labels.names)}",
        folder=recipe.output_dir,
        ids=ids,
        answer=answers,
    )


CARD = """# A text classifier

Trained from {base} by the `classify` stage of align: {problem}{names}.

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
ids = {ids}
logits = model(torch.tensor([ids])).logits[0]
{answer}
```
"""
PAIR_IDS = 'tokenizer(text, text_pair)["input_ids"]'
DECODER_PAIR_IDS = """tokenizer(text)["input_ids"]
ids += tokenizer(text_pair, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]"""
