"""How the tokenizer's chat template ends an assistant turn: with an end token, or with text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from align.data.chat_template import render_chat
from align.data.end_tokens import end_ids, is_special_in_text, set_model_ends, split_at_end
from align.data.rows import Message
from align.data.template_input import PROBE, always_opened
from align.errors import BadRow, TemplateFailure

QUESTION: Message = {"role": "user", "content": "?"}
NOTE_PRINTED = "turn_end_was_said"  # attribute of the tokenizer


def add_template_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the token with which the chat template ends a turn an end token, if the template writes no other end token there.

    Models whose template was added later, as to a base model, lack it in `eos_token_id`.
    """
    text = (_text_after_content(tokenizer) or "").strip()
    ids = [id for id, token in tokenizer.added_tokens_decoder.items() if text and str(token) == text]
    if ids and ids[0] not in end_ids(tokenizer) and is_special_in_text(tokenizer, ids[0]):
        set_model_ends(tokenizer, [*end_ids(tokenizer), *ids])


def turn_end_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A note, once for a tokenizer, if the chat template ends a turn with text that is not an end token, or does not end it."""
    if getattr(tokenizer, NOTE_PRINTED, False):
        return None
    setattr(tokenizer, NOTE_PRINTED, True)
    text = _text_after_content(tokenizer)
    if text is None or split_at_end(tokenizer, text)[1] is not None:
        return None
    if not text.strip():
        if split_at_end(tokenizer, _text_after_content(tokenizer, QUESTION) or "")[1] is not None:
            return None  # the next turn opens with it
        behind = f", behind the {text!r} that the template writes, which is trained as a part of it" if text else ""
        return (
            f"the chat template writes no end after a turn: {tokenizer.eos_token} is added to a row's last response{behind}. "
            "To end every turn, and with nothing before it, have the template write {{ eos_token }} right after the content"
        )
    ids = tokenizer(text.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    return (
        f"the chat template ends a turn with {text!r}, which is no end token of the tokenizer but text ({len(ids)} ids: "
        f"{', '.join(map(str, ids[:12]))}{', ...' if ids[12:] else ''}): models write it as a part of the response, and end "
        f"with {tokenizer.eos_token} after it. To end with it, add it to the tokenizer as a special token and resize the "
        f"model's embeddings, before the first stage: it then ends responses. Or have the template write "
        f"{tokenizer.eos_token} there"
    )


def after_turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the chat template writes after the end token of the last assistant turn; empty without such a token."""
    return split_at_end(tokenizer, _text_after_content(tokenizer) or "")[2]


def _text_after_content(tokenizer: PreTrainedTokenizerBase, *after: Message) -> str | None:
    """The text that the chat template writes after the content of the last assistant turn before `after`; None if unknown."""
    if not tokenizer.chat_template:
        return None
    messages = [QUESTION, {"role": "assistant", "content": PROBE}, *after]
    try:
        text = render_chat(tokenizer, messages, add_generation_prompt=False)
        _, words, written = text.removesuffix(always_opened(tokenizer)).rpartition(PROBE)
    except (BadRow, TemplateFailure):  # rows with messages will raise it
        return None
    return written if words else None
