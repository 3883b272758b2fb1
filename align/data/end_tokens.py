"""The tokens that end a response: the tokenizer's EOS, and all others that the model's generation config names.

`align.models.tokenizer.load_tokenizer` reads the model's once and leaves them with the tokenizer, which every place that
encodes, samples or decodes responses has. A tokenizer of other origin has its EOS alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

ATTRIBUTE = "model_end_tokens"  # of the tokenizer: text and id of the model's end tokens beside EOS


def set_model_ends(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> None:
    """Let the tokens `ids` end responses in addition to the tokenizer's EOS; ids without a token are ignored."""
    others = [token for token in ids if token != tokenizer.eos_token_id]
    texts = {token: tokenizer.added_tokens_decoder.get(token) for token in others}
    setattr(
        tokenizer,
        ATTRIBUTE,
        {id: text if text and is_special_in_text(tokenizer, id) else None for id, text in texts.items()},
    )


def is_special_in_text(tokenizer: PreTrainedTokenizerBase, id: int) -> bool:
    """Whether the tokenizer reads the text of an added token as that token, also after a word.

    Where the token is normalized as text is, a normalizer that puts a space before it may hide it.
    """
    text = f"a{tokenizer.added_tokens_decoder[id]}"
    return id in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that end a response, the tokenizer's EOS first."""
    return (int(tokenizer.eos_token_id), *getattr(tokenizer, ATTRIBUTE, {}))


def end_texts(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of these tokens by their text, EOS first; without those that ordinary text consists of, or is read as."""
    others = getattr(tokenizer, ATTRIBUTE, {}).items()
    return {str(tokenizer.eos_token): int(tokenizer.eos_token_id)} | {str(token): id for id, token in others if token}


def split_at_end(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int | None, str]:
    """The text before the first end token, that token's id (None if there is none), and the text after it."""
    found = [(text.index(end), -len(end), end) for end in end_texts(tokenizer) if end in text]
    if not found:
        return text, None, ""
    start, size, end = min(found)
    return text[:start], end_texts(tokenizer)[end], text[start - size :]


def without_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """A response's ids without the token that ended it, which is no part of its text."""
    return list(ids[:-1] if ids and ids[-1] in end_ids(tokenizer) else ids)


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: Sequence[Sequence[int]]) -> list[str]:
    """The text of each response, without special tokens and without the token that ended it."""
    ids = [without_end(tokenizer, response) for response in responses]
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts
