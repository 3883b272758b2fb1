"""Extractive question answering: the answer to a question as a span of a passage, by transformers' Trainer.

    align question-answering recipe.yaml
    deepspeed --num_gpus 8 --module align question-answering recipe.yaml

Rows are {question, context, answers}, as in SQuAD, with or without questions that have no answer. An encoder (BERT-like)
gets a head for the first and the last token of the answer. Long passages are read in overlapping windows. The loss of an
optimizer step is the mean over the windows of all microbatches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from align.config.extraction import QuestionAnsweringRecipe
from align.data.batches import pad_to_batches
from align.data.collate import pad_right
from align.data.load import DataSettings, load_rows
from align.data.rows import Question
from align.encoders.alignment import check_fast
from align.encoders.answer_metrics import (
    ANSWER_COLUMNS,
    answer_metrics,
    answer_scores,
    answer_table,
    answers_of,
    floor_scores,
)
from align.encoders.classifier_report import evaluation_results
from align.encoders.counted import CountedEvaluation, last_counts
from align.encoders.inputs import HeadInputs, check_has_head, check_head_inputs
from align.encoders.method import apply_method
from align.encoders.span_cards import reader_card
from align.encoders.tokenize import piece_length
from align.encoders.windows import Window, best_answers, null_score, tokenize_questions
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
from align.runs.results import QuestionAnsweringResult
from align.runs.stage import finish, finished_results, last_checkpoint, write_untrained
from align.runs.tables import markdown_table
from align.runs.tracker import Tracker
from align.trainer.arguments import eval_batch_size, total_steps, training_arguments
from align.trainer.hf_trainer import save_trained, train, untrained_is_best
from align.trainer.row_trainer import RowCollator, row_training_arguments
from reward_models.bottleneck import base_of


@one_run_per_folder
def run(recipe: QuestionAnsweringRecipe) -> QuestionAnsweringResult:
    """Train a model that answers from a passage; returns the results, which are also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return QuestionAnsweringResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe), tf32=recipe.tf32)
    plan = batch_plan(recipe, world.size)
    inputs = check_reader_inputs(recipe)
    rows = load_rows(DataSettings.from_recipe(recipe), Question)
    length = piece_length(inputs.tokenizer, inputs.config, recipe.max_length)
    tokenize = partial(
        tokenize_questions,
        tokenizer=inputs.tokenizer,
        max_length=length,
        doc_stride=recipe.doc_stride,
        on_bad_row=recipe.on_bad_row,
    )
    skipped = {}
    train_rows, _, questions, skipped["train"] = tokenize(rows.train)
    check_rows_fit(train_rows["input_ids"], inputs.config)
    world.check_rows(len(train_rows))
    padded = pad_to_batches(train_rows, plan.batch_size)
    unanswerable = any(not question.answers for question in questions)
    eval_rows = baseline = None
    windows: list[Window] = []
    held_out: list[Question] = []
    if rows.evaluation:
        eval_rows, windows, held_out, skipped["evaluation"] = tokenize(rows.evaluation)
        check_rows_fit(eval_rows["input_ids"], inputs.config)
        baseline = answer_metrics(floor_scores(questions, held_out))
        eval_rows = pad_to_batches(eval_rows, world.size * eval_batch_size(recipe, len(eval_rows), world.size))
    steps = total_steps(recipe, len(padded), plan)

    checkpoint = last_checkpoint(recipe, world, rows.report)
    start = write_untrained(
        recipe.output_dir, recipe.seed, world, checkpoint is not None, partial(write_reader, recipe)
    )
    with Tracker(recipe, "question-answering", steps, resume_step=step_of(checkpoint)) as tracker:
        tracker.say(plan.describe())
        tracker.say(describe_questions(questions, len(train_rows), length))
        arguments = row_training_arguments(
            training_arguments(recipe, plan, world, eval_rows, resuming=checkpoint is not None)
        )
        load_untrained = partial(
            new_head,
            AutoModelForQuestionAnswering,
            start,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
        )
        model = load_untrained()
        whole = trained_whole(model, base_of(recipe.model_name_or_path))
        model = apply_method(model, recipe, "QUESTION_ANS", model.get_submodule(whole[-1]), whole)
        trainer = AnswerTrainer(
            windows,
            held_out,
            unanswerable,
            recipe.max_answer_length,
            model=model,
            args=arguments,
            train_dataset=padded,
            eval_dataset=eval_rows,
            data_collator=WindowCollator(inputs.tokenizer),
            processing_class=inputs.tokenizer,
        )
        before, after = train(trainer, recipe, tracker, checkpoint)
        table = []
        if eval_rows and not untrained_is_best(trainer, recipe):
            table = answer_table(trainer.scores(last_counts(trainer)), held_out)
        save_trained(trainer, recipe, world, load_untrained)
        rule = "the commonest answer that the passage holds"
        results = evaluation_results(before, after, baseline, steps, item="window", rule=rule)
        if table:
            tracker.table(trainer.state.global_step, "questions", ANSWER_COLUMNS, table)
            tracker.say("\n" + markdown_table(ANSWER_COLUMNS, table))
        if results["table"]:
            tracker.say("\n" + markdown_table(["measure", "before", "after"], results["table"]))
        if world.is_main:
            data = {**rows.report, "skipped": skipped, "windows": len(train_rows)}
            card = reader_card(recipe.model_name_or_path, recipe.output_dir, unanswerable)
            if table:
                card += f"\n## Questions\n\n{markdown_table(ANSWER_COLUMNS, table)}"
            finish(recipe, inputs.tokenizer, data, results, card, unanswerable=unanswerable)
    world.barrier()
    disconnect()
    return QuestionAnsweringResult.from_json(recipe.output_dir, results)


