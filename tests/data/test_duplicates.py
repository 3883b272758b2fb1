"""Rows on both sides of the data: what counts as one, what is reported, and that nothing is dropped."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from align.config.data_source import DataSource
from align.data.duplicates import THRESHOLD, describe_duplicates, find_duplicates, near_duplicates, row_text
from align.data.load import DataSettings, load_rows
from align.data.rows import Demonstration, Preference, Prompt
from align.data.templates import TEMPLATE
from tests.worlds import write_jsonl


def numbered(count: int, start: int = 0) -> list[str]:
    return [f"w{n}" for n in range(start, start + count)]


def rows(*texts: str, name: str) -> list[Any]:
    return [Demonstration("", text, f"{name}:{n}") for n, text in enumerate(texts, 1)]


def jaccard(left: str, right: str) -> float:
    """By the definition, for rows of five words and more."""
    sets = []
    for text in (left, right):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_jaccard_index_by_hand():
    # 20 words have 16 sequences. Without the last four words 12 of them are left: 12 / 16; without the last three, 13.
    whole = numbered(20)
    assert near_duplicates([" ".join(whole)], [" ".join(whole[:17])]) == [(0, 0, 13 / 16)]
    assert near_duplicates([" ".join(whole)], [" ".join(whole[:16])]) == []
    assert near_duplicates([" ".join(whole[:17])], [" ".join(whole)]) == [(0, 0, 13 / 16)]
    # The first 12 of 15 are just enough.
    assert near_duplicates([" ".join(whole[:19])], [" ".join(whole[:16])]) == [(0, 0, 0.8)]
    # One changed word in the middle of 49 changes 5 of 45 sequences: 40 / 50, just enough; of 48, 39 / 49, just not.
    for size, found in ((49, [(0, 0, 0.8)]), (48, [])):
        words = numbered(size)
        assert near_duplicates([" ".join(words)], [" ".join([*words[:24], "other", *words[25:]])]) == found


def test_the_same_pairs_as_by_the_definition():
    pick = random.Random(0)
    base = [[f"w{pick.randrange(40)}" for _ in range(pick.randrange(5, 60))] for _ in range(60)]

    def changed(words: list[str]) -> str:
        words = list(words)
        for _ in range(pick.randrange(3)):
            words[pick.randrange(len(words))] = f"w{pick.randrange(40)}"
        return " ".join(words[pick.randrange(2) :] + words[:5] * pick.randrange(2))  # repeated sequences count once

    training = [changed(pick.choice(base)) for _ in range(150)]
    evaluation = [" ".join(words) for words in base]
    expected = {}
    for other, text in enumerate(evaluation):
        alike = [(index, jaccard(text, each)) for index, each in enumerate(training)]
        if near := [pair for pair in alike if pair[1] >= THRESHOLD]:
            expected[other] = near[0]
    found = near_duplicates(training, evaluation)
    assert 20 < len(found) < 60
    assert {other: pair for other, *pair in found} == {other: [*pair] for other, pair in expected.items()}


def test_batches_make_no_difference(monkeypatch):
    pick = random.Random(1)
    evaluation = [" ".join(f"w{pick.randrange(9)}" for _ in range(pick.randrange(0, 12))) for _ in range(50)]
    training = evaluation[::-1]
    whole = near_duplicates(training, evaluation)
    monkeypatch.setattr("align.data.duplicates.BATCH", 3)
    assert near_duplicates(training, evaluation) == whole
    assert len(whole) == sum(bool(text) for text in evaluation)


def test_short_rows_and_rows_without_words():
    # Under five words a row is one sequence, so it is like its copies alone; rows without words are like nothing.
    assert near_duplicates(["Yes, sir!", "a b c"], ["yes sir", "a b c d", "a b d"]) == [(0, 0, 1.0)]
    assert near_duplicates(["!!", "..."], ["??", "!!", ""]) == []
    assert near_duplicates([], ["a b"]) == near_duplicates(["a b"], []) == []
    found = find_duplicates(rows("!!", name="t"), rows("??", "!!", name="e"))
    assert (found["exact"]["count"], found["near"]["count"]) == (1, 0)


def test_exact_and_near_are_told_apart():
    long = " ".join(numbered(40))
    training = rows("other", long, "A  Rose is\na rose", "a rose is a rose", name="t")
    evaluation = rows("a rose is a rose", long + " end", "nothing like it", "other", name="e")
    found = find_duplicates(training, evaluation)
    assert found == {
        "evaluation_rows": 4,
        "threshold": 0.8,
        "exact": {"count": 2, "first": [["e:1", "t:3", 1.0], ["e:4", "t:1", 1.0]]},
        "near": {"count": 1, "first": [["e:2", "t:2", 0.973]]},
    }
    assert json.loads(json.dumps(found)) == found
    line = describe_duplicates({"duplicates": found})
    assert line is not None
    assert line.startswith(
        "evaluation rows with duplicates in the training rows: 3 of 4 (2 exact, 1 near; e:1 is like t:3)"
    )
    assert "\n" not in line


def test_only_the_first_pairs_are_named():
    texts = [f"row {n}" for n in range(9)]
    found = find_duplicates(rows(*texts, name="t"), rows(*texts, name="e"))
    assert found["exact"]["count"] == 9
    assert found["exact"]["first"] == [[f"e:{n}", f"t:{n}", 1.0] for n in range(1, 6)]


def test_nothing_to_say():
    clean = find_duplicates(rows("a", name="t"), rows("b", name="e"))
    assert describe_duplicates({"duplicates": clean}) is None
    assert describe_duplicates({"duplicates": find_duplicates(rows("a", name="t"), [])}) is None
    assert describe_duplicates({}) is None
    near = find_duplicates(rows("Yes!", name="t"), rows("yes", name="e"))
    assert "(0 exact, 1 near; e:1 is like t:1)" in str(describe_duplicates({"duplicates": near}))


def test_text_of_a_row():
    assert row_text(Prompt("p", "w")) == "p"
    assert row_text(Demonstration("p", "c", "w")) == "p\nc"
    messages = [{"role": "user", "content": "u"}]
    assert row_text(Preference(messages, "c", "r", "w")) == "u\nc\nr"
    extra = {
        TEMPLATE: {"prompt": "{{ b }} of {{ a }}", "completion": "{{ label }}"},
        "a": 1,
        "b": "two",
        "label": "x",
        "id": 7,
    }
    assert row_text(Demonstration("two of 1", "good", "w", extra)) == "1\ntwo\nx"
    extra = {**extra, TEMPLATE: {"user": "{{ row['a b'] }}", "assistant": "x"}, "a b": 5, "task": "t", "_label": "x"}
    assert row_text(Demonstration("5", "x", "w", extra)) == "1\n5\ntwo\n7\nx"


def test_they_are_reported_and_stay(tmp_path):
    """The same data through two templates is found, other data through one template is not."""
    long = " ".join(numbered(60))
    data = [{"text": "Good film, that!", "label": 1}, {"text": "Bad.", "label": 0}, {"text": long, "label": 0}]
    held_out = [
        {"text": "good film,  that!", "label": 1},
        {"text": "Fine.", "label": 1},
        {"text": long + " x", "label": 0},
    ]
    frame = (
        "Tell me with all the care that you have whether this is good or bad, because I want to know it: {{ text }} -"
    )
    source = {
        "templates": [{"prompt": f"{number} {frame}", "completion": " {{ label }}"} for number in range(5)],
        "labels": {"0": "bad", "1": "good"},
    }
    train = write_jsonl(tmp_path / "train.jsonl", data)
    evaluation = write_jsonl(tmp_path / "eval.jsonl", held_out)
    settings = DataSettings(
        seed=42,
        train_dataset=[DataSource(path=train, weight=2.0, **source)],
        eval_dataset=[DataSource(path=evaluation, **source)],
    )
    loaded = load_rows(settings, Demonstration)
    assert (len(loaded.train), len(loaded.evaluation)) == (6, 3)
    found = loaded.report["duplicates"]
    assert found["exact"] == {"count": 1, "first": [[f"{evaluation}:1", f"{train}:1", 1.0]]}
    assert found["near"]["first"] == [[f"{evaluation}:3", f"{train}:3", pytest.approx(57 / 58, abs=1e-3)]]
    assert found["near"]["count"] == 1
