"""`align check` of a recipe for `align classify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForSequenceClassification

from align.cli.check.memory import Footprint, count_trained, skeleton
from align.cli.check.sample_rows import Sample, Start
from align.cli.check.training import TrainingCheck
from align.config.encoders import ClassifyRecipe
from align.data.load import Rows
from align.data.rows import Labelled
from align.encoders.classify import check_classifier_inputs
from align.encoders.imbalance import check_imbalance, describe_imbalance
from align.encoders.labels import SINGLE, find_labels
from align.encoders.tokenize import tokenize_labelled
from align.models.model_types import is_encoder_decoder
from align.models.new_modules import trained_whole
from reward_models.bottleneck import base_of


class ClassifyCheck(TrainingCheck[ClassifyRecipe]):
    """The size of the head depends on the labels of the rows."""

    form = Labelled
    auto = AutoModelForSequenceClassification
    has_logits = False

    def start(self, recipe: ClassifyRecipe, rows: Rows | None, folder: Path) -> Start | None:
        if rows is None:
            return None
        inputs = check_classifier_inputs(recipe)
        labels = find_labels(rows.train, rows.evaluation, recipe.problem_type)
        check_imbalance(recipe, labels)
        inputs.config.num_labels = len(labels.names)
        notes = [describe_imbalance(labels)] if labels.problem_type == SINGLE else []
        return Start(inputs.config, inputs.tokenizer, inputs.is_encoder, labels=labels, notes=notes)

    def sample(self, recipe: ClassifyRecipe, rows: Sequence[Labelled], start: Start) -> Sample:
        assert start.labels is not None
        data, bad = tokenize_labelled(
            rows,
            start.tokenizer,
            start.labels,
            max_length=recipe.max_length,
            on_bad_row=recipe.on_bad_row,
            is_encoder=start.encoder,
            ends_once=is_encoder_decoder(start.config),
        )
        ids = data[0]["input_ids"]
        read = 0 if start.encoder else len(ids) - 1
        note = f"marked: the token from which the label is read; {start.labels.problem_type}, {start.labels.describe()}"
        shown = {f"row labeled {rows[0].label!r}": (ids, [index == read for index in range(len(ids))])}
        return Sample(shown, note, data["input_ids"][:], bad)

    def footprints(self, recipe: ClassifyRecipe, start: Start) -> list[Footprint]:
        model = skeleton(AutoModelForSequenceClassification, start.config, recipe.trust_remote_code)
        whole = trained_whole(model, base_of(recipe.model_name_or_path))
        counts = count_trained(model, recipe, "SEQ_CLS", model.get_submodule(whole[-1]), whole)
        return [Footprint("classifier", *counts)]


check = ClassifyCheck().check