def check_reader_inputs(recipe: QuestionAnsweringRecipe) -> HeadInputs:
    """`check_head_inputs` of an encoder whose tokenizer knows the characters of its tokens; errors as there."""
    path = recipe.model_name_or_path
    inputs = check_head_inputs(recipe, path, AutoModelForQuestionAnswering, of_encoders=True)
    check_has_head(AutoModelForQuestionAnswering, path, inputs.config)
    check_fast(inputs.tokenizer, path)
    return inputs


def describe_questions(questions: Sequence[Question], windows: int, length: int) -> str:
    """How many questions and windows there are, and how many questions have no answer."""
    without = sum(not question.answers for question in questions)
    none = f", {without} without an answer" if without else ""
    return f"{len(questions)} questions{none} in {windows} windows of up to {length} tokens"


def write_reader(recipe: QuestionAnsweringRecipe, folder: Path) -> None:
    """Write the model that training starts from. An existing head is kept, else the head is new."""
    new_head(
        AutoModelForQuestionAnswering,
        base_of(recipe.model_name_or_path),
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        num_labels=2,
    ).save_pretrained(folder)


class WindowCollator(RowCollator):
    """`RowCollator` with the numbers of the windows, and the kinds of tokens where the tokenizer makes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer)
        self.pad_type = int(getattr(tokenizer, "pad_token_type_id", 0))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = {**super().__call__(rows), "row": torch.tensor([row["row"] for row in rows])}
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = pad_right([row["token_type_ids"] for row in rows], self.pad_type)[0]
        return batch


class AnswerTrainer(CountedEvaluation):
    """Trainer with the loss of both ends of the answer, and exact match and F1 of answers, exact over all rows and ranks.

    `counts` holds, for each held-out window, score, first character and the one after the last of its best answer, and the
    score of no answer, [windows, 4].
    """

    accuracy = "accuracy"

    def __init__(
        self, windows: Sequence[Window], held_out: Sequence[Question], unanswerable: bool, longest: int, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.windows, self.held_out, self.unanswerable, self.longest = windows, held_out, unanswerable, longest

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.numbers, self.mask = inputs["row"].tolist(), inputs["attention_mask"].bool()
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "row"}, *args, **kwargs)

    def logits_of(self, output: Any) -> Tensor:
        """Logits of first and last token, [B, S, 2]."""
        return torch.stack([output.start_logits, output.end_logits], dim=-1)

    def no_counts(self) -> Tensor:
        return torch.zeros(len(self.windows), 4, dtype=torch.float64)

    def loss_and_correct(self, logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.masked_fill(~self.mask[..., None], -torch.inf)  # padding can be no end of an answer
        if not self.model.training:
            for number, window_logits, items in zip(self.numbers, logits, weight.tolist(), strict=True):
                if items:
                    self.counts[number] = self._found(window_logits, self.windows[number]).to(self.counts.device)
        losses = cross_entropy(logits, labels, reduction="none").mean(dim=1)
        correct = (logits.argmax(dim=1) == labels).all(dim=1)
        return (losses * weight).sum(), (correct * weight).sum()

    def _found(self, logits: Tensor, window: Window) -> Tensor:
        best = best_answers(logits, window.places, self.longest)
        score, start, end = (best[0].score, best[0].start, best[0].end) if best else (0.0, 0, 0)
        return torch.tensor([score, start, end, null_score(logits)], dtype=torch.float64)

    def scores(self, counts: Tensor) -> Any:
        """Exact match, F1 and 1 of each held-out question, [questions, 3]."""
        answers = answers_of(self.windows, counts.cpu().numpy(), self.held_out, self.unanswerable)
        return answer_scores(answers, self.held_out)

    def summarize(self, counts: Tensor, correct: float, items: float) -> dict[str, float]:
        return answer_metrics(self.scores(counts))
