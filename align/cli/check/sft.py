"""`align check` of an SFT recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from align.cli.check.memory import Footprint, count_trained, skeleton
from align.cli.check.sample_rows import Sample, Start
from align.cli.check.training import TrainingCheck, doubts_about
from align.config.sft import SFTRecipe
from align.data.load import Rows
from align.data.rows import Demonstration, render_text
from align.data.tokenize import IGNORE_INDEX
from align.models.from_scratch import scratch_config, train_tokenizer
from align.models.load import language_model_class
from align.models.model_types import is_encoder_decoder
from align.models.tokenizer import load_tokenizer
from align.sft.inputs import check_kind_of_model, load_config_and_tokenizer
from align.sft.report import retention_lines
from align.sft.responses import load_metrics
from align.sft.retention import Retention, load_with_retention, replay_count
from align.sft.rows import check_fit, tokenizer_of_rows


class SFTCheck(TrainingCheck[SFTRecipe]):
    """Rows are those of training and `retention`; the model may be one that is trained from scratch."""

    form = Demonstration

    def load(self, recipe: SFTRecipe) -> tuple[Rows, list[str], list[str]]:
        rows, retention = load_with_retention(recipe)
        return rows, describe_retention(recipe, rows, retention), doubts_about(rows)

    def functions(self, recipe: SFTRecipe) -> list[str]:
        metrics = [f"eval_metrics: {', '.join(load_metrics(recipe.eval_metrics))}"] if recipe.eval_metrics else []
        return [*super().functions(recipe), *metrics]

    def trained_rows(self, recipe: SFTRecipe, rows: Rows) -> int:
        return len(rows.train) + replay_count(recipe.replay_fraction, len(rows.train))

    def start(self, recipe: SFTRecipe, rows: Rows | None, folder: Path) -> Start | None:
        if recipe.model_name_or_path is None:
            return _start_from_scratch(recipe, rows, folder) if rows is not None else None
        return Start(*load_config_and_tokenizer(recipe.model_name_or_path, recipe))

    def sample(self, recipe: SFTRecipe, rows: Sequence[Demonstration], start: Start) -> Sample:
        data, bad = tokenizer_of_rows(recipe, start.tokenizer, start.config)(rows)
        first = data[0]
        if is_encoder_decoder(start.config):
            check_fit(data, start.config)
            source, target = first["input_ids"], first["labels"]
            sides = {"encoder": (source, [False] * len(source)), "decoder": (target, [True] * len(target))}
            longer = [max(row["input_ids"], row["labels"], key=len) for row in data]
            return Sample(sides, "marked: the tokens that are trained", longer, bad)
        shown = {"row": (first["input_ids"], [label != IGNORE_INDEX for label in first["labels"]])}
        pieces = data["input_ids"]
        if recipe.packing:
            pieces = [
                ids[at : at + recipe.max_length] for ids in pieces for at in range(0, len(ids), recipe.max_length)
            ]
        return Sample(shown, "marked: the tokens that are trained", pieces, bad)

    def footprints(self, recipe: SFTRecipe, start: Start) -> list[Footprint]:
        model = skeleton(language_model_class(start.config), start.config, recipe.trust_remote_code)
        task = "SEQ_2_SEQ_LM" if is_encoder_decoder(start.config) else "CAUSAL_LM"
        return [Footprint("policy", *count_trained(model, recipe, task, model.get_output_embeddings()))]


def _start_from_scratch(recipe: SFTRecipe, rows: Rows, folder: Path) -> Start:
    """The configuration of the model that the stage would start at random, and the tokenizer that it would train."""
    config = scratch_config(recipe.model_config, recipe.tokenizer_vocab_size)
    check_kind_of_model(recipe, config)
    texts = [render_text(turns) for row in rows.train for turns in (row.prompt, row.completion)]
    pairs = is_encoder_decoder(config)
    train_tokenizer(texts, recipe.tokenizer_vocab_size, pairs=pairs).save_pretrained(folder)
    tokenizer = load_tokenizer(
        str(folder), recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs
    )
    config.vocab_size = len(tokenizer)
    return Start(config, tokenizer)


def describe_retention(recipe: SFTRecipe, rows: Rows, retention: Retention) -> list[str]:
    """A line on the retention rows: their sources, format and use."""
    if not recipe.retention:
        return []
    forms = Counter(map(_form, [*retention.evaluation, *retention.replayable]))
    sources = [each for each in rows.report["sources"] if each["used_for"] == "retention"]
    named = ", ".join(f"{each['source']} ({each['rows']} rows)" for each in sources)
    replayed = replay_count(recipe.replay_fraction, len(rows.train))
    lines = [f"retention rows: {named}; {', '.join(f'{count} of {form}' for form, count in forms.items())}"]
    return lines + retention_lines(rows.report, len(rows.train), replayed)


def _form(row: Demonstration) -> str:
    if not isinstance(row.completion, str):
        return "`messages`"
    return "`prompt` and `completion`" if row.prompt else "`text`"


check = SFTCheck().check
