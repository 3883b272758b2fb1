"""`align check` of a reward recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig
from transformers import AutoModelForCausalLM

from align.cli.check.memory import Footprint, count_trained, skeleton
from align.cli.check.sample_rows import Sample, Start
from align.cli.check.training import TrainingCheck, doubts_about, frozen_model
from align.config.reward import RewardRecipe
from align.data.load import Rows
from align.data.rows import Preference
from align.data.tokenize import tokenize_preferences
from align.models.model_types import is_encoder_decoder
from align.models.new_modules import trained_whole
from align.models.trainable import MERGEABLE, peft_config
from align.reward.imbalance import describe_imbalance, measure_imbalance, warn_of_imbalance
from align.reward.inputs import check_reward_inputs
from align.reward.members import check_models_inside
from align.reward.pairs import check_ties, describe_halves, load_preferences
from align.runs.own_files import MANIFEST
from reward_models.bottleneck import base_of
from reward_models.heads import score_head
from reward_models.linear_head import SequenceClassifier

SFT_MODEL = "SFT model (to set the zero)"


class RewardCheck(TrainingCheck[RewardRecipe]):
    """A row is two sequences, of each of which one token is scored."""

    form = Preference
    auto = SequenceClassifier
    num_labels = 1
    sequences_per_row = 2
    has_logits = False

    def load(self, recipe: RewardRecipe) -> tuple[Rows, list[str], list[str]]:
        parts = load_preferences(recipe)
        check_ties(parts[0].evaluation)
        if not (Path(recipe.output_dir) / MANIFEST).is_file():
            check_models_inside(recipe, parts)
        lines, doubts = [describe_halves(*(len(rows.train) for rows in parts))] if recipe.train_judge else [], []
        for rows, whose in zip(parts, ("reward model", "judge"), strict=False):
            name = f"training pairs of the {whose}" if recipe.train_judge else "training pairs"
            imbalance = measure_imbalance(rows.train)
            lines += describe_imbalance(imbalance, name)
            doubts += [*doubts_about(rows), *warn_of_imbalance(imbalance, name)]
        return parts[0], lines, doubts

    def start(self, recipe: RewardRecipe, rows: Rows | None, folder: Path) -> Start:
        reward = check_reward_inputs(recipe)
        others = {SFT_MODEL: reward.sft.config} if reward.sft is not None else {}
        notes = [f"scalar head: {reward.describe_head()}"]
        return Start(reward.config, reward.tokenizer, reward.is_encoder, others, notes=notes)

    def sample(self, recipe: RewardRecipe, rows: Sequence[Preference], start: Start) -> Sample:
        data, bad = tokenize_preferences(
            rows,
            start.tokenizer,
            max_length=recipe.max_length,
            on_bad_row=recipe.on_bad_row,
            is_encoder=start.encoder,
            ends_once=is_encoder_decoder(start.config),
        )
        sides = {side: data[0][f"{side}_ids"] for side in ("chosen", "rejected")}
        scored = 0 if start.encoder else -1
        shown = {side: (ids, [i == scored % len(ids) for i in range(len(ids))]) for side, ids in sides.items()}
        note = "marked: the token from which the score is read"
        return Sample(shown, note, [*data["chosen_ids"], *data["rejected_ids"]], bad)

    def adapter(self, recipe: RewardRecipe, start: Start) -> PeftConfig | None:
        if recipe.method not in MERGEABLE:
            return None
        model = skeleton(SequenceClassifier, start.config, recipe.trust_remote_code, num_labels=1)
        whole = trained_whole(model, base_of(recipe.model_name_or_path))
        found = peft_config(recipe, model.config, "SEQ_CLS", whole)
        assert found is not None, recipe.method
        found.base_model_name_or_path = recipe.model_name_or_path
        return found

    def footprints(self, recipe: RewardRecipe, start: Start) -> list[Footprint]:
        model = skeleton(SequenceClassifier, start.config, recipe.trust_remote_code, num_labels=1)
        whole = trained_whole(model, base_of(recipe.model_name_or_path))
        counts = count_trained(model, recipe, "SEQ_CLS", score_head(model)[1], whole)
        others = [
            frozen_model(other, AutoModelForCausalLM, config, recipe.trust_remote_code)
            for other, config in start.others.items()
        ]
        return [Footprint("reward", *counts), *others]


check = RewardCheck().check
