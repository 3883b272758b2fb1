"""`align check` of a recipe for `align token-classification`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForTokenClassification

from align.cli.check.memory import Footprint, count_trained, skeleton
from align.cli.check.sample_rows import Sample, Start
from align.cli.check.training import TrainingCheck
from align.config.extraction import TokenClassificationRecipe
from align.data.load import Rows
from align.data.rows import Tagged
from align.encoders.alignment import describe_split, tokenize_tagged
from align.encoders.tags import OUTSIDE, find_tags
from align.encoders.token_classification import check_tagger_inputs
from align.models.new_modules import trained_whole
from reward_models.bottleneck import base_of


class TokenClassificationCheck(TrainingCheck[TokenClassificationRecipe]):
    """The size of the head depends on the tags of the rows."""

    form = Tagged
    auto = AutoModelForTokenClassification
    has_logits = False

    def start(self, recipe: TokenClassificationRecipe, rows: Rows | None, folder: Path) -> Start | None:
        inputs = check_tagger_inputs(recipe)
        if rows is None:
            return None
        tag_set = find_tags(rows.train, rows.evaluation, recipe.label_names, recipe.on_bad_row)
        inputs.config.num_labels = len(tag_set.labels)
        return Start(inputs.config, inputs.tokenizer, inputs.is_encoder, tags=tag_set)

    def sample(self, recipe: TokenClassificationRecipe, rows: Sequence[Tagged], start: Start) -> Sample:
        assert start.tags is not None
        data, examples, bad = tokenize_tagged(
            rows, start.tokenizer, start.tags, max_length=recipe.max_length, on_bad_row=recipe.on_bad_row
        )
        outside = {-100, *(index for index, name in enumerate(start.tags.labels) if name == OUTSIDE)}
        first = next((place for place, example in enumerate(examples) if example.gold), 0)
        names = ", ".join(dict.fromkeys(name for *_, name in examples[first].gold))
        shown = {f"row with {names or 'no entity'}": (
            data[first]["input_ids"], [label not in outside for label in data[first]["labels"]]
        )}  # fmt: skip
        note = f"marked: the tokens with a label other than {OUTSIDE}; {start.tags.describe()}"
        if split := describe_split(examples):
            note += f"; {split}"
        return Sample(shown, note, data["input_ids"][:], bad)

    def footprints(self, recipe: TokenClassificationRecipe, start: Start) -> list[Footprint]:
        model = skeleton(AutoModelForTokenClassification, start.config, recipe.trust_remote_code)
        whole = trained_whole(model, base_of(recipe.model_name_or_path))
        counts = count_trained(model, recipe, "TOKEN_CLS", model.get_submodule(whole[-1]), whole)
        return [Footprint("token classifier", *counts)]


check = TokenClassificationCheck().check
