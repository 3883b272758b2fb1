"""Every format of a row, in every form, and every way in which a row can be bad."""

from __future__ import annotations

from typing import Any

import pytest

from align.data.columns import choose_formats
from align.data.formats import read_row
from align.data.rows import Demonstration, Preference, Prompt, as_response, render_text
from align.errors import BadRow
from tests.data.messages import assistant, user

SYSTEM = {"role": "system", "content": "Be kind."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant: {}"
HH_PROMPT = [user("Hi"), assistant("Hello."), user("2+2?")]


def read(values: dict[str, Any], form: type) -> Any:
    return read_row(values, "f.jsonl:1", form, choose_formats("f.jsonl", list(values), form))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "2+2?", "completion": " 4"}, "2+2?"),
        ({"prompt": "2+2?", "completion": ""}, "2+2?"),  # a prompt needs no completion
        ({"prompt": "2+2?"}, "2+2?"),
        ({"prompt": [SYSTEM, user("2+2?")]}, [SYSTEM, user("2+2?")]),
        ({"prompt": [user("2+2?")], "completion": [assistant("4")]}, [user("2+2?")]),
        ({"prompt": "\n\nHuman: 2+2?\n\nAssistant:"}, [user("2+2?")]),
        ({"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}, [user("a"), assistant("b"), user("c")]),
        ({"messages": [user("a"), assistant("b"), user("c")]}, [user("a"), assistant("b"), user("c")]),
        ({"text": HH.format("4")}, HH_PROMPT),
        ({"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, "2+2?"),
        ({"chosen": HH.format("4"), "rejected": HH.format("5")}, HH_PROMPT),
        ({"chosen": "Q: 2+2? A: 4", "rejected": "Q: 2+2? A: 5"}, "Q: 2+2? A:"),
    ],
)
def test_prompt_from_every_format(values: dict[str, Any], expected: Any) -> None:
    assert read(values, Prompt).prompt == expected


@pytest.mark.parametrize(
    ("values", "prompt", "completion", "trained_turns"),
    [
        ({"prompt": "2+2?", "completion": " 4"}, "2+2?", " 4", 1),
        ({"prompt": [user("2+2?")], "completion": [assistant("4")]}, [user("2+2?")], [assistant("4")], 1),
        ({"prompt": [user("2+2?")], "completion": "4"}, [user("2+2?")], [assistant("4")], 1),
        ({"prompt": "2+2?", "completion": [assistant("4")]}, [user("2+2?")], [assistant("4")], 1),
        (
            {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]},
            [user("a"), assistant("b"), user("c")],
            [assistant("d")],
            1,
        ),
        (
            {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]},
            [user("a"), assistant("b"), user("c")],
            [assistant("d")],
            2,
        ),
        (
            {"messages": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]},
            [SYSTEM, user("a"), assistant("b"), user("c")],
            [assistant("d")],
            2,
        ),
        # An opening assistant turn answers nothing, so it is not trained.
        (
            {"messages": [SYSTEM, assistant("a"), user("b"), assistant("c")]},
            [SYSTEM, assistant("a"), user("b")],
            [assistant("c")],
            1,
        ),
        ({"text": "Once upon a time."}, "", "Once upon a time.", 1),
        ({"text": HH.format("4")}, HH_PROMPT, [assistant("4")], 2),
        ({"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, "2+2?", " 4", 1),
        ({"chosen": HH.format("4"), "rejected": HH.format("5")}, HH_PROMPT, [assistant("4")], 1),
    ],
)
def test_demonstration_from_every_format(
    values: dict[str, Any], prompt: Any, completion: Any, trained_turns: int
) -> None:
    row = read(values, Demonstration)
    assert (row.prompt, row.completion, row.trained_turns) == (prompt, completion, trained_turns)


@pytest.mark.parametrize(
    ("values", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, "2+2?", " 4", " 5"),
        # Strings for a message prompt, as in topical-chat-ratings.
        (
            {"prompt": [user("2+2?")], "chosen": "4", "rejected": "5"},
            [user("2+2?")],
            [assistant("4")],
            [assistant("5")],
        ),
        # One-message lists, as in hh-helpful.
        (
            {"prompt": HH_PROMPT, "chosen": [assistant("4")], "rejected": [assistant("5")]},
            HH_PROMPT,
            [assistant("4")],
            [assistant("5")],
        ),
        # A text prompt beside whole dialogues.
        (
            {"prompt": "2+2?", "chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
            [user("2+2?")],
            [assistant("4")],
            [assistant("5")],
        ),
        (
            {"chosen": [user("2+2?"), assistant("4")], "rejected": [user("2+2?"), assistant("5")]},
            [user("2+2?")],
            [assistant("4")],
            [assistant("5")],
        ),
        ({"chosen": HH.format("4"), "rejected": HH.format("5")}, HH_PROMPT, [assistant("4")], [assistant("5")]),
        (
            {"prompt": "\n\nHuman: 2+2?\n\nAssistant:", "chosen": " 4", "rejected": " 5"},
            [user("2+2?")],
            [assistant("4")],
            [assistant("5")],
        ),
        # The common prefix ends between words, and neither response is left empty.
        ({"chosen": "Is it? yes", "rejected": "Is it? yeah"}, "Is it?", " yes", " yeah"),
        ({"chosen": "Is it? yes", "rejected": "Is it? yes sir"}, "Is it?", " yes", " yes sir"),
        ({"chosen": "Q\n\nA: yes", "rejected": "Q\n\nA: no"}, "Q\n\nA:", " yes", " no"),
    ],
)
def test_preference_from_every_format(values: dict[str, Any], prompt: Any, chosen: Any, rejected: Any) -> None:
    row = read(values, Preference)
    assert (row.prompt, row.chosen, row.rejected) == (prompt, chosen, rejected)


LATER = "`chosen` or `rejected` has more than one turn after the prompt"
NO_COMMON = "`chosen` and `rejected` have no common prompt"


@pytest.mark.parametrize(
    ("form", "values", "reason"),
    [
        (Demonstration, {"prompt": "a", "completion": None}, "missing field `completion`"),
        (Preference, {"prompt": "a", "chosen": None, "rejected": "b"}, "missing field `chosen`"),
        (Demonstration, {"prompt": 3, "completion": "b"}, "`prompt` is neither text nor a list of messages"),
        (Demonstration, {"messages": "a"}, "`messages` is not a list of messages"),
        (
            Demonstration,
            {"messages": [user("a"), "b"]},
            "`messages` holds entries other than messages with `role` and `content`",
        ),
        (
            Demonstration,
            {"messages": [user("a"), {"role": "assistant", "content": None}]},
            "`messages` holds entries other than messages with `role` and `content`",
        ),
        (
            Demonstration,
            {"messages": [user("a"), {"role": "bot", "content": "b"}]},
            "role 'bot' is not system, developer, user, assistant or tool",
        ),
        (Demonstration, {"prompt": "", "completion": "b"}, "empty prompt"),
        (Prompt, {"prompt": ""}, "empty prompt"),
        (Demonstration, {"prompt": "a", "completion": " \n"}, "empty response"),
        (Demonstration, {"prompt": [user("a")], "completion": []}, "empty response"),
        (Demonstration, {"text": " "}, "empty response"),
        (Demonstration, {"messages": []}, "empty response"),
        (Demonstration, {"messages": [user("a"), assistant("")]}, "empty response"),
        (Demonstration, {"messages": [user(""), assistant("b")]}, "empty turn"),
        (Demonstration, {"messages": [user(" "), assistant("b")]}, "a turn of white space alone"),
        (Preference, {"prompt": "a", "chosen": "b", "rejected": ""}, "empty response"),
        (Preference, {"chosen": HH.format("4"), "rejected": HH.format("")}, "empty response"),
        (Preference, {"chosen": HH.format("4"), "rejected": "\n\nHuman: Hi\n\nAssistant: Hello."}, LATER),
        (Preference, {"prompt": "a", "chosen": "b", "rejected": "b "}, "`chosen` equals `rejected`"),
        (Preference, {"chosen": HH.format("4"), "rejected": HH.format("4")}, "`chosen` equals `rejected`"),
        (Demonstration, {"messages": [assistant("b")]}, "no user turn before the response"),
        (Demonstration, {"messages": [SYSTEM, assistant("b")]}, "no user turn before the response"),
        (Demonstration, {"messages": [user("a"), assistant("b"), user("c")]}, "does not end in an assistant turn"),
        (Prompt, {"prompt": [user("a"), assistant("b")]}, "the prompt does not end in a user turn"),
        (Prompt, {"prompt": []}, "the prompt does not end in a user turn"),
        (Prompt, {"text": "Once upon a time."}, "plain text has no prompt"),
        (Preference, {"chosen": "yes", "rejected": "no"}, NO_COMMON),
        (Preference, {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, NO_COMMON),
        (
            Preference,
            {"chosen": HH.format("4"), "rejected": "no transcript"},
            "one of `chosen` and `rejected` is text, the other messages",
        ),
        (
            Preference,
            {"chosen": HH.format("4"), "rejected": "\n\nHuman: Hi\n\nAssistant: Go away."},
            LATER,
        ),
    ],
)
def test_bad_row(form: type, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read(values, form)
    assert str(caught.value) == reason


@pytest.mark.parametrize("prompt", [" ", "\n", "\t\n"])
def test_a_prompt_of_white_space_is_a_prompt(prompt: str) -> None:
    assert read({"prompt": prompt}, Prompt).prompt == prompt
    assert read({"prompt": prompt, "completion": "b"}, Demonstration).prompt == prompt


def test_sharegpt_rows_are_messages() -> None:
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1, "markdown": None}]
    row = read({"conversations": said, "system": "Be kind.", "id": 3}, Demonstration)
    assert (row.prompt, row.completion) == ([{"role": "system", "content": "Be kind."}, user("a")], [assistant("b")])
    assert read({"conversations": said}, Prompt).prompt == [user("a")]
    assert read({"prompt": said[:1], "chosen": said[1:], "rejected": "c"}, Preference).chosen == [assistant("b")]
    with pytest.raises(BadRow, match="role 'function_call' is not system, developer, user, assistant or tool"):
        read({"conversations": [{"from": "function_call", "value": "f()"}]}, Demonstration)


def test_transcripts_keep_line_breaks_and_need_a_human_first() -> None:
    row = read({"text": "\n\nHuman: One\n\ntwo: three\n\nAssistant: Four\n\nfive "}, Demonstration)
    assert (row.prompt, row.completion) == ([user("One\n\ntwo: three")], [assistant("Four\n\nfive")])
    stripped = read({"text": "Human: One\n\nAssistant: Two"}, Demonstration)  # some copies lost the leading line breaks
    assert (stripped.prompt, stripped.completion) == ([user("One")], [assistant("Two")])
    assert read({"text": "Human: nature is odd."}, Demonstration).completion == "Human: nature is odd."
    assert read({"text": "A play.\n\nHuman: Hi\n\nAssistant: Ho"}, Demonstration).prompt == ""


def test_a_row_is_read_in_the_first_format_it_fills() -> None:
    formats = choose_formats("f", ["prompt", "completion", "messages"], Demonstration)
    row = read_row({"prompt": None, "messages": [user("a"), assistant("b")]}, "f:1", Demonstration, formats)
    assert row.prompt == [user("a")]


def test_extra_holds_what_the_form_does_not() -> None:
    values = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d", "margin": 1.5}
    assert read(values, Prompt).extra == {"completion": "b", "chosen": "c", "rejected": "d", "margin": 1.5}
    assert read(values, Demonstration).extra == {"chosen": "c", "rejected": "d", "margin": 1.5}
    assert read(values, Preference).extra == {"completion": "b", "margin": 1.5}
    assert read({"messages": [user("a"), assistant("b")], "id": 7}, Prompt).extra == {"id": 7}


@pytest.mark.parametrize(
    ("strength", "better", "more"),
    [
        (3, "c", {"margin": 2}),
        (-3, "d", {"margin": 2}),
        (2.0, "c", {"margin": 1}),  # as a column with gaps is read
        (-1, "d", {"margin": 0}),
        (0, "c", {"tie": True}),
        ("A>>B", "c", {"margin": 1}),
        ("A > B", "c", {"margin": 0}),
        ("A=B", "c", {"tie": True}),
        ("tie", "c", {"tie": True}),
        ("B>A", "d", {"margin": 0}),
        ("B>>A", "d", {"margin": 1}),
    ],
)
def test_a_strength_says_which_is_better_and_by_how_much(strength, better, more) -> None:
    values = {"prompt": "a", "chosen": "c", "rejected": "d", "strength": strength}
    pair = read(values, Preference)
    assert (pair.chosen, pair.rejected) == (better, "d" if better == "c" else "c")
    steps = 0 if "tie" in more else more["margin"] + 1
    assert pair.extra == {"strength": steps, **more}
    assert read(values, Demonstration).completion == better, "which is what SFT imitates"
    assert read(values, Prompt).extra["strength"] == strength
    assert read({**values, "strength": None}, Preference).extra == {"strength": None}
    shown = read({**values, "chosen_first": True}, Preference).extra["chosen_first"]
    assert shown is (better == "c"), "it is said of the response that is chosen in the end"


def test_messages_keep_what_has_a_value() -> None:
    row = read({"messages": [{**user("a"), "name": None}, {**assistant("b"), "score": 3}]}, Demonstration)
    assert (row.prompt, row.completion) == ([user("a")], [{**assistant("b"), "score": 3}])


@pytest.mark.parametrize(
    ("form", "more", "reason"),
    [
        (Preference, {"margin": -1}, "`margin` is not a number of at least 0"),
        (Preference, {"margin": "1"}, "`margin` is not a number of at least 0"),
        (Preference, {"margin": True}, "`margin` is not a number of at least 0"),
        (Preference, {"margin": float("nan")}, "`margin` is not a number of at least 0"),
        (Preference, {"margin": 1e300}, "`margin` is not a number of at least 0, or too large"),  # infinite as float32
        (Preference, {"margin": 10**400}, "`margin` is not a number of at least 0, or too large"),
        *(
            (
                Preference,
                {"strength": value},
                "`strength` is not a whole number from -3 to 3, or one of A>>B, A>B, A=B, tie, B>A",
            )
            for value in (4, -4, 1.5, float("nan"), True, "A>>>B", "2", [1], {"a": 1}, 10**400)
        ),
        (Preference, {"strength": 1, "margin": 0}, "a `strength` beside a `margin` or a `tie`, which follow from it"),
        (Preference, {"strength": 0, "tie": True}, "a `strength` beside a `margin` or a `tie`, which follow from it"),
        (Preference, {"weight": 0.5}, "a row's `weight` other than 1; give the whole source a `weight`, or each turn"),
        (Demonstration, {"weight": 0}, "a row's `weight` other than 1; give the whole source a `weight`, or each turn"),
        (Prompt, {"chat_template_kwargs": {"a": 1}}, "`chat_template_kwargs` in a row; set the key of that name"),
        (Prompt, {"tools": "sum"}, "`tools` is neither a list of functions nor the JSON text of one"),
    ],
)
def test_columns_that_are_not_used_are_refused(form: type, more: dict[str, Any], reason: str) -> None:
    values: dict[str, Any] = {"prompt": [user("a")], "completion": [assistant("b")]}
    if form is Preference:
        values = {"prompt": [user("a")], "chosen": "b", "rejected": "c"}
    with pytest.raises(BadRow) as caught:
        read({**values, **more}, form)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**assistant("b"), "train": 1}, "`train` of a message is neither true nor false"),
        ({**assistant("b"), "weight": 0.5}, "`weight` of a message is neither 0 nor 1"),
        ({**assistant("b"), "weight": True}, "`weight` of a message is neither 0 nor 1"),
        ({**assistant("b"), "train": True, "weight": 0}, "`train` and `weight` of a message disagree"),
        ({**assistant("b"), "train": False}, "`train` or `weight` leaves no assistant turn to train"),
        ({**assistant("b"), "reasoning_content": 3}, "`reasoning_content` is not text"),
        ({**assistant("b"), "tool_calls": [{"name": 3}]}, "`tool_calls` is not a list of calls with `name` and"),
        ({**assistant("b"), "tool_calls": [{"name": "f", "arguments": "x"}]}, "`tool_calls` is not a list of calls"),
        (assistant([{"type": "image_url"}]), "a message with a part of type 'image_url'; this reads text alone"),
    ],
)
def test_messages_that_cannot_be_used(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read({"messages": [user("a"), message]}, Demonstration)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ([{**user("a"), "train": True}], "`train` of a message of role user; only assistant turns are trained"),
        ([{**user("a"), "tool_calls": [{"name": "f"}]}], "`tool_calls` in a message of role user"),
        ([user("a"), {"role": "tool", "content": "b"}], "a message of role tool that answers no assistant turn"),
    ],
)
def test_messages_before_a_response_that_cannot_be_used(before: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        read({"messages": [*before, assistant("c")]}, Demonstration)
    assert str(caught.value) == reason


def test_content_in_parts_is_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [user(parts), assistant("c")]}, Demonstration).prompt == [user("a\nb")]


def test_turns_as_text() -> None:
    assert render_text("a") == "a"
    assert render_text([assistant("b")]) == "b"
    assert render_text([user("a"), assistant("b"), user("c")]) == "User: a\n\nAssistant: b\n\nUser: c"
    assert as_response("a", "b") == "b"
    assert as_response([user("a")], "b") == [assistant("b")]
