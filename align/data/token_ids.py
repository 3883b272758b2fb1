"""Texts of prompts and responses to token ids.

Prompt and response are tokenized as one text, as the model was pretrained on it, and the ids are cut where the prompt
ends. Tokenized on its own, a response of a SentencePiece-type tokenizer would begin with a space that is not there. The
prompt's own ids, from which generation starts, are nearly always the first ids of the whole. Where they are not, a token
spans the end of the prompt, as where a prompt ends in a space that the tokenizer joins to the next word: that token
belongs to the response, whose first characters it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from transformers import PreTrainedTokenizerBase

from align.data.dialogues import DialogueText
from align.data.end_tokens import without_end
from align.data.rows import Turns


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], are_plain: Sequence[bool]) -> list[list[int]]:
    """Ids of texts, with nothing after them. A chat template has written the special tokens of those that are not plain.

    Plain text gets the special tokens that the tokenizer puts before a text, once: also where it begins with BOS itself.
    """
    plain = iter(_plain_ids(tokenizer, [text for text, is_plain in zip(texts, are_plain, strict=True) if is_plain]))
    chat = iter(_ids(tokenizer, [text for text, is_plain in zip(texts, are_plain, strict=True) if not is_plain], False))
    return [next(plain if is_plain else chat) for is_plain in are_plain]


def whole_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[DialogueText],
    are_plain: Sequence[bool],
    own_ids: Sequence[list[int]],
) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt with its response and the token that ends it: those before the response, and the response's.

    Args:
        own_ids: of the prompts alone, by `text_ids`.
    """
    wholes = text_ids(tokenizer, [text.prompt + text.response for text in texts], are_plain)
    starts = [
        len(own) if ids[: len(own)] == own else _start(tokenizer, text, own, ids)
        for text, own, ids in zip(texts, own_ids, wholes, strict=True)
    ]
    return [(ids[:start], [*ids[start:], text.end]) for text, ids, start in zip(texts, wholes, starts, strict=True)]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer adds before a text and after it."""
    special = set(tokenizer.all_special_ids)
    for text in chain(["a"], (tokenizer.decode([token]) for token in range(len(tokenizer)))):
        full, bare = (_ids(tokenizer, [str(text)], added)[0] for added in (True, False))
        if bare and special.isdisjoint(bare):
            before = next(start for start in range(len(full)) if full[start : start + len(bare)] == bare)
            return full[:before], full[before + len(bare) :]
    return [], []


def decode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Turns, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> str:
    """Text of a sampled response, without special tokens and without the token that ended it.

    Decoded after the last token of a plain-text prompt, because a SentencePiece-type tokenizer drops the space before a
    text's first word.
    """
    ids = without_end(tokenizer, response_ids)
    alone = str(tokenizer.decode(ids, skip_special_tokens=True))
    if not isinstance(prompt, str):
        return alone
    last = list(prompt_ids[-1:])
    before, both = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in (last, [*last, *ids]))
    return both.removeprefix(before) if both.startswith(before) else alone


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return ids


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    before, after = special_tokens(tokenizer)
    doubled = [*before, tokenizer.bos_token_id] if before[-1:] == [tokenizer.bos_token_id] else None
    found = [ids[: len(ids) - len(after)] for ids in _ids(tokenizer, texts, True)]
    return [ids[1:] if ids[: len(before) + 1] == doubled else ids for ids in found]


def _start(tokenizer: PreTrainedTokenizerBase, text: DialogueText, own: Sequence[int], ids: Sequence[int]) -> int:
    """Index of the first of the ids of the whole that holds a character of the response.

    Without offsets, as from a slow tokenizer: of the first that differs from the prompt's own ids.
    """
    if not tokenizer.is_fast:
        return next((index for index, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), len(ids))
    encoded = tokenizer(
        text.prompt + text.response, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ends = [end for _, end in encoded["offset_mapping"]]
    response = (index for index, end in enumerate(ends) if end > len(text.prompt))
    return len(ids) - len(ends) + next(response, len(ends))
