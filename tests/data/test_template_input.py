"""What a chat template leaves out, joins or writes twice: refused by name, or given to it in another form."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from align.data.columns import choose_formats
from align.data.encode import encode_example, encode_prompt
from align.data.end_tokens import set_model_ends
from align.data.formats import read_row
from align.data.rows import Demonstration, Preference, Prompt
from align.data.tokenize import tokenize_demonstrations, tokenize_preferences, tokenize_prompts
from align.data.turn_end import turn_end_note
from align.errors import BadRow, UserError
from tests.data.messages import assistant, user
from tests.data.test_dialogues import QWEN3, row_of, shipped, tokenizer_for, trained

SYSTEM = {"role": "system", "content": "Be kind. "}
# Without a branch for system messages, as many a template of one's own.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen2.5's: a system message that the row lacks is written all the same.
DEFAULT_SYSTEM = "{{ messages[0].content if messages[0].role == 'system' else 'Be kind.' }}" + NO_SYSTEM
# As Qwen3.8's: a thought is read from `reasoning_content` alone, and written in every turn.
APART = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("row_type", "tokenize", "values"),
    [
        (Demonstration, tokenize_demonstrations, {"messages": [SYSTEM, user("one"), assistant("I")]}),
        (Preference, tokenize_preferences, {"prompt": [SYSTEM, user("one")], "chosen": "I", "rejected": "II"}),
        (Prompt, tokenize_prompts, {"prompt": [SYSTEM, user("one")]}),
    ],
)
def test_a_system_message_that_the_template_leaves_out_is_refused(row_type: Any, tokenize: Any, values: Any) -> None:
    row = read_row(values, "f:1", row_type, choose_formats("f", list(values), row_type))
    limits = (99, "error") if row_type is Prompt else ()
    keys = {} if limits else {"max_length": 99}
    with pytest.raises(
        UserError, match=r"the chat template ignores messages of role system; write them into .*: 1 \(f:1\)"
    ):
        tokenize([row], tokenizer_for(NO_SYSTEM, "<|im_end|>"), *limits, **keys)
    tokenize([row], tokenizer_for(DEFAULT_SYSTEM, "<|im_end|>"), *limits, **keys)


def test_a_message_of_role_developer_is_written_or_refused() -> None:
    developer = {"role": "developer", "content": "Be terse."}
    rows = [row_of([developer, user("one"), assistant("I")]), row_of([SYSTEM, developer, user("one"), assistant("I")])]
    for name, written in (("gptoss", True), ("llama3", True), ("cohere2", False), ("qwen3", False)):
        tokenizer = tokenizer_for(shipped(name), "<|return|>")
        tokenizer.bos_token = "<|im_start|>"
        with (
            contextlib.nullcontext()
            if written
            else pytest.raises(UserError, match="ignores messages of role developer")
        ):
            assert "Be terse." in trained(tokenizer, rows[0])[0][0]
    with pytest.raises(
        UserError, match="leaves out a message of role developer"
    ):  # gpt-oss's reads the first one alone
        trained(tokenizer_for(shipped("gptoss"), "<|return|>"), rows[1])


def test_a_thought_is_given_where_the_template_reads_it() -> None:
    tokenizer = tokenizer_for(APART, "<|im_end|>")
    inside, apart = assistant("<think>\nhm\n</think>\n\nI"), {**assistant("I"), "reasoning_content": "hm"}
    (example,) = trained(tokenizer, row_of([user("one"), inside, user("two"), inside]))
    assert example[1] == 2 * "hm\n</think>\n\nI<|im_end|>"
    assert trained(tokenizer, row_of([user("one"), apart, user("two"), apart])) == [example]
    prompts = [[user("one"), turn, user("two")] for turn in (inside, apart)]
    assert encode_prompt(tokenizer, prompts[0]) == encode_prompt(tokenizer, prompts[1])
    # A template that writes no thought of its own has the content as it is.
    assert trained(tokenizer_for(NO_SYSTEM, "<|im_end|>"), row_of([user("one"), inside]))[0][1].startswith("<think>")


@pytest.mark.parametrize("turn", [assistant("hm\n</think>\n\nI"), {**assistant("I"), "reasoning_content": "hm"}])
def test_a_thought_after_a_generation_prompt_that_has_closed_it_is_refused(turn: Any) -> None:
    tokenizer = tokenizer_for(shipped("qwen3_5_nothink"), "<|im_end|>")
    with pytest.raises(BadRow, match="and a generation prompt that has closed it"):
        encode_example(tokenizer, [user("one")], [turn])


def test_assistant_turns_that_the_template_joins_are_refused() -> None:
    prompt, answer = [user("one"), assistant("I")], [assistant("II")]
    with pytest.raises(BadRow, match="joins an assistant turn to the one before it; join them in the row"):
        encode_example(tokenizer_for(shipped("gemma4_v5"), "<turn|>"), prompt, answer)
    assert encode_example(tokenizer_for(QWEN3, "<|im_end|>"), prompt, answer)


def test_an_end_that_the_template_writes_twice_is_one() -> None:
    tokenizer = tokenizer_for(shipped("phi3_5"), "<|end|>")  # writes EOS after <|end|>
    assert trained(tokenizer, row_of([user("one"), assistant("I")])) == [
        ("<|user|>\none<|end|>\n<|assistant|>\n", "I<|end|>")
    ]


def with_end(**flags: bool) -> Any:
    """A tokenizer of characters that puts a space before a text, as Llama 2's, and has an end of turn with these flags."""
    vocabulary = {token: id for id, token in enumerate(["<unk>", "</s>", *map(chr, range(33, 127)), "▁", "\n"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken("<|end|>", special=True, **{"normalized": False, **flags})])
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", chat_template=template
    )
    set_model_ends(tokenizer, [tokenizer.convert_tokens_to_ids("<|end|>")])
    return tokenizer


@pytest.mark.parametrize(
    ("flags", "after"), [({"lstrip": True}, []), ({"rstrip": True}, []), ({"normalized": True}, [1])]
)
def test_an_end_token_with_flags_is_trained_as_the_whole_text_has_it(flags: dict[str, bool], after: list[int]) -> None:
    tokenizer = with_end(**flags)
    messages = [user("one"), assistant("I \n")]
    before, response = encode_example(tokenizer, messages[:1], messages[1:])
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert before + response == whole + after  # hidden behind a space, the end is mere text, and EOS follows
    assert (turn_end_note(tokenizer) is not None) == bool(after)


@pytest.mark.parametrize("name", ["system", "images", "label", "reasoning_content"])
def test_a_column_that_the_model_never_sees_is_said(name: str, capsys: Any) -> None:
    tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
    rows = [
        row_of([user("one"), assistant("I")], **{name: value}) for value in (False if name == "label" else "x", None)
    ]
    tokenize_demonstrations(rows, tokenizer, max_length=99)
    assert (
        capsys.readouterr().err
        == f"note: the column `{name}` is not read: the model never sees it: 1 of 2 rows (f:1)\n"
    )
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "I"}]
    values = {"conversations": turns, "system": "Be kind."}
    row = read_row(values, "f:1", Demonstration, choose_formats("f", list(values), Demonstration))
    tokenize_demonstrations([row], tokenizer, max_length=99)  # type: ignore[list-item]
    assert not capsys.readouterr().err
