"""Reasoning before `</think>`: what rewards and metrics read, as the key `score_reasoning` says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.data.encode import encode_example, encode_pair, encode_prompt
from align.data.reasoning import scored_turns, set_scores_reasoning, split_sampled, split_text
from align.data.rows import Demonstration, Preference, Prompt
from align.data.tokenize import tokenize_demonstrations, tokenize_preferences
from align.errors import UserError
from align.evaluate.reward_model import encode_for_reward
from align.generation.responses import decode_responses
from reward_models.responses import Responses
from reward_models.trained import ModelReward
from tests.data.messages import assistant, user
from tests.data.test_dialogues import EMPTY, ONE, QWEN3, R1_OPENS, SAID, tokenizer_for
from tests.data.test_tokenize import make_tokenizer


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("an answer", ("", "an answer")),
        (" <b>", ("", " <b>")),
        ("<think>\nhm\n</think>\n\nan answer", ("<think>\nhm\n</think>\n\n", "an answer")),
        ("hm</think> an answer", ("hm</think> ", "an answer")),
        ("<think></think>a</think>b", ("<think></think>a</think>", "b")),
        ("<think>hm, and", ("<think>hm, and", "")),
        ("hm</think>", ("hm</think>", "")),
    ],
)
def test_reasoning_and_answer(text: str, parts: tuple[str, str]) -> None:
    assert split_text(text) == parts


@pytest.fixture(params=["text", "tokens", "special tokens"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Marks of reasoning as ordinary text, as tokens that decoding keeps, and as tokens that decoding leaves out."""
    if request.param == "text":
        return tokenizer_for(QWEN3, "<|im_end|>")
    marks = ["<think>", "</think>"]
    made = make_tokenizer(["<|im_end|>", "<|im_start|>", *marks], QWEN3, eos_token="<|im_end|>", pad_token="<|im_end|>")
    if request.param == "tokens":
        made.add_tokens(["<think>", "</think>"], special_tokens=False)
    else:
        made.add_special_tokens({"additional_special_tokens": marks})
    return made


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>\nhm\n</think>\n\nI<|im_end|>", "I"),
        ("hm</think>I", "I"),
        ("I<|im_end|>", "I"),
        ("<think>hm", ""),
        ("<think>hm</think><|im_end|>", ""),
    ],
)
def test_a_sampled_response_is_scored_by_its_answer(tokenizer: Any, said: str, answer: str) -> None:
    prompt, ids = [user("one")], tokenizer(said, add_special_tokens=False)["input_ids"]
    prompt_ids = encode_prompt(tokenizer, prompt)
    sampled = _Sampled(prompt_ids, ids)
    row = Prompt(prompt, "f:1", {"tools": None})
    batch = decode_responses(tokenizer, [row], sampled)
    assert (batch.texts, batch.completions, batch.response_ids) == ([answer], [[assistant(answer)]], [ids])
    assert bool(batch.reasoning[0]) == (answer != said.removesuffix("<|im_end|>"))
    set_scores_reasoning(tokenizer, True)
    batch = decode_responses(tokenizer, [row], sampled)
    assert (batch.texts, batch.reasoning) == ([said.removesuffix("<|im_end|>")], [""])


class _Sampled:
    def __init__(self, prompt_ids: list[int], response_ids: list[int]) -> None:
        self.prompt_ids, self.response_ids = torch.tensor([prompt_ids]), torch.tensor([response_ids])
        self.prompt_mask, self.mask = self.prompt_ids >= 0, self.response_ids >= 0


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    tokenizer = tokenizer_for(R1_OPENS, "</s>")
    ids = encode_prompt(tokenizer, [user("one")])
    assert split_sampled(tokenizer, "hm, and", ids, [5]) == ("hm, and", "")
    assert split_sampled(tokenizer, "hm</think>I", ids, [5]) == ("hm</think>", "I")


