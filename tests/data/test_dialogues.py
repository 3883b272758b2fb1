"""Chat templates that render a turn by what follows it, and all that a message may hold: texts written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset

from align.config.data_source import DataSource
from align.data.chat_template import set_template_kwargs
from align.data.columns import choose_formats
from align.data.encode import encode_pair, encode_prompt
from align.data.end_tokens import set_model_ends
from align.data.formats import read_row
from align.data.load import DataSettings, load_rows
from align.data.reasoning import set_scores_reasoning
from align.data.rows import Demonstration, Preference, Prompt
from align.data.tokenize import check_margins, tokenize_demonstrations, tokenize_preferences
from align.data.turn_end import turn_end_note
from align.errors import UserError
from align.runs.manifest import check_template_kwargs, check_tokenizer, tokenizer_digest
from tests.data.messages import assistant, user
from tests.data.test_tokenize import CHATML, chatml, make_tokenizer
from tests.worlds import manifest

# As Qwen3's: turns after the last user turn have a thought, perhaps an empty one; earlier ones have none.
QWEN3 = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
{%- set content = m.content if m.content is string else '' -%}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() -%}
{%- set content = content.split('</think>')[-1].lstrip() -%}
{%- endif -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>
{{ thought }}
</think>

{% endif %}{{ content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif -%}"""
# As Phi-3's: only a complete dialogue ends in EOS.
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
# As gpt-oss's: <|return|> ends the last turn, <|end|> the earlier ones.
GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# As the DeepSeek-R1 distills': what is before </think> is left out of every turn, and generation begins in a thought.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|A|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}"
)
R1_OPENS = R1 + "{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
R1_PLAIN = R1 + "{% if add_generation_prompt %}<|A|>{% endif %}"

DIALOGUE = [user("one"), assistant("I"), user("two"), assistant("II")]


# The models' own templates, as TRL ships them: EOS, and what is learnt of a call of a tool and of the answer after it.
SHIPPED = {
    "qwen3": (
        "<|im_end|>",
        [
            '<think>\nR\n</think>\n\n<tool_call>\n{"name": "sum", "arguments": {"of": [1, 2]}}\n</tool_call>',
            "<think>\nS\n</think>\n\nIII",
        ],
    ),
    "qwen3_5_think": (
        "<|im_end|>",
        [
            "R\n</think>\n\n<tool_call>\n<function=sum>\n<parameter=of>\n[1, 2]\n</parameter>\n</function>\n</tool_call>",
            "S\n</think>\n\nIII",
        ],
    ),
    "gptoss": (
        "<|return|>",
        [
            "<|channel|>analysis<|message|>R<|end|><|start|>assistant to=functions.sum<|channel|>commentary json"
            '<|message|>{"of": [1, 2]}<|call|>',
            "<|channel|>analysis<|message|>S<|end|><|start|>assistant<|channel|>final<|message|>III",
        ],
    ),
    "glm4moe": (
        "<|end|>",
        [
            "\n<think>R</think>\n<tool_call>sum\n<arg_key>of</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call>",
            "\n<think>S</think>\nIII",
        ],
    ),
}


