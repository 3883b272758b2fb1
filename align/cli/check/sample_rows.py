"""Rows as `align check` shows them: the first one with the tokens that matter marked."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.text import Text
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config.base import StageRecipe
from align.config.encoders import ClassifyRecipe, MLMRecipe
from align.config.ppo import PPORecipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.data.load import Rows
from align.data.rows import Labelled, Passage
from align.data.templates import TASK, TEMPLATE
from align.data.tokenize import IGNORE_INDEX, tokenize_demonstrations, tokenize_preferences, tokenize_prompts
from align.encoders.labels import Labels
from align.encoders.masking import Masking
from align.encoders.tokenize import piece_length, tokenize_labelled, tokenize_passages
from align.models.context_length import check_rows_fit

SAMPLED_ROWS = 512  # training rows that are tokenised
SHOWN_ROWS = 6  # sample rows, one of each template
SHOWN = 400  # characters of each stretch of the sample row

# Ids with their marks by name; what the marks mean; the ids of all rows; the bad rows by reason.
Sample = tuple[dict[str, tuple[list[int], list[bool]]], str, list[list[int]], dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """What a stage starts from: the configuration and tokenizer of its main model, and of the others by role."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    encoder: bool = False
    others: dict[str, PretrainedConfig] = dataclasses.field(default_factory=dict)
    labels: Labels | None = None  # of a classifier


def sample(recipe: StageRecipe, rows: Rows, start: Start) -> list[Text]:
    """The first training row (of each template) as the model will see it, what is learnt of it marked, and how long rows are.

    Raises:
        UserError: rows that cannot be tokenised, or are longer than the model can read.
    """
    kinds: dict[str, list[Any]] = {}
    for row in rows.train:
        template = row.extra.get(TEMPLATE)
        kinds.setdefault(json.dumps([row.extra[TASK], template]) if template else "", []).append(row)
    groups = [some[: SAMPLED_ROWS // min(len(kinds), SHOWN_ROWS)] for some in kinds.values()][:SHOWN_ROWS]
    lines: list[Text] = []
    sizes: list[int] = []
    skipped: Counter[str] = Counter()
    for some in groups:
        shown, note, sequences, bad = _tokenized(recipe, some, start)
        check_rows_fit(sequences, start.config)
        sizes += map(len, sequences)
        skipped.update({reason: entry["count"] for reason, entry in bad.items()})
        task = f"{some[0].extra[TASK]}, " if TEMPLATE in some[0].extra else ""
        lines += [
            Text(f"  {task}{name}: ", style="bold") + marked(start.tokenizer, *tokens) for name, tokens in shown.items()
        ]
    longest = f"at most {max(sizes)} tokens in the first {sum(map(len, groups))} rows"
    longest += f" of {len(groups)} of {len(kinds)} templates" if len(kinds) > len(groups) else ""
    without = "".join(f"; {count} of them skipped: {reason}" for reason, count in skipped.items())
    return [*lines, Text(f"  ({note}; {longest}{without})", style="dim")]


def _tokenized(
    recipe: StageRecipe, some: Sequence[Any], start: Start
) -> tuple[dict[str, tuple[list[int], list[bool]]], str, Sequence[list[int]], dict[str, dict[str, Any]]]:
    """The first row's sequences with marks, what the marks mean, the sequences of all rows, and the bad rows."""
    tokenizer = start.tokenizer
    if isinstance(recipe, SFTRecipe):
        data, bad = tokenize_demonstrations(
            some,
            tokenizer,
            max_length=recipe.max_length,
            on_bad_row=recipe.on_bad_row,
            completion_only_loss=recipe.completion_only_loss,
            packing=recipe.packing,
        )
        first = data[0]
        shown = {"row": (first["input_ids"], [label != IGNORE_INDEX for label in first["labels"]])}
        return shown, "marked: the tokens that are trained", data["input_ids"], bad
    if isinstance(recipe, RewardRecipe):
        data, bad = tokenize_preferences(
            some,
            tokenizer,
            max_length=recipe.max_length,
            on_bad_row=recipe.on_bad_row,
            is_encoder=start.encoder,
        )
        sides = {side: data[0][f"{side}_ids"] for side in ("chosen", "rejected")}
        place = 0 if start.encoder else -1
        shown = {side: (ids, [i == place % len(ids) for i in range(len(ids))]) for side, ids in sides.items()}
        note = "marked: the token from which the score is read"
        return shown, note, [*data["chosen_ids"], *data["rejected_ids"]], bad
    if isinstance(recipe, ClassifyRecipe):
        assert start.labels is not None
        return _labelled(some, tokenizer, start.labels, recipe, start.encoder)
    if isinstance(recipe, MLMRecipe):
        return _pieces(some, tokenizer, start.config, recipe)
    assert isinstance(recipe, PPORecipe)
    prompts, bad = tokenize_prompts(some, tokenizer, recipe.max_prompt_length, recipe.on_bad_row)
    from align.models.context_length import check_responses_fit

    ids = [ids for _, ids in prompts]
    check_responses_fit(ids, recipe, start.config)
    return {"prompt": (ids[0], [False] * len(ids[0]))}, "the policy answers here, and its answer is trained", ids, bad


def marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marks: Sequence[bool]) -> Text:
    """Tokens as text, in stretches: marked ones in brackets, and green on a terminal."""
    text = Text()
    begin = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and marks[end] == marks[begin]:
            continue
        # Decoded from the start, because a token alone may lose its space.
        before = tokenizer.decode(ids[:begin], clean_up_tokenization_spaces=False)
        piece = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)[len(before) :]
        if len(piece) > SHOWN:
            piece = f"{piece[: SHOWN // 2]} [...] {piece[-SHOWN // 2 :]}"
        text.append(f"⟦{piece}⟧" if marks[begin] else piece, style="green" if marks[begin] else "")
        begin = end
    return text


def _labelled(
    rows: Sequence[Labelled], tokenizer: PreTrainedTokenizerBase, labels: Labels, recipe: ClassifyRecipe, encoder: bool
) -> Sample:
    """Raises as `tokenize_labelled`."""
    data, bad = tokenize_labelled(rows, tokenizer, labels, recipe, encoder)
    ids = data[0]["input_ids"]
    place = 0 if encoder else len(ids) - 1
    note = f"marked: the token from which the label is read; {labels.problem_type}, {labels.describe()}"
    shown = {f"row labelled {rows[0].label!r}": (ids, [index == place for index in range(len(ids))])}
    return shown, note, data["input_ids"][:], bad


def _pieces(
    rows: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, recipe: MLMRecipe
) -> Sample:
    """Raises as `tokenize_passages`."""
    data = tokenize_passages(rows, tokenizer, piece_length(tokenizer, config, recipe))
    masked, labels = Masking(tokenizer, recipe.mlm_probability, recipe.seed).mask(data[0]["input_ids"], 0, 0)
    note = f"marked: the tokens to predict; {len(data)} pieces"
    return {"piece": (masked.tolist(), (labels != IGNORE_INDEX).tolist())}, note, data["input_ids"][:], {}
