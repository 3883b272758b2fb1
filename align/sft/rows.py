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
from align.data.load import Rows
from align.data.rows import Demonstration
from align.data.tokenize import Report, tokenize_demonstrations
from align.models.context_length import check_rows_fit
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
    tokenize = partial(
        tokenize_demonstrations,
        tokenizer=tokenizer,
        max_length=recipe.max_length,
        on_bad_row=recipe.on_bad_row,
        completion_only_loss=recipe.completion_only_loss,
        packing=recipe.packing,
        train_on_reasoning=recipe.train_on_reasoning,
    )
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
        evaluation = build_eval_rows(held_out, kept, own, recipe.max_length, recipe.seed)
        check_rows_fit(evaluation.rows["input_ids"], config)
    train, skipped["replay"] = with_replay(own, retention.replayable, recipe.replay_fraction, recipe.seed, tokenize)
    num_replayed = len(train) - len(own)
    if recipe.packing:
        train = pack(train, recipe.max_length)
    check_rows_fit(train["input_ids"], config)
    return TokenizedRows(train, len(own), num_replayed, evaluation, skipped)


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
