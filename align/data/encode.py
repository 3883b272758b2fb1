"""Prompts and responses to token ids, identically in every stage.

The ids are those of the whole, cut where the prompt ends (`align.data.token_ids`). Every response ends in exactly one
end-of-text id: the one that the chat template writes after it if it ends responses of the model
(`align.data.end_tokens`), otherwise the tokenizer's EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from align.data.dialogues import DialogueText, dialogue_texts, generation_text
from align.data.end_tokens import end_texts, split_at_end
from align.data.reasoning import split_text
from align.data.rows import Tools, Turns, as_response, render_text
from align.data.thought_marks import thought_marks
from align.data.token_ids import text_ids, whole_ids
from align.errors import BadRow, UserError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Turns, tools: Tools = None) -> list[int]:
    """Ids that generation starts from: text with the tokenizer's BOS, messages with the template's generation prompt.

    Raises:
        BadRow: the chat template rejects the messages, or the text contains a BOS or EOS token of its own.
        UserError: the prompt is messages and the tokenizer has no chat template.
    """
    return text_ids(tokenizer, [prompt_text(tokenizer, prompt, tools)], [isinstance(prompt, str)])[0]


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Turns,
    response: Turns,
    tools: Tools = None,
    answer_only: bool = False,
) -> tuple[list[int], list[int]]:
    """Ids of a prompt with its response and EOS at the end: those before the response, and the response's.

    Args:
        answer_only: count the reasoning that the response begins with among what is before it.

    Raises:
        BadRow: as `encode_prompt`, or the template ignores a part of the messages.
        UserError: as `encode_prompt`.
    """
    (text,) = example_texts(tokenizer, prompt, response, tools)
    if answer_only:
        reasoning, answer = split_text(text.response, thought_marks(tokenizer))
        text = replace(text, prompt=text.prompt + reasoning, response=answer)
    are_plain = [isinstance(prompt, str)]
    return whole_ids(tokenizer, [text], are_plain, text_ids(tokenizer, [text.prompt], are_plain))[0]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Turns, response: Turns, is_encoder: bool = False, tools: Tools = None
) -> list[int]:
    """Ids of prompt and response as one sequence, the same in reward training and in PPO.

    Encoders get plain text in the tokenizer's format for pairs. The text of BOS or EOS, which makes a row of data a bad
    row, is removed here, because a sampled response may contain anything.

    Raises:
        BadRow: the chat template rejects the messages.
        UserError: the prompt is messages and the tokenizer has no chat template.
    """
    if is_encoder:
        check_plain(prompt, response, tools)
        return pair_ids(tokenizer, [render_text(prompt)], [render_text(response)])[0]
    try:
        first, second = encode_example(tokenizer, prompt, response, tools)
    except BadRow:
        prompt, response = _without_special_tokens(tokenizer, prompt), _without_special_tokens(tokenizer, response)
        try:
            first, second = encode_example(tokenizer, prompt, response, tools)
        except BadRow:  # the template cannot write this response, which follows the prompt all the same
            text = DialogueText(prompt_text(tokenizer, prompt, tools), render_text(response), tokenizer.eos_token_id)
            are_plain = [isinstance(prompt, str)]
            own_ids = text_ids(tokenizer, [text.prompt], are_plain)
            ((first, second),) = whole_ids(tokenizer, [text], are_plain, own_ids)
    return first + second


def ending_once(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Ids of a row whose end is the place that a classifier on an encoder-decoder reads, with that end.

    Raises:
        BadRow: the row has the text of an end-of-text token of its own.
    """
    end = int(tokenizer.eos_token_id)
    ended = list(ids) if end in ids else [*ids, end]
    if ended.count(end) > 1:
        raise BadRow(f"the text of the end-of-text token {tokenizer.eos_token}, at which an encoder-decoder is read")
    return ended


def check_plain(prompt: Turns, response: Turns, tools: Tools) -> None:
    """Check that messages hold nothing that plain text, which encoders read, would not hold.

    Raises:
        BadRow: names what it is.
    """
    messages = [message for turns in (prompt, response) if not isinstance(turns, str) for message in turns]
    more = [key for message in messages for key in message if key not in ("role", "content")]
    if tools or more:
        raise BadRow(f"`{more[0] if more else 'tools'}` in a row for an encoder, which reads plain text")


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Turns, tools: Tools = None) -> str:
    """The text to tokenize for a prompt. Raises as `encode_prompt`."""
    if not isinstance(prompt, str):
        return generation_text(tokenizer, prompt, tools)
    bos = tokenizer.bos_token
    if bos and bos != tokenizer.eos_token and bos in prompt.removeprefix(bos):
        raise BadRow(f"the text of the begin-of-text token {bos} in the prompt")
    return prompt


