"""Messages of dialogues, and the ids of a response alone."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from align.data.encode import encode_example
from align.data.rows import Turns


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: Turns, response: Turns) -> list[int]:
    return encode_example(tokenizer, prompt, response)[1]
