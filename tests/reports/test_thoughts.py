"""Public reports of thoughts whose marks are not `<think>`: they were scored, and trained, as the answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from align.data.encode import encode_example, encode_pair, encode_prompt
from align.data.reasoning import scored_turns, set_scores_reasoning, split_sampled
from align.data.rows import Demonstration
from align.data.token_ids import decode_response
from align.data.tokenize import tokenize_demonstrations
from tests.data.messages import assistant, user
from tests.data.test_dialogues import shipped
from tests.data.test_tokenize import make_tokenizer

ASKED = [user("one")]


class Family(NamedTuple):
    """A template, special tokens of its tokenizer (the last ends a turn), and a thought before an answer as the model writes it."""

    template: str
    tokens: list[str]
    said: str
    opens: str
    final: str = "four"  # how it writes an answer without a thought


MAGISTRAL = Family(
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    ["[INST]", "[/INST]", "[THINK]", "[/THINK]", "</s>"],
    "[THINK]easy[/THINK]four",
    "[THINK]",
)
COHERE = Family(
    "{% for m in messages %}<|TURN|>{% if m.role == 'user' %}<|USER|>{{ m.content }}{% else %}<|CHATBOT|>"
    "{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>{% endif %}"
    "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}<|END|>{% endfor %}"
    "{% if add_generation_prompt %}<|TURN|><|CHATBOT|>{% endif %}",
    [f"<|{name}|>" for name in ("TURN", "USER", "CHATBOT", "START_THINKING", "END_THINKING", "START_RESPONSE", "END_RESPONSE", "END")],
    "<|START_THINKING|>easy<|END_THINKING|><|START_RESPONSE|>four<|END_RESPONSE|>",
    "<|START_THINKING|>",
    "<|START_RESPONSE|>four<|END_RESPONSE|>",
)  # fmt: skip
GEMMA = Family(
    shipped("gemma4_v5"),
    ["<|turn>", "<|channel>", "<channel|>", "<turn|>"],
    "<|channel>thought\neasy\n<channel|>four",
    "<|channel>thought\n",
)
MUSE = Family(
    shipped("muse_glimmer"),
    ["<|start|>", "<|message|>", "<|eom|>", "<|eot|>"],
    " to=self<|message|>easy<|eom|><|start|>assistant to=user<|message|>four",
    " to=self<|message|>",
    " to=user<|message|>four",
)
SEED = Family(
    "{% for m in messages %}<seed:bos>{{ m.role }}\n{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}</seed:think>"
    "\n{% endif %}{{ m.content }}<seed:eos>{% endfor %}{% if add_generation_prompt %}<seed:bos>assistant\n{% endif %}",
    ["<seed:bos>", "<seed:eos>"],
    "<seed:think>easy</seed:think>\nfour",
    "<seed:think>",
)
KIMI = Family(
    "{% macro open(name) %}<|open|>{{ name }}<|sep|>{% endmacro %}{% macro close(name) %}<|close|>{{ name }}<|sep|>{% endmacro %}"
    "{% for m in messages %}{{ open('message role=' ~ m.role) }}{% if m.role == 'assistant' %}{{ open('think') }}"
    "{{ m.reasoning_content or '' }}{{ close('think') }}{{ open('response') }}{{ m.content }}{{ close('response') }}"
    "{% else %}{{ m.content }}{% endif %}<|eom|>{% endfor %}"
    "{% if add_generation_prompt %}{{ open('message role=assistant') }}{{ open('think') }}{% endif %}",
    ["<|open|>", "<|close|>", "<|sep|>", "<|eom|>"],
    "easy<|close|>think<|sep|><|open|>response<|sep|>four",
    "",
    "<|close|>think<|sep|><|open|>response<|sep|>four<|close|>response<|sep|>",
)
FAMILIES = [MAGISTRAL, COHERE, GEMMA, MUSE, SEED]
NAMES = ["Magistral", "Cohere", "Gemma 4", "a channel of its own", "marks that are text"]


def tokenizer_of(family: Family) -> Any:
    end = family.tokens[-1]
    return make_tokenizer(["<bos>", *family.tokens], family.template, eos_token=end, pad_token=end, bos_token="<bos>")


@pytest.mark.parametrize("family", FAMILIES, ids=NAMES)
def test_a_thought_in_marks_of_its_own_leaks_into_the_answer(family: Family) -> None:
    """https://github.com/RooCodeInc/Roo-Code/issues/8522 ([THINK]), https://github.com/scouzi1966/maclocal-api/issues/148
    (<|START_THINKING|>), https://github.com/attevon-llc/OpenTranscribe/issues/439 (<|channel>thought)."""
    tokenizer = tokenizer_of(family)
    prompt = encode_prompt(tokenizer, ASKED)
    for said, thinks, answer in (
        (family.said, True, "four"),
        (family.final, False, "four"),
        (f"{family.opens}easy, and", True, ""),  # cut off
    ):
        ids = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        text = decode_response(tokenizer, ASKED, prompt, ids)
        set_scores_reasoning(tokenizer, False)
        reasoning, found = split_sampled(tokenizer, text, prompt, ids)
        assert ("easy" in reasoning, found) == (thinks, answer)
        set_scores_reasoning(tokenizer, True)
        whole = split_sampled(tokenizer, text, prompt, ids)[1]
        assert ("easy" in whole, family.opens.strip() in whole) == (thinks, thinks)