def example_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Turns,
    response: Turns,
    tools: Tools = None,
    trained: Sequence[int] = (),
) -> list[DialogueText]:
    """The texts to tokenize for a prompt and its response, with the id that ends it: one, or one for each trained turn.

    Args:
        trained: places of assistant turns in the prompt that are trained too.

    Raises:
        BadRow: as `encode_prompt`, or the template ignores a part of the messages.
    """
    if isinstance(prompt, str):
        text, bos = render_text(response), tokenizer.bos_token or ""
        begins = bos if not prompt and text.startswith(bos) else ""  # a text alone may begin with BOS
        text, end = _text_until_end(tokenizer, text.removeprefix(begins))
        return [DialogueText(prompt_text(tokenizer, prompt), begins + text, end)]
    turns = as_response(prompt, response) if isinstance(response, str) else response
    assert not isinstance(turns, str)  # the response is in the prompt's format
    texts = dialogue_texts(tokenizer, [*prompt, *turns], trained, tools)
    ended = [(text, *_turn_until_end(tokenizer, text.response)) for text in texts]
    return [replace(text, response=response, end=end) for text, response, end in ended]


def pair_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
    """Ids of pairs of texts in the format of an encoder's tokenizer."""
    ids: list[list[int]] = tokenizer(list(prompts), list(responses), verbose=False)["input_ids"]
    return ids


def labels_of_turns(
    tokenizer: PreTrainedTokenizerBase, text: DialogueText, ids: Sequence[int], ignored: int
) -> list[int]:
    """Labels of a prompt: ids in the assistant turns that are trained (with their EOS), `ignored` elsewhere.

    Args:
        ids: of the whole, up to the response.

    Raises:
        UserError: the tokenizer has no offset mapping.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: training on several turns needs a fast tokenizer (tokenizer.json).")
    encoded = tokenizer(
        text.prompt + text.response, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [
        token if any(start < last and first < end for start, end in text.turns) else ignored
        for token, (first, last) in zip(ids, encoded["offset_mapping"], strict=False)
    ]


def _turn_until_end(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int]:
    """A rendered turn before the token that the chat template ends it with, and that token's id: EOS if it writes none."""
    text, end, rest = split_at_end(tokenizer, text)
    if end is not None and tokenizer.added_tokens_decoder[end].lstrip:  # the token takes the spaces before it
        text = text.rstrip()
    for token in end_texts(tokenizer):  # some templates write EOS after the token that ends the turn
        rest = rest.replace(token, "")
    return _checked(tokenizer, text, int(tokenizer.eos_token_id) if end is None else end, rest)


def _text_until_end(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, int]:
    """Plain text before the token that it ends with, and that token's id: EOS if it has none."""
    ends = end_texts(tokenizer)
    end = next((token for token in ends if text.rstrip().endswith(token)), str(tokenizer.eos_token))
    before, found, rest = text.rpartition(end)
    if not found:
        before, rest = text, ""
    return _checked(tokenizer, before, ends[end], tokenizer.eos_token if tokenizer.eos_token in before else rest)


def _checked(tokenizer: PreTrainedTokenizerBase, text: str, end: int, rest: str) -> tuple[str, int]:
    if rest.strip():
        raise BadRow(f"the text of the end-of-text token {tokenizer.convert_ids_to_tokens(end)} inside the response")
    if tokenizer.bos_token and tokenizer.bos_token in text:
        raise BadRow(f"the text of the begin-of-text token {tokenizer.bos_token} in the response")
    return text, end


def _without_special_tokens(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Turns:
    """The turns with the text of BOS and of the tokens that end a response removed."""
    if not isinstance(turns, str):
        return [{**turn, "content": str(_without_special_tokens(tokenizer, turn["content"]))} for turn in turns]
    for token in (tokenizer.bos_token, *end_texts(tokenizer)):
        turns = turns.replace(token, "") if token else turns
    return turns
