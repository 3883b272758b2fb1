"""`align check` of a recipe for `align question-answering`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForQuestionAnswering

from align.cli.check.memory import Footprint, count_trained, skeleton
from align.cli.check.sample_rows import Sample, Start
from align.cli.check.training import TrainingCheck
from align.config.extraction import QuestionAnsweringRecipe
from align.data.load import Rows
from align.data.rows import Question
from align.encoders.question_answering import check_reader_inputs, describe_questions
from align.encoders.tokenize import piece_length
from align.encoders.windows import NO_ANSWER, tokenize_questions
from align.models.new_modules import trained_whole
from reward_models.bottleneck import base_of


class QuestionAnsweringCheck(TrainingCheck[QuestionAnsweringRecipe]):
    form = Question
    auto = AutoModelForQuestionAnswering
    num_labels = 2
    has_logits = False

    def start(self, recipe: QuestionAnsweringRecipe, rows: Rows | None, folder: Path) -> Start:
        inputs = check_reader_inputs(recipe)
        inputs.config.num_labels = 2
        return Start(inputs.config, inputs.tokenizer, inputs.is_encoder)

    def sample(self, recipe: QuestionAnsweringRecipe, rows: Sequence[Question], start: Start) -> Sample:
        length = piece_length(start.tokenizer, start.config, recipe.max_length)
        data, _, questions, bad = tokenize_questions(
            rows, start.tokenizer, max_length=length, doc_stride=recipe.doc_stride, on_bad_row=recipe.on_bad_row
        )
        first = next((number for number, (begin, _) in enumerate(data["labels"]) if begin != NO_ANSWER), 0)
        begin, end = data[first]["labels"]
        ids = data[first]["input_ids"]
        shown = {"window": (ids, [begin <= index <= end for index in range(len(ids))])}
        note = f"marked: the answer; {describe_questions(questions, len(data), length)}"
        return Sample(shown, note, data["input_ids"][:], bad)

    def footprints(self, recipe: QuestionAnsweringRecipe, start: Start) -> list[Footprint]:
        model = skeleton(AutoModelForQuestionAnswering, start.config, recipe.trust_remote_code)
        whole = trained_whole(model, base_of(recipe.model_name_or_path))
        counts = count_trained(model, recipe, "QUESTION_ANS", model.get_submodule(whole[-1]), whole)
        return [Footprint("question answering model", *counts)]


check = QuestionAnsweringCheck().check