@pytest.mark.parametrize("family", [MAGISTRAL, COHERE, GEMMA, SEED], ids=["Magistral", "Cohere", "Gemma 4", "text"])
def test_a_thought_of_the_data_is_scored_and_trained_by_the_keys(family: Family) -> None:
    """https://github.com/RooCodeInc/Roo-Code/issues/8522: the same marks in the rows: rewards read the answer, and SFT keeps the thought, or not by `train_on_reasoning`."""
    tokenizer = tokenizer_of(family)
    inside = [assistant(family.said.replace("<|START_RESPONSE|>", "").replace("<|END_RESPONSE|>", ""))]
    answer = [assistant("four")]
    assert encode_pair(tokenizer, ASKED, scored_turns(tokenizer, inside)) == encode_pair(tokenizer, ASKED, answer)
    before, counted = encode_example(tokenizer, ASKED, inside, answer_only=True)
    assert "easy" in tokenizer.decode(before)
    assert "four" in tokenizer.decode(counted)
    assert "easy" not in tokenizer.decode(counted)

    def trained(response: Any, keep: bool) -> list[int]:
        rows = [Demonstration(ASKED, response, "f:1")]
        return list(
            tokenize_demonstrations(rows, tokenizer, max_length=512, train_on_reasoning=keep)[0]["input_ids"][0]
        )

    assert trained(inside, False) == trained(answer, True)
    assert "easy" in tokenizer.decode(trained(inside, True))


def test_a_generation_prompt_that_opens_a_thought_of_its_own() -> None:
    """https://github.com/jundot/omlx/pull/2533: the prompt has opened the thought, so that the response has no mark but the last."""
    opens = COHERE.template.replace("<|CHATBOT|>{% endif %}", "<|CHATBOT|><|START_THINKING|>{% endif %}")
    cohere = COHERE._replace(template=opens, said=COHERE.said.removeprefix(COHERE.opens))
    for family in (cohere._replace(final="<|END_THINKING|>" + COHERE.final), KIMI):
        tokenizer = tokenizer_of(family)
        prompt = encode_prompt(tokenizer, ASKED)
        for said, answer in ((family.said, "four"), ("easy, and", "")):
            ids = tokenizer(said, add_special_tokens=False)["input_ids"]
            text = decode_response(tokenizer, ASKED, prompt, ids)
            assert split_sampled(tokenizer, text, prompt, ids)[1] == answer
        # A row without a thought is trained to close it at once, where generation starts.
        before, response = encode_example(tokenizer, ASKED, [assistant("four")])
        assert (before, tokenizer.decode(response)) == (prompt, family.final + family.tokens[-1])
