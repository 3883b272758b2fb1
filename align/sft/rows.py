"""The rows of the SFT stage as token ids: training rows with replayed ones among them, and evaluation rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config.sft import SFTRecipe
from align.data.batches import pack
from align.data.encoder_decoder import tokenize_pairs
from align.data.load import Rows
from align.data.rows import Demonstration
from align.data.tokenize import Report, tokenize_demonstrations
from align.models.context_length import check_rows_fit
from align.models.encoder_decoder import check_pairs_fit
from align.models.model_types import is_encoder_decoder
from align.sft.evaluation import EvalRows, build_eval_rows
from align.sft.retention import Retention, with_replay


@dataclass(frozen=True, slots=True)
class TokenizedRows:
    """Training rows (packed, if the recipe packs) and evaluation rows (None without evaluation)."""

    train: Dataset
    num_train: int  # before packing, without replayed rows
    num_replayed: int
    evaluation: EvalRows | None
    skipped: dict[str, Report]  # bad rows by use and reason


def tokenize_rows(
    recipe: SFTRecipe,
    rows: Rows,
    retention: Retention,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> TokenizedRows:
    """Tokenize training, replayed and evaluation rows, and pack the former if the recipe says so.

    Raises:
        UserError: as `tokenize_demonstrations`, or a row exceeds the model's context.
    """
    tokenize = tokenizer_of_rows(recipe, tokenizer, config)
    cut_at = recipe.max_length if recipe.packing else None
    skipped: dict[str, Report] = {}
    own, skipped["train"] = tokenize(rows.train)
    evaluation = None
    if rows.evaluation:
        held_out, skipped["evaluation"] = _tokenize_for_evaluation(rows.evaluation, tokenize, cut_at)
        kept = None
        if retention.evaluation:
            kept, skipped["retention"] = _tokenize_for_evaluation(
                retention.evaluation, tokenize, cut_at, text_ends=False
            )
        pairs = is_encoder_decoder(config)
        evaluation = build_eval_rows(held_out, kept, own, recipe.max_length, recipe.seed, first_is_predicted=pairs)
        check_fit(evaluation.rows, config)
    train, skipped["replay"] = with_replay(own, retention.replayable, recipe.replay_fraction, recipe.seed, tokenize)
    num_replayed = len(train) - len(own)
    if recipe.packing:
        train = pack(train, recipe.max_length)
    check_fit(train, config)
    return TokenizedRows(train, len(own), num_replayed, evaluation, skipped)


def tokenizer_of_rows(
    recipe: SFTRecipe, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> Callable[..., tuple[Dataset, Report]]:
    """The function from demonstrations to token ids, for the kind of model."""
    settings = {
        "tokenizer": tokenizer,
        "max_length": recipe.max_length,
        "on_bad_row": recipe.on_bad_row,
        "train_on_reasoning": recipe.train_on_reasoning,
    }
    if is_encoder_decoder(config):
        return partial(tokenize_pairs, **settings)  # type: ignore[arg-type]
    return partial(
        tokenize_demonstrations,
        completion_only_loss=recipe.completion_only_loss,
        packing=recipe.packing,
        **settings,  # type: ignore[arg-type]
    )


def check_fit(rows: Dataset, config: PretrainedConfig) -> None:
    """Check that the model has a position and an embedding for every token of the rows.

    Raises:
        UserError: it has not.
    """
    if is_encoder_decoder(config):
        check_pairs_fit(rows["input_ids"], rows["labels"], config)
    else:
        check_rows_fit(rows["input_ids"], config)


def _tokenize_for_evaluation(
    rows: Sequence[Demonstration],
    tokenize: Callable[..., tuple[Dataset, Report]],
    cut_at: int | None,
    text_ends: bool = True,
) -> tuple[tuple[Dataset, list[Demonstration]], Report]:
    """Evaluation rows as token ids with the demonstrations they were made from, and the bad rows by reason.

    Args:
        cut_at: cut longer rows into pieces of this many tokens, as packing does in training.
        text_ends: whether plain text ends in EOS. Retention is measured without it: many base models never saw EOS after
            text, and would seem to improve as soon as any fine-tuning teaches it.
    """
    kept: list[Demonstration] = []
    dataset, bad = tokenize(rows, kept=kept)
    if not text_ends:
        ends = [-1 if isinstance(row.completion, str) and not row.prompt else None for row in kept]
        columns = {
            name: [ids[:end] for ids, end in zip(dataset[name], ends, strict=True)] for name in ("input_ids", "labels")
        }
        dataset = Dataset.from_dict(columns, features=dataset.features)
    if cut_at is not None and max(map(len, dataset["input_ids"])) > cut_at:
        cuts = [range(0, len(ids), cut_at) for ids in dataset["input_ids"]]
        columns = {
            name: [
                row[start : start + cut_at] for row, starts in zip(dataset[name], cuts, strict=True) for start in starts
            ]
            for name in ("input_ids", "labels")
        }
        kept = list(chain.from_iterable([row] * len(starts) for row, starts in zip(kept, cuts, strict=True)))
        dataset = Dataset.from_dict(columns, features=dataset.features)
    return (dataset, kept), bad