def shipped(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def tokenizer_for(template: str, eos: str) -> Any:
    return make_tokenizer([eos, "<|im_start|>"], template, eos_token=eos, pad_token=eos)


def row_of(messages: list[dict[str, Any]], **columns: Any) -> Demonstration:
    values = {"messages": messages, **columns}
    row = read_row(values, "f:1", Demonstration, choose_formats("f", list(values), Demonstration))
    assert isinstance(row, Demonstration)
    return row


def trained(tokenizer: Any, row: Demonstration) -> list[tuple[str, str]]:
    """Of each example: its text before the first trained token, and the trained tokens."""
    dataset, _ = tokenize_demonstrations([row], tokenizer, max_length=4096)
    found = []
    for example in dataset:
        first = next(index for index, label in enumerate(example["labels"]) if label != -100)
        learnt = [label for label in example["labels"] if label != -100]
        found.append((tokenizer.decode(example["input_ids"][:first]), tokenizer.decode(learnt)))
    return found


ONE, TWO = "<|im_start|>user\none<|im_end|>\n", "<|im_start|>user\ntwo<|im_end|>\n"
SAID = "<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (
            QWEN3,
            "<|im_end|>",
            [(ONE + SAID, EMPTY + "I<|im_end|>"), (f"{ONE}{SAID}I<|im_end|>\n{TWO}{SAID}", EMPTY + "II<|im_end|>")],
        ),
        (
            PHI3,
            "</s>",
            [
                ("<|user|>one<|end|><|assistant|>", "I<|end|></s>"),
                ("<|user|>one<|end|><|assistant|>I<|end|><|user|>two<|end|><|assistant|>", "II<|end|></s>"),
            ],
        ),
        (
            GPT_OSS,
            "<|return|>",
            [
                ("<|start|>user<|message|>one<|end|><|start|>assistant", "<|message|>I<|return|>"),
                (
                    "<|start|>user<|message|>one<|end|><|start|>assistant<|message|>I<|end|>"
                    "<|start|>user<|message|>two<|end|><|start|>assistant",
                    "<|message|>II<|return|>",
                ),
            ],
        ),
        (  # generation begins in a thought, and so does training
            R1_OPENS,
            "</s>",
            [
                ("<|U|>one<|A|><think>\n", "\n</think>\n\nI</s>"),
                ("<|U|>one<|A|>I</s><|U|>two<|A|><think>\n", "\n</think>\n\nII</s>"),
            ],
        ),
        (R1_PLAIN, "</s>", [("<|U|>one<|A|>", "I</s>II</s>")]),
        # The number of messages stands in front: the prompt is what generation sees.
        (
            "{{ messages | length }}" + CHATML,
            "<|im_end|>",
            [("1" + ONE + SAID, "I<|im_end|>"), (f"3{ONE}{SAID}I<|im_end|>\n{TWO}{SAID}", "II<|im_end|>")],
        ),
    ],
)
def test_each_turn_is_trained_as_generation_would_render_it(
    template: str, eos: str, expected: list[tuple[str, str]]
) -> None:
    assert trained(tokenizer_for(template, eos), row_of(DIALOGUE)) == expected


@pytest.mark.parametrize("thought", ["<think>\nhm\n</think>\n\n", "hm\n</think>\n\n"])
def test_reasoning_that_the_template_leaves_out_is_trained(thought: str) -> None:
    dialogue = [user("one"), assistant(thought + "I"), user("two"), assistant(thought + "II")]
    before = "<|U|>one<|A|>\n\nI</s><|U|>two"
    assert trained(tokenizer_for(R1_OPENS, "</s>"), row_of(dialogue)) == [
        ("<|U|>one<|A|><think>\n", "hm\n</think>\n\nI</s>"),
        (before + "<|A|><think>\n", "hm\n</think>\n\nII</s>"),
    ]
    assert trained(tokenizer_for(R1_PLAIN, "</s>"), row_of(dialogue)) == [
        ("<|U|>one<|A|>", thought + "I</s>"),
        (before + "<|A|>", thought + "II</s>"),
    ]


def test_reasoning_content_is_given_to_the_template_or_refused() -> None:
    dialogue = [user("one"), {**assistant("I"), "reasoning_content": "hm"}, user("two"), assistant("II")]
    tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
    assert trained(tokenizer, row_of(dialogue)) == [
        (ONE + SAID, "<think>\nhm\n</think>\n\nI<|im_end|>"),
        (f"{ONE}{SAID}I<|im_end|>\n{TWO}{SAID}", EMPTY + "II<|im_end|>"),
    ]
    with pytest.raises(UserError, match="the chat template ignores `reasoning_content` in a message; write it into"):
        trained(chatml(), row_of(dialogue))


