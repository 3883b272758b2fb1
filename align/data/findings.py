"""Oddities in the ids of rows that are not errors: reported once for all rows, or refused if most rows have them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from align.data.dialogues import DialogueText
from align.data.rows import Demonstration, Message, Prompt, Row
from align.data.templates import TEMPLATE
from align.data.thought_marks import opened_by, thought_marks
from align.data.token_ids import special_tokens
from align.data.turn_end import turn_end_note
from align.errors import UserError
from align.terminal import say

SPANNED = "a token spans the end of the prompt and is trained with the response, while generation starts from the prompt's own tokens"
JOINED = "the prompt ends in white space that the tokenizer joins to the next word: generation starts from a rare token"
DOUBLED = "begins with the text of {bos}, which the tokenizer adds itself: one is kept"
CONTROL = "the text of {token} in a message is read as that special token, which the chat template writes itself"
LEADING_ANSWER = "an assistant turn before the first user turn answers nothing: it is trained only with `completion_only_loss: false`"
EMPTY_THOUGHT = "the chat template opens a thought ({opens}) and the row has none: it is trained to close it at once"
REPEATED = "a response repeats the whole prompt"
UNREAD = "the column `{name}` is not read: the model never sees it"
# Columns that have a meaning in the formats of other tools, and are not read here.
MEANINGFUL_COLUMNS = {"system", "system_prompt", "image", "images", "video", "videos", "audio", "audios", "documents", "train", "label",
           "reasoning", "reasoning_content", "thinking", "instruction", "input", "context", "history"}  # fmt: skip
SHORT_PROMPT = 8  # characters of a prompt that a response may begin with by chance


class Findings:
    """The oddities found in rows, with the places of the rows.

    Args:
        tokenizer: encodes the rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        before, _ = special_tokens(tokenizer)
        self.bos = str(tokenizer.bos_token) if tokenizer.bos_token_id in before else None
        template = str(tokenizer.chat_template or "")
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        of_thoughts = "\n".join(mark for each in thought_marks(tokenizer) for mark in (each.opens, each.closes))
        written = [re.escape(token) for token in sorted(special) if token in template and token not in of_thoughts]
        self.control = re.compile("|".join(written)) if written else None
        self.found: dict[str, list[str]] = {}
        self.short_repeats: list[str] = []  # counted only where most rows repeat their prompts
        self.tokenizer = tokenizer
        self.messages = False  # whether a row has messages

    def inspect(
        self, row: Row, texts: Sequence[DialogueText], own_ids: Sequence[list[int]], before: Sequence[list[int]]
    ) -> None:
        """Look for oddities in a row.

        Args:
            texts: its prompt with each of its responses.
            own_ids: ids of the prompts alone.
            before: ids before the responses.
        """
        if own_ids != before:
            self._note(JOINED if isinstance(row, Prompt) else SPANNED, row.where)
        for name in sorted(MEANINGFUL_COLUMNS & row.extra.keys()):
            if TEMPLATE not in row.extra and not _is_redundant(row, name):
                self._note(UNREAD.format(name=name), row.where)
        if not isinstance(row.prompt, str):
            for token in self._control_tokens(row):
                self._note(CONTROL.format(token=token), row.where)
            self.messages = self.messages or bool(before)  # not for an encoder, which reads plain text
            if isinstance(row, Demonstration):
                self._inspect_turns(row, row.prompt, texts)
            return
        if self.bos is not None and (row.prompt or texts[0].response).startswith(self.bos):
            self._note(DOUBLED.format(bos=self.bos), row.where)
        prompt = row.prompt.strip()
        repeats = [text.response.lstrip().startswith(prompt) for text in texts]
        if len(prompt) >= SHORT_PROMPT and any(repeats):
            self._note(REPEATED, row.where)
        elif prompt and all(repeats):
            self.short_repeats.append(row.where)

    def _inspect_turns(self, row: Demonstration, prompt: Sequence[Message], texts: Sequence[DialogueText]) -> None:
        roles = [message["role"] for message in prompt]
        if "assistant" in roles[: roles.index("user")]:
            self._note(LEADING_ANSWER, row.where)
        for text in texts:
            opening = opened_by(self.tokenizer, text.prompt)
            if opening and text.response.lstrip().startswith(opening.closes):
                self._note(EMPTY_THOUGHT.format(opens=opening.opens), row.where)
                break

    def _control_tokens(self, row: Row) -> list[str]:
        """Special tokens of the chat template whose text is in a row's messages; BOS and end tokens are refused elsewhere."""
        turns = [getattr(row, name, None) for name in ("prompt", "completion", "chosen", "rejected")]
        contents = [str(message["content"]) for each in turns if isinstance(each, list) for message in each]
        return sorted({token for text in contents for token in self.control.findall(text)} if self.control else ())

    def _note(self, text: str, where: str) -> None:
        self.found.setdefault(text, []).append(where)

    def report(self, total: int) -> None:
        """Print the oddities of `total` rows.

        Raises:
            UserError: most responses repeat their prompts.
        """
        if self.messages and (note := turn_end_note(self.tokenizer)):
            print_note(note)
        if 2 * (len(self.short_repeats) + len(self.found.get(REPEATED, ()))) > total:
            self.found.setdefault(REPEATED, []).extend(self.short_repeats)
        for text, rows in self.found.items():
            places = f"{len(rows)} of {total} rows ({', '.join(rows[:5])}{', ...' if len(rows) > 5 else ''})"
            if text == REPEATED and 2 * len(rows) > total:
                raise UserError(
                    f"prompt: the `completion`, `chosen` or `rejected` of {places} repeats it, so that it would be in the text "
                    "twice; give responses without their prompts, or pairs without the column `prompt`."
                )
            print_note(f"{text}: {places}")


def _is_redundant(row: Row, name: str) -> bool:
    """Whether a column holds nothing, or the row's system message, as beside `conversations`."""
    value = row.extra[name]
    if name == "label":  # of a response that is not desired, in rows for KTO; others are for graders
        return value is not False or isinstance(row, Prompt)
    return value in (None, "", [], {}) or [{"role": "system", "content": value}] == list(row.prompt[:1])


def print_note(text: str) -> None:
    """Print a note on rank 0."""
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"note: {text}")