def test_pairs_are_trained_as_they_are_scored(tokenizer: Any) -> None:
    thought = assistant("<think>\nhm\n</think>\n\nI")
    row = Preference([user("one")], [thought], [{**assistant("2"), "reasoning_content": "oh"}], "f:1")
    texts = {False: (EMPTY + "I", EMPTY + "2"), True: ("<think>\nhm\n</think>\n\nI", "<think>\noh\n</think>\n\n2")}
    for scores, expected in texts.items():
        set_scores_reasoning(tokenizer, scores)
        dataset, _ = tokenize_preferences([row], tokenizer, max_length=4096)
        for side, text in zip(("chosen", "rejected"), expected, strict=True):
            assert tokenizer.decode(dataset[0][f"{side}_ids"]) == f"{ONE}{SAID}{text}<|im_end|>"
            answer = scored_turns(tokenizer, getattr(row, side))
            assert encode_pair(tokenizer, row.prompt, answer) == dataset[0][f"{side}_ids"]
    set_scores_reasoning(tokenizer, False)
    with pytest.raises(UserError, match="no answer after the reasoning"):
        tokenize_preferences(
            [Preference(row.prompt, [assistant("hm</think>")], row.rejected, "f:1")], tokenizer, max_length=99
        )


def test_a_reward_model_reads_the_answer_after_reasoning_and_else_the_ids_that_were_sampled() -> None:
    tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
    reward = ModelReward(
        "model", None, batch_size=1, max_length=None, reads_ids=True,
        encode=lambda prompt, text, tools: encode_for_reward(tokenizer, False, prompt, text, tools),
    )  # fmt: skip
    prompt = [user("one")]
    batch = Responses([prompt] * 2, ["I", "I"], [[assistant("I")]] * 2, [[7], [7]], [[8], [8]], {}, ["hm</think>", ""])
    assert tokenizer.decode(reward.token_ids(batch, 0)) == f"{ONE}{SAID}{EMPTY}I<|im_end|>"
    assert reward.token_ids(batch, 1) == [7, 8]
    assert batch.row(1).reasoning == [""]


def test_the_reference_is_measured_by_its_answer() -> None:
    tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
    response = [assistant("hm</think>I")]
    whole = encode_example(tokenizer, [user("one")], response)
    before, answer = encode_example(tokenizer, [user("one")], response, answer_only=True)
    assert before + answer == whole[0] + whole[1]
    assert tokenizer.decode(answer) == "I<|im_end|>"
    assert tokenizer.decode(whole[1]) == "<think>\nhm\n</think>\n\nI<|im_end|>"


@pytest.mark.parametrize("said", ["hm</think>I", "<think>I", "</think>", "</s>I</s></think>"])
def test_whatever_is_sampled_can_be_scored(said: str) -> None:
    tokenizer = tokenizer_for(R1_OPENS + "{% if true %}</think>{% endif %}", "</s>")
    assert encode_pair(tokenizer, [user("one")], said)[-1] == tokenizer.eos_token_id


def test_reasoning_can_be_left_out_of_what_is_trained() -> None:
    tokenizer = tokenizer_for(QWEN3, "<|im_end|>")

    def trained(turns: list[list[dict[str, Any]]], **more: Any) -> list[str]:
        rows = [Demonstration([user("one"), *each[:-1]], each[-1:], "f:1", trained_turns=2) for each in turns]
        return [
            tokenizer.decode(ids)
            for ids in tokenize_demonstrations(rows, tokenizer, max_length=512, **more)[0]["input_ids"]
        ]

    thoughts = [assistant("hm</think>I"), user("two"), {**assistant("you"), "reasoning_content": "ah"}]
    answers = [assistant("I"), user("two"), assistant("you")]
    assert trained([thoughts], train_on_reasoning=False) == trained([answers])
    assert any("hm" in text for text in trained([thoughts]))
    with pytest.raises(UserError, match="no answer after the reasoning; `train_on_reasoning: true`"):
        trained([[assistant("hm</think>")]], train_on_reasoning=False)
    text = [Demonstration("one ", "hm</think>I", "f:1")], [Demonstration("one ", "I", "f:1")]
    ids = [
        tokenize_demonstrations(rows, tokenizer, max_length=512, train_on_reasoning=False)[0]["input_ids"]
        for rows in text
    ]
    assert list(ids[0]) == list(ids[1])
