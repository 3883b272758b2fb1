"""The rows of the SFT stage in token ids: what is trained, replayed rows among it, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config.sft import SFTRecipe
from align.data.batches import pack
from align.data.load import Rows
from align.data.rows import Demonstration
from align.data.tokenize import Report, tokenize_demonstrations
from align.models.context_length import check_lengths
from align.sft.evaluation import Measured, measured_rows
from align.sft.retention import Retention, with_replay


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Training rows (packed, if the recipe says so), how many went into them, and what is measured."""

    train: Dataset
    target: int  # rows of the recipe's own, before packing
    replayed: int
    measured: Measured | None  # None without evaluation
    skipped: dict[str, Report]


def token_rows(
    recipe: SFTRecipe,
    rows: Rows,
    retention: Retention,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
) -> TokenRows:
    """Tokenise the rows.

    Raises:
        UserError: as `tokenize_demonstrations`, or a row is longer than the model can read.
    """
    skipped: dict[str, Report] = {}
    target, skipped["train"] = tokenize_demonstrations(rows.train, tokenizer, recipe)
    measured = None
    if rows.evaluation:
        held_out, skipped["evaluation"] = _kept(rows.evaluation, tokenizer, recipe)
        remembered = None
        if retention.measured:
            remembered, skipped["retention"] = _kept(retention.measured, tokenizer, recipe, ends=False)
        measured = measured_rows(held_out, remembered, target, recipe.max_length, recipe.seed)
        check_lengths(measured.rows["input_ids"], config)
    train, skipped["replay"] = with_replay(target, retention.replayable, tokenizer, recipe)
    replayed = len(train) - len(target)
    if recipe.packing:
        train = pack(train, recipe.max_length)
    check_lengths(train["input_ids"], config)
    return TokenRows(train, len(target), replayed, measured, skipped)


def _kept(
    rows: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, recipe: SFTRecipe, ends: bool = True
) -> tuple[tuple[Dataset, list[Demonstration]], Report]:
    """Rows in token ids with what they were made of. What packing would cut in training is cut here too.

    Args:
        ends: whether plain text closes with EOS. What a model has forgotten is asked without: many base models never
            saw EOS after text, and would seem to remember better once any fine-tuning has taught it.
    """
    kept: list[Demonstration] = []
    dataset, bad = tokenize_demonstrations(rows, tokenizer, recipe, kept)
    if not ends:
        closing = [-1 if isinstance(row.completion, str) and not row.prompt else None for row in kept]
        columns = {
            name: [ids[:end] for ids, end in zip(dataset[name], closing, strict=True)]
            for name in ("input_ids", "labels")
        }
        dataset = Dataset.from_dict(columns, features=dataset.features)
    if recipe.packing and max(map(len, dataset["input_ids"])) > recipe.max_length:
        size = recipe.max_length
        cuts = [range(0, len(ids), size) for ids in dataset["input_ids"]]
        columns = {
            name: [
                row[start : start + size] for row, starts in zip(dataset[name], cuts, strict=True) for start in starts
            ]
            for name in ("input_ids", "labels")
        }
        kept = list(chain.from_iterable([row] * len(starts) for row, starts in zip(kept, cuts, strict=True)))
        dataset = Dataset.from_dict(columns, features=dataset.features)
    return (dataset, kept), bad
