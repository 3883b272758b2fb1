"""The marks between which a model writes its thoughts, read from its chat template and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from align.data.chat_template import render_chat
from align.data.end_tokens import split_at_end
from align.errors import BadRow, TemplateFailure

ATTRIBUTE = "thought_marks"  # of the tokenizer: the marks, with the template in which they were found
CHANNEL = "<|channel|>"  # gpt-oss's, see `align.data.reasoning`
_THOUGHT, _ANSWER = "\N{SYMBOL FOR START OF TEXT}", "\N{SYMBOL FOR END OF TEXT}"  # stand for both in a rendered turn
# [/THINK], </seed:think>, ◁/think▷, <|END_THINKING|>: ends, whose beginnings are named alike.
_END = re.compile(
    r"([<\[◁]\|?)(/|end_(?:of_)?)((?:\w+[:_])?(?:think|thought|reason)\w*(?::\w+)?)(\|?[>\]▷])", re.IGNORECASE
)
_BEGINS = {"/": "", "end_": "start_", "end_of_": "begin_of_"}
_NAMED_OTHERWISE = (  # Apertus; Gemma 4
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel>", "<channel|>"),
)


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    """The text before a thought, and the text between it and the answer, without white space around them."""

    opens: str
    closes: str


THINK = ThoughtMarks("<think>", "</think>")


def thought_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[ThoughtMarks, ...]:
    """`<think>` and `</think>`, which data has for models of any kind; behind them the model's own, if they are others."""
    template = str(tokenizer.chat_template or "")
    known: tuple[str | None, tuple[ThoughtMarks, ...]] = getattr(tokenizer, ATTRIBUTE, (None, ()))
    if known[0] != template:
        known = template, tuple(dict.fromkeys([THINK, *_named(tokenizer, template), *_written(tokenizer, template)]))
        setattr(tokenizer, ATTRIBUTE, known)
    return known[1]


def own_marks(tokenizer: PreTrainedTokenizerBase) -> ThoughtMarks:
    """The marks of the model itself."""
    _, *others = thought_marks(tokenizer)
    return others[0] if others and THINK.closes not in str(tokenizer.chat_template) else THINK


def marks_in(tokenizer: PreTrainedTokenizerBase, text: str) -> ThoughtMarks:
    """The marks that close a thought in the text; the model's own where none do."""
    return next((each for each in thought_marks(tokenizer) if each.closes in text), own_marks(tokenizer))


def opened_by(tokenizer: PreTrainedTokenizerBase, text: str) -> ThoughtMarks | None:
    """The marks that the text ends by opening a thought with."""
    text = text.rstrip()
    return next((each for each in thought_marks(tokenizer) if text.endswith(each.opens)), None)


def _named(tokenizer: PreTrainedTokenizerBase, template: str) -> Iterator[ThoughtMarks]:
    """Pairs that stand in the template or among the added tokens, by what such marks are called."""
    places = "\n".join([template, *tokenizer.get_added_vocab()])
    pairs = list(_NAMED_OTHERWISE)
    for left, end, name, right in _END.findall(places):
        begin = _BEGINS[end.lower()]
        pairs.append((f"{left}{begin.upper() if end.isupper() else begin}{name}{right}", f"{left}{end}{name}{right}"))
    yield from (ThoughtMarks(*pair) for pair in pairs if all(mark in places for mark in pair))


def _written(tokenizer: PreTrainedTokenizerBase, template: str) -> Iterator[ThoughtMarks]:
    """What the template writes around a turn's `reasoning_content`, if it reads that.

    Where it announces an answer without thoughts, too, as by a channel, the announcement is what closes.
    """
    if not template or CHANNEL in template:
        return
    asked, said = {"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}
    try:
        opened = render_chat(tokenizer, [asked], add_generation_prompt=True)
        plain = render_chat(tokenizer, [asked, said], add_generation_prompt=False)
        whole = render_chat(tokenizer, [asked, {**said, "reasoning_content": _THOUGHT}], add_generation_prompt=False)
    except (BadRow, TemplateFailure):  # rows will say so
        return
    before, _, rest = whole.partition(_THOUGHT)
    closes = rest.partition(_ANSWER)[0].strip()
    if not closes or _ANSWER not in plain or split_at_end(tokenizer, closes)[1] is not None:
        return
    announced = plain.partition(_ANSWER)[0].removeprefix(opened).strip()
    opens = before.removeprefix(opened).strip() if before.startswith(opened) else before.split()[-1]
    closes = announced if announced and announced != closes and closes.endswith(announced) else closes
    yield ThoughtMarks(opens or before.split()[-1], closes)