CALL = {"type": "function", "function": {"name": "sum", "arguments": {"of": [1, 2]}}}
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
AGENT = [
    user("one"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "name": "sum", "content": "3"},
    assistant("III"),
]
LISTED = '<|im_start|>system\n[{"type": "function", "function": {"name": "sum", "parameters": {}}}]<|im_end|>\n'
CALLED = '<tool_call>{"name": "sum", "arguments": {"of": [1, 2]}}</tool_call><|im_end|>'


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("arguments", [{"of": [1, 2]}, '{"of":[1,2]}'])
def test_tool_use_is_trained(tools: Any, arguments: Any) -> None:
    call = {**CALL, "function": {"name": "sum", "arguments": arguments}}
    messages = [AGENT[0], {**AGENT[1], "tool_calls": [call]}, *AGENT[2:]]
    tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
    assert trained(tokenizer, row_of(messages, tools=tools)) == [
        (LISTED + ONE + SAID, f"{EMPTY}{CALLED}{EMPTY}III<|im_end|>")
    ]
    row = read_row({"prompt": messages[:3], "tools": tools}, "f:1", Prompt, [("prompt",)])
    assert row.extra["tools"] == TOOLS
    assert tokenizer.decode(encode_prompt(tokenizer, row.prompt, TOOLS)).endswith(
        f"{SAID}{EMPTY}{CALLED}\n<|im_start|>tool\n3<|im_end|>\n{SAID}"
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_agents_by_the_templates_of_models(name: str) -> None:
    eos, expected = SHIPPED[name]
    numbers = {"type": "array", "items": {"type": "number"}, "description": "o"}
    function = {"name": "sum", "description": "s", "parameters": {"type": "object", "properties": {"of": numbers}}}
    thinking = [
        AGENT[0],
        {**AGENT[1], "reasoning_content": "R"},
        AGENT[2],
        {**AGENT[3], "reasoning_content": "S"},
        user("two"),
        assistant("IV"),
    ]
    row = row_of(thinking, tools=[{"type": "function", "function": function}])
    learnt = [text for _, text in trained(tokenizer_for(shipped(name), eos), row)]
    assert learnt[:2] == [text + eos for text in expected]
    assert len(learnt) == 3


@pytest.mark.parametrize(
    ("name", "eos", "expected"),
    [
        ("phi3_5", "<|endoftext|>", ["I<|end|>\n<|endoftext|>", "II<|end|>\n<|endoftext|>"]),
        ("gptoss", "<|return|>", [f"<|channel|>final<|message|>{text}<|return|>" for text in ("I", "II")]),
        ("qwen3", "<|im_end|>", [EMPTY + "I<|im_end|>", EMPTY + "II<|im_end|>"]),
        ("qwen3_5_nothink", "<|im_end|>", ["I<|im_end|>", "II<|im_end|>"]),
        ("qwen3_5_think", "<|im_end|>", ["\n</think>\n\nI<|im_end|>", "\n</think>\n\nII<|im_end|>"]),
    ],
)
def test_dialogues_by_the_templates_of_models(name: str, eos: str, expected: list[str]) -> None:
    found = trained(tokenizer_for(shipped(name), eos), row_of(DIALOGUE))
    assert [learnt for _, learnt in found] == expected


@pytest.mark.parametrize("thought", [{}, {"reasoning_content": "hm"}])  # which is dropped later: one example per turn
def test_a_turn_ends_by_the_token_that_opens_the_next(thought: dict[str, str]) -> None:
    ends = ["<|endoftext|>", "<|user|>", "<|observation|>"]  # of GLM-4.5
    tokenizer = make_tokenizer(ends, shipped("glm4moe"), eos_token=ends[0], pad_token=ends[0])
    set_model_ends(tokenizer, [0, 1, 2])
    said = "".join(["\n<think>", thought.get("reasoning_content", ""), "</think>"])
    row = row_of([*AGENT, user("two"), {**assistant("I"), **thought}, user("three"), assistant("II")])
    learnt = "".join(text for _, text in trained(tokenizer, row))
    assert learnt.count("</arg_value>\n</tool_call><|observation|>") == 1
    assert "III<|user|>" in learnt
    assert f"{said}\nI<|user|>" in learnt
    assert learnt.endswith("II<|endoftext|>")
    no_end = row_of([user("one"), assistant("I"), assistant("II"), user("two"), assistant("III")])
    assert [text.rpartition("\n")[2] for _, text in trained(tokenizer, no_end)] == [
        "I<|endoftext|>",
        "II<|user|>",
        "III<|endoftext|>",
    ]


# As Mistral's: the system message is written into the last user turn.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
    "{{ system + '\n' if loop.last and system }}{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a_system_message_in_the_last_user_turn() -> None:
    dialogue = [{"role": "system", "content": "S"}, user("one"), assistant("I"), user("one"), assistant("II")]
    assert trained(tokenizer_for(MISTRAL, "</s>"), row_of(dialogue)) == [
        ("[INST] S\none[/INST]", " I</s>"),
        ("[INST] one[/INST] I</s>[INST] S\none[/INST]", " II</s>"),
    ]


def test_the_template_decides_in_which_order_roles_may_come(capsys: Any) -> None:
    system = {"role": "system", "content": "S"}
    row = row_of([assistant("O"), user("one"), user("two"), assistant("I"), assistant("II"), system, assistant("III")])
    ((before, learnt),) = trained(chatml(), row)
    assert (before, learnt) == (f"{SAID}O<|im_end|>\n{ONE}{TWO}{SAID}", "I<|im_end|>II<|im_end|>III<|im_end|>")
    assert "an assistant turn before the first user turn" in capsys.readouterr().err
    strict = "{% if messages[1].role == messages[0].role %}{{ raise_exception('roles must alternate') }}{% endif %}"
    with pytest.raises(UserError, match="rejects it: roles must alternate"):
        trained(chatml(strict + CHATML), row_of([user("one"), user("two"), assistant("I")]))
    with pytest.raises(UserError, match="leaves out a message of role system where turns do not alternate"):
        trained(
            chatml(
                CHATML.replace("messages %}", "messages if m.role != 'system' %}").replace("m.role", "message.role")
            ),
            row,
        )


@pytest.mark.parametrize(("said", "noted"), [("I", True), ("hm</think>I", False)])
def test_turns_without_the_thought_that_the_template_opens_are_named(said: str, noted: bool, capsys: Any) -> None:
    trained(tokenizer_for(R1_OPENS, "</s>"), row_of([user("one"), assistant(said)]))
    assert ("opens a thought (<think>) and the row has none" in capsys.readouterr().err) == noted


@pytest.mark.parametrize(
    ("turn", "header"),
    [
        ("{{ m.role }}: {{ m.content }}\n", "assistant:"),
        ("### {{ m.role }}:\n{{ m.content }}\n### End\n\n", "### assistant:\n"),
        ("<|{{ m.role }}|>{{ m.content }}", "<|assistant|>"),
        ("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n"),
    ],
)
def test_a_generation_prompt_that_nobody_asked_for_is_no_part_of_the_response(turn: str, header: str) -> None:
    """A template that ignores `add_generation_prompt` gives what the one that reads it gives."""
    turns = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    written = f"{{{{ {header!r} }}}}"  # a line break at the end of a template is not written
    always, asked = chatml(turns + written), chatml(f"{turns}{{% if add_generation_prompt %}}{written}{{% endif %}}")
    assert turn_end_note(always) == turn_end_note(asked)
    row = Demonstration(DIALOGUE[:3], DIALOGUE[3:], "f:1", trained_turns=2)
    trained, expected = (tokenize_demonstrations([row], each, max_length=999)[0][:] for each in (always, asked))
    assert trained == expected
    assert always.decode(trained["input_ids"][0]).count(header.strip()) == 2
    assert encode_pair(always, DIALOGUE[:3], DIALOGUE[3:]) == encode_pair(asked, DIALOGUE[:3], DIALOGUE[3:])


def test_a_template_for_images_is_refused() -> None:
    template = "{% for m in messages %}{{ m.role }}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="does not write the text of a turn"):
        trained(chatml(template + "{% if add_generation_prompt %}assistant{% endif %}"), row_of(DIALOGUE))


def test_arguments_that_a_table_filled_with_nulls(tmp_path: Path) -> None:
    calls = [[{"function": {"name": "f", "arguments": {key: 1}}}] for key in ("a", "b")]
    rows = [{"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": each}]} for each in calls]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    source = DataSource(path=str(tmp_path / "rows.parquet"))
    loaded = load_rows(DataSettings(train_dataset=[source], seed=1), Demonstration)
    found = [row.completion[0]["tool_calls"][0]["function"]["arguments"] for row in loaded.train]
    assert found == [{"a": 1}, {"b": 1}]


