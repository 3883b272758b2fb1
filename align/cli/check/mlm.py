"""`align check` of a recipe for `align mlm`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForMaskedLM

from align.cli.check.memory import Footprint, count_trained, skeleton
from align.cli.check.sample_rows import Sample, Start
from align.cli.check.training import TrainingCheck
from align.config.encoders import MLMRecipe
from align.data.load import Rows
from align.data.rows import Passage
from align.data.tokenize import IGNORE_INDEX
from align.encoders.mlm_inputs import check_mlm_inputs, corruption, cut, model_to_train
from align.encoders.span_corruption import SpanCorruption
from align.encoders.tokenize import piece_length
from align.models.model_types import is_encoder_decoder
from align.models.new_modules import new_modules
from reward_models.bottleneck import base_of


class MLMCheck(TrainingCheck[MLMRecipe]):
    """Texts are cut into pieces, some tokens of which are masked."""

    form = Passage
    auto = AutoModelForMaskedLM

    def start(self, recipe: MLMRecipe, rows: Rows | None, folder: Path) -> Start:
        return Start(*check_mlm_inputs(recipe), encoder=True)

    def sample(self, recipe: MLMRecipe, rows: Sequence[Passage], start: Start) -> Sample:
        length = piece_length(start.tokenizer, start.config, recipe.max_length)
        data = cut(recipe, rows, start.tokenizer, length, "train_dataset")
        ids = data[0]["input_ids"]
        collator = corruption(recipe, start.tokenizer, start.config)
        if isinstance(collator, SpanCorruption):
            source, target = collator.corrupt(ids, 0, 0)
            sides = {"encoder": (source, [False] * len(source)), "decoder": (target, [True] * len(target))}
            return Sample(
                sides,
                f"marked: the tokens to write; {len(data)} pieces, by {collator.objective}",
                data["input_ids"][:],
                {},
            )
        masked, labels = collator.mask(ids, 0, 0, data[0].get("words"))
        made, name = ("pairs of pieces", "pair") if recipe.next_sentence_prediction else ("pieces", "piece")
        note = f"marked: the tokens to predict; {len(data)} {made}"
        shown = {name: (masked.tolist(), (labels != IGNORE_INDEX).tolist())}
        return Sample(shown, note, data["input_ids"][:], {})

    def footprints(self, recipe: MLMRecipe, start: Start) -> list[Footprint]:
        model = skeleton(model_to_train(recipe, start.config), start.config, recipe.trust_remote_code)
        whole = new_modules(model, base_of(recipe.model_name_or_path))
        counts = count_trained(model, recipe, "FEATURE_EXTRACTION", model.get_output_embeddings(), whole)
        name = "encoder-decoder" if is_encoder_decoder(start.config) else "masked language model"
        return [Footprint(name, *counts)]


check = MLMCheck().check