def test_a_template_may_take_the_arguments_of_calls_as_text() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls %}"
        "{{ 'CALL ' + call.function.arguments }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    ((_, learnt),) = trained(tokenizer_for(template, "<|end|>"), row_of(AGENT))
    assert learnt == 'CALL {"of": [1, 2]}<|end|>III<|end|>'


@pytest.mark.parametrize(
    ("messages", "columns", "reason"),
    [
        (AGENT[:2], {}, "the chat template ignores `tool_calls` in a message"),
        (DIALOGUE, {"tools": TOOLS}, "the chat template ignores `tools`"),
        ([*DIALOGUE[:3], {**assistant("II"), "score": 3}], {}, "the chat template ignores `score` in a message"),
    ],
)
def test_what_a_template_ignores_is_refused(messages: Any, columns: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        trained(chatml(), row_of(messages, **columns))


def test_results_of_tools_that_a_template_ignores_are_refused() -> None:
    template = CHATML.replace("messages %}", "messages if message.role != 'tool' %}")
    with pytest.raises(UserError, match="the chat template ignores messages of role tool"):
        trained(chatml(template), row_of([user("a"), assistant("b"), {"role": "tool", "content": "3"}, assistant("c")]))


def test_pairs_whose_prompt_changes_once_a_response_follows() -> None:
    tokenizer = tokenizer_for(R1_OPENS, "</s>")
    prompt = DIALOGUE[:3]
    set_scores_reasoning(tokenizer, True)
    row = Preference(prompt, [assistant("hm</think>II")], [assistant("2")], "f:1")
    dataset, _ = tokenize_preferences([row], tokenizer, max_length=4096)
    before = "<|U|>one<|A|>I</s><|U|>two<|A|>"
    assert tokenizer.decode(dataset[0]["chosen_ids"]) == before + "<think>\nhm</think>II</s>"
    assert tokenizer.decode(dataset[0]["rejected_ids"]) == before + "<think>\n\n</think>\n\n2</s>"
    assert encode_pair(tokenizer, prompt, "2") == dataset[0]["rejected_ids"]
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == before + "<think>\n"


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "learnt"),
        [
            ([{}, {}, {}], "I<|im_end|>II<|im_end|>III<|im_end|>"),
            ([{"train": False}, {}, {}], "II<|im_end|>III<|im_end|>"),
            ([{}, {"weight": 0}, {"weight": 1}], "I<|im_end|>III<|im_end|>"),
            ([{}, {"train": True}, {"train": False}], "I<|im_end|>II<|im_end|>"),
            ([{"weight": 0.0}, {"weight": 1.0}, {"weight": 0, "train": False}], "II<|im_end|>"),
        ],
    )
    def test_turns_are_selected(self, flags: list[dict[str, Any]], learnt: str) -> None:
        said = [{**assistant(text), **flag} for text, flag in zip(("I", "II", "III"), flags, strict=True)]
        asked = [{**user(text), "train": False} for text in ("one", "two", "three")]
        row = row_of([message for pair in zip(asked, said, strict=True) for message in pair])
        ((_, found),) = trained(chatml(), row)
        assert found == learnt
        assert all("train" not in message and "weight" not in message for message in row.prompt)


class TestTemplateKwargs:
    def test_the_template_reads_them_in_every_rendering(self) -> None:
        tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
        set_template_kwargs(tokenizer, {"enable_thinking": False})
        assert tokenizer.decode(encode_prompt(tokenizer, DIALOGUE[:1])) == ONE + SAID + EMPTY
        assert trained(tokenizer, row_of(DIALOGUE)) == [
            (ONE + SAID + EMPTY, "I<|im_end|>"),
            (f"{ONE}{SAID}I<|im_end|>\n{TWO}{SAID}{EMPTY}", "II<|im_end|>"),
        ]

    @pytest.mark.parametrize(
        ("template", "reason"),
        [
            (QWEN3, "does not read `enable_thinkin`; did you mean 'enable_thinking'?; leave it out"),
            (CHATML, "does not read `enable_thinkin`; leave it out"),
            (None, "has no chat template that could read them"),
        ],
    )
    def test_one_that_the_template_does_not_read_is_refused(self, template: str | None, reason: str) -> None:
        with pytest.raises(UserError) as caught:
            set_template_kwargs(chatml(template), {"enable_thinkin": False})  # type: ignore[arg-type]  # none
        assert reason in str(caught.value)

    def test_later_stages_must_agree(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_for(QWEN3, "<|im_end|>")
        digest = tokenizer_digest(tokenizer)
        digest.pop("chat_template_kwargs")  # a manifest of an earlier version
        (tmp_path / "stage.json").write_text(json.dumps(manifest("sft", tokenizer=digest)))
        folder, values = str(tmp_path), {"enable_thinking": False}
        check_tokenizer(folder, tokenizer, "sft_model_path")
        check_template_kwargs(folder, {}, "models")
        set_template_kwargs(tokenizer, values)
        with pytest.raises(UserError, match="trained with another chat template kwargs"):
            check_tokenizer(folder, tokenizer, "sft_model_path")
        with pytest.raises(
            UserError, match=r'was trained with \{\}, and this recipe gives \{"enable_thinking": false\}'
        ):
            check_template_kwargs(folder, values, "models")


def test_a_margin_on_some_rows_only_is_refused() -> None:
    rows = [Preference("a", "b", "c", f"f:{number}", extra) for number, extra in enumerate([{"margin": 1}, {}], 1)]
    with pytest.raises(
        UserError,
        match=r"no `margin` \(nor `strength`\), which other rows have; write 0 for none \(as strength 1\): 1 \(f:2\)",
    ):
        tokenize_preferences(rows, chatml(), max_length=99)
    dataset, _ = tokenize_preferences(rows[:1], chatml(), max_length=99)
    assert dataset["margin"][:] == [1.0]


def test_a_null_strength_among_ties_is_refused() -> None:
    values = [{"strength": strength, "prompt": "a", "chosen": "b", "rejected": "c"} for strength in (0, None)]
    formats = choose_formats("f", list(values[0]), Preference)
    rows = [read_row(each, f"f:{n}", Preference, formats) for n, each in enumerate(values, 1)]
    message = r"no `margin` \(nor `strength`\), which other rows have; write 0 for none \(as strength 1\): 1 \(f:2\)"
    with pytest.raises(UserError, match=message):
        tokenize_preferences(rows, chatml(), max_length=99)
    with pytest.raises(UserError, match=message):
        check_margins([rows], "error")
    del rows[0].extra["strength"]  # a tie that is said so
    dataset, _ = tokenize_preferences(rows, chatml(), max_length=99)
    assert dataset["tie"][:] == [1.0, 0.0]
