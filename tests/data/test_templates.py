"""Templates: what they render, what they refuse, and the way back from an answer to its label."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.config.data_source import DataSource
from align.config.load import load_recipe
from align.data.load import DataSettings, Rows, load_rows
from align.data.rows import Demonstration, Prompt
from align.data.templates import parse_label
from align.errors import UserError
from tests.worlds import write_jsonl

SENTIMENT = {
    "prompt": "Classify the sentiment of the text.\n\nText: {{ text }}\n\n",
    "completion": "\nThe sentiment is {{ label }}.",
}


@pytest.fixture
def load(tmp_path):
    def run(
        rows: list[dict[str, Any]], *templates: dict[str, str], form: type = Demonstration, name: str = "a.jsonl",
        seed: int = 42, on_bad_row: str = "error", **keys: Any,
    ) -> Rows:  # fmt: skip
        path = write_jsonl(tmp_path / name, rows)
        source = DataSource(path=path, templates=list(templates), **keys)
        return load_rows(DataSettings(train_dataset=[source], seed=seed, on_bad_row=on_bad_row), form)

    return run


def rendered(load, row: dict[str, Any], text: str, **keys: Any) -> str:
    """What a prompt template makes of one row."""
    return str(load([row], {"prompt": text, "completion": "c"}, **keys).train[0].prompt)


def refusal(load, rows: list[dict[str, Any]], *templates: dict[str, str], **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(rows, *templates, **keys)
    return str(caught.value)


class TestRows:
    def test_the_example(self, load):
        loaded = load([{"text": "I love this movie!", "label": "positive"}], SENTIMENT, task="sentiment")
        (row,) = loaded.train
        assert row.prompt == "Classify the sentiment of the text.\n\nText: I love this movie!\n"  # Jinja takes one off
        assert row.completion == "\nThe sentiment is positive."
        assert row.extra == {
            "text": "I love this movie!",
            "label": "positive",
            "task": "sentiment",
            "_template": SENTIMENT,
            "_labels": {},
            "_label": "positive",
        }
        assert json.loads(json.dumps(loaded.report)) == loaded.report
        assert loaded.report["sources"][0]["templates"] == [1]
        assert loaded.report["sources"][0]["task"] == "sentiment"

    @pytest.mark.parametrize("label", [1, "1", 1.0])
    def test_labels_are_verbalized(self, load, label):
        labels = {"0": "negative", "1": "positive"}
        (row,) = load([{"text": "Good.", "label": label}], SENTIMENT, labels=labels).train
        assert row.completion == "\nThe sentiment is positive."
        assert (row.extra["label"], row.extra["_label"], row.extra["_labels"]) == (label, "1", labels)

    def test_labels_of_another_column(self, load):
        template = {"prompt": "{{ text }} {{ stars }}", "completion": "{{ label }}"}
        rows = [{"text": "a", "stars": True, "label": "no"}]
        (row,) = load(rows, template, labels={"true": "good", "false": "bad"}, label_column="stars").train
        assert (row.prompt, row.completion) == ("a True", "good")  # the column itself stays as it is
        assert row.extra["_label"] == "true"

    def test_messages(self, load):
        template = {"system": "Be {{ style }}.", "user": "Q: {{ question }}", "assistant": "{{ answer }}"}
        data = [{"style": "brief", "question": "2+2?", "answer": "4"}]
        (row,) = load(data, template).train
        system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: 2+2?"}
        assert row.prompt == [system, user]
        assert row.completion == [{"role": "assistant", "content": "4"}]
        assert row.trained_turns == 1
        (row,) = load(data, {part: template[part] for part in ("user", "assistant")}).train
        assert row.prompt == [user]
        assert "_label" not in row.extra

    def test_prompts(self, load):
        (row,) = load([{"text": "a", "label": 0, "prompt": "own"}], SENTIMENT, form=Prompt).train
        assert row.prompt == "Classify the sentiment of the text.\n\nText: a\n"
        assert row.extra["completion"] == "\nThe sentiment is 0."  # a reward function may want it
        assert row.extra["prompt"] == "own"

    def test_columns_of_the_same_name_are_data(self, load):
        (row,) = load(
            [{"prompt": "2+2?", "completion": "4"}], {"prompt": "Q: {{ prompt }}", "completion": " {{ completion }}!"}
        ).train
        assert (row.prompt, row.completion) == ("Q: 2+2?", " 4!")
        assert (row.extra["prompt"], row.extra["completion"]) == ("2+2?", "4")


class TestDraw:
    TEMPLATES = tuple({"prompt": f"{number} {{{{ text }}}}", "completion": "c"} for number in range(4))
    ROWS = tuple({"text": f"row {number}"} for number in range(2000))

    def drawn(self, load, rows=ROWS, **keys: Any) -> list[int]:
        return [int(row.prompt[0]) for row in load(list(rows), *self.TEMPLATES, **keys).train]

    def test_evenly(self, load):
        loaded = load(list(self.ROWS), *self.TEMPLATES)
        counts = Counter(row.prompt[0] for row in loaded.train)
        # 500 each; chi-squared with 3 degrees of freedom is below 16.3 in all but one of 1000 seeds
        assert sum((counts[str(number)] - 500) ** 2 / 500 for number in range(4)) < 16.3
        assert loaded.report["sources"][0]["templates"] == [counts[str(number)] for number in range(4)]

    def test_by_seed_source_and_row_alone(self, load):
        drawn = self.drawn(load)
        assert drawn == self.drawn(load)
        assert drawn[::-1] == self.drawn(load, self.ROWS[::-1])  # the place of a row does not matter,
        assert drawn[5:9] == self.drawn(load, self.ROWS[5:9])  # nor do the rows beside it
        for other in (self.drawn(load, seed=1), self.drawn(load, name="b.jsonl")):
            assert 400 < sum(a == b for a, b in zip(drawn, other, strict=True)) < 600  # a quarter agree by chance
        assert drawn == self.drawn(load, name="moved/a.jsonl")

    def test_chance_is_kept_out_of_templates(self, load):
        for text in ("{{ [1, 2] | random }}", "{{ lipsum() }}"):
            with pytest.raises(UserError, match=r"No filter named 'random'|reads `lipsum`"):
                rendered(load, {"a": 1}, text)


class TestJinja:
    def test_blocks_as_in_chat_templates(self, load):
        text = "{% for item in items %}\n  {% if loop.first %}\nFirst: {% endif %}\n{{ item }}\n{% endfor %}\nend\n"
        assert rendered(load, {"items": ["a", "b"]}, text) == "First: a\nb\nend"
        assert rendered(load, {"items": "abc"}, "{% for i in items %}{{ i }}{% break %}{% endfor %}") == "a"
        assert rendered(load, {"items": ["<é>"]}, "{{ items | tojson }}") == '["<é>"]'

    def test_columns_with_other_names(self, load):
        assert rendered(load, {"review text": "fine"}, "{{ row['review text'] }}") == "fine"

    def test_what_a_row_says_is_no_template(self, load):
        assert rendered(load, {"text": "{{ 7 * 7 }}{% raw %}"}, "{{ text }}") == "{{ 7 * 7 }}{% raw %}"

    @pytest.mark.parametrize(
        "text",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ text.__class__ }}",
            "{{ row.update(text='x') }}",
            "{{ items.append(1) }}",
            "{{ text.format.__globals__ }}",
        ],
    )
    def test_the_sandbox(self, load, text):
        said = refusal(load, [{"text": "t", "items": [1]}], {"prompt": text, "completion": "c"}, on_bad_row="skip")
        assert "a.jsonl:1: templates[0].prompt: " in said
        assert "a template only reads columns" in said

    def test_loops_are_bounded(self, load):
        said = refusal(load, [{"text": "t"}], {"prompt": "{% for i in range(10**9) %}{% endfor %}", "completion": "c"})
        assert "templates[0].prompt fails with OverflowError: Range too big" in said

    def test_a_column_that_no_row_has(self, load):
        rows = [{"text": "a", "label": 1}] * 2
        said = refusal(load, rows, {"prompt": "x", "completion": "{{ txt }}"}, on_bad_row="skip")
        assert said.endswith(
            "a.jsonl:1: templates[0].completion reads `txt`, which no row has; the columns are text, label; "
            "did you mean 'text'?"
        )
        said = refusal(load, [{"text": "a", "stars": 1}], SENTIMENT)
        assert "templates[0].completion reads `label`" in said
        assert "named as `label_column`" in said

    def test_bad_rows(self, load):
        rows = [{"text": "a", "hint": "h"}, {"text": "b"}, {"text": None, "hint": "h"}, {"text": "", "hint": ""}]
        template = {"prompt": "{{ text }}{{ hint }}", "completion": "c"}
        said = refusal(load, rows, template)
        assert "no column `hint`, which templates[0].prompt reads: 1 (" in said
        assert "templates[0].prompt prints a column that is null: 1 (" in said
        assert "empty prompt: 1 (" in said
        loaded = load(rows, template, on_bad_row="skip")
        assert [row.prompt for row in loaded.train] == ["ah"]
        assert loaded.report["sources"][0]["templates"] == [1]
        said = refusal(load, [{"text": 1}], {"prompt": "{{ text + 'a' }}", "completion": "c"})
        assert "templates[0].prompt fails with TypeError: unsupported operand" in said
        said = refusal(load, [{"text": {}}], {"prompt": "{{ text.a }}", "completion": "c"})
        assert "templates[0].prompt: 'dict object' has no attribute 'a': 1 (" in said

    @pytest.mark.parametrize(("label", "got"), [(2, "2"), (None, "null"), ("one", "one")])
    def test_a_label_that_is_none(self, load, label, got):
        rows = [{"text": "a", "label": label}, {"text": "b", "label": 1}]
        said = refusal(load, rows, SENTIMENT, labels={"0": "bad", "1": "good"})
        assert f"label {got} is not among `labels` (0, 1): 1 (" in said

    def test_a_label_column_that_is_none(self, load):
        said = refusal(load, [{"text": "a", "lable": 1}], SENTIMENT, labels={"0": "bad", "1": "good"})
        assert "no column `label` for `labels`; its columns are text, lable; did you mean 'lable'?" in said
        assert "`label_column`" in said


class TestRecipe:
    HEAD = "output_dir: x\nmodel_name_or_path: m\ntrain_dataset:\n  path: a.jsonl\n"

    def recipe(self, folder: Path, text: str, stage: str = "sft") -> Any:
        path = folder / "r.yaml"
        path.write_text(self.HEAD + text, encoding="utf-8")
        return load_recipe(stage, str(path))

    def test_as_in_yaml(self, tmp_path):
        recipe = self.recipe(
            tmp_path,
            "  task: mood\n  labels: {0: bad, 2: good, true: well, x: y}\n  label_column: mood\n"
            "  templates:\n    - prompt: |\n        How is it?\n        {{ text }}\n      completion: ' {{ label }}'\n"
            "mixture_temperature: 2\n",
        )
        (source,) = recipe.train_dataset
        assert source.labels == {"0": "bad", "2": "good", "true": "well", "x": "y"}
        assert source.templates == [{"prompt": "How is it?\n{{ text }}\n", "completion": " {{ label }}"}]
        assert (source.task, source.label_column, recipe.mixture_temperature) == ("mood", "mood", 2.0)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                "  templates:\n    - {prompt: p, completion: c}\n    - prompt: p\n      completion: |\n        fine\n        {{ a }\n",
                "r.yaml:3: train_dataset[0].templates[1].completion: not a Jinja template: unexpected '}', in its line 2: {{ a }",
            ),
            ("  templates: {prompt: p, completion: '{{ a | upperr }}'}\n", "completion: not a Jinja template: No filter named 'upperr'."),
            ("  templates: {prompt: p, completion: '{% if a %}'}\n", "completion: not a Jinja template: Unexpected end of template"),
            ("  templates: {prompt: p, completion: '{% include \"/etc/passwd\" %}'}\n", "completion: a template cannot include another one (/etc/passwd)"),
            ("  templates: {prompt: p}\n", "templates[0]: no `completion`; a template has the parts prompt, completion."),
            ("  templates: {prompt: p, completoin: c}\n", "templates[0]: expected the parts prompt, completion, got 'completoin'; did you mean 'completion'?"),
            ("  templates: {prompt: p, assistant: c}\n", "got 'prompt'; write {prompt, completion} or {user, assistant}"),
            ("  templates: {system: p, user: c}\n", "templates[0]: no `assistant`"),
            ("  templates: {prompt: p, completion: 3}\n", ".completion: expected text, got 3 (a whole number); put it in quotes"),
            ("  templates: p\n", "templates: expected a mapping of names to values, got"),
            ("  templates: {prompt: p, completion: c}\n  columns: {prompt: a}\n", "columns: `templates` read the source's own columns"),
            ("  templates: {prompt: p, completion: c}\n  labels: {0: no, 1: yes}\n", "labels.0: expected text, got false (true or false); put it in quotes"),
            ("  templates: {prompt: p, completion: c}\n  labels: {0: good, 1: 'Good '}\n", "labels: 'Good ' stands for both 0 and 1"),
            ("  templates: {prompt: p, completion: c}\n  labels: {0: ' '}\n", "labels.0: expected text, got ' '"),
            ("  labels: {0: good}\n", "labels: they have no effect without `templates`"),
            ("mixture_temperature: 0.5\n", "mixture_temperature: expected a number at least 1, got 0.5"),
        ],
    )  # fmt: skip
    def test_refused_before_any_data_is_read(self, tmp_path, text, said):
        with pytest.raises(UserError) as caught:
            self.recipe(tmp_path, text)
        assert said in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path}/r.yaml:")

    def test_pairs_have_no_templates(self, tmp_path):
        with pytest.raises(
            UserError, match=r"templates: they produce prompts and completions, and this stage reads pairs"
        ):
            self.recipe(tmp_path, "  templates: {prompt: p, completion: c}\n", "reward")


class TestWayBack:
    LABELS = {"0": "negative", "1": "positive", "2": "very positive", "3": "C++", "4": "C"}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The sentiment is positive.", "1"),
            ("the  SENTIMENT is\nNegative", "0"),
            ("The sentiment is very positive.", "2"),
            ("I think that the sentiment is positive, not negative.", "1"),
            ("The sentiment is positive. The sentiment is negative.", "1"),
            ("The sentiment is C++.", "3"),
            ("The sentiment is C.", "4"),
            ("Clearly negative!", "0"),  # the only label in it
            ("It is very positive", "2"),  # in which "positive" does not occur by itself
            ("positive or negative", None),
            ("The sentiment is positively negative", "0"),  # whole words only
            ("positively", None),
            ("The sentiment is mixed.", None),
            ("", None),
        ],
    )
    def test_label_of(self, text, expected):
        assert parse_label(text, SENTIMENT, self.LABELS) == expected

    @pytest.mark.parametrize(
        ("completion", "text", "expected"),
        [
            ("{{ label }}", " Negative, for it is not positive", "0"),
            ("{{ label }}", "Not negative", "0"),
            ("{{ label }}", "It is negative or positive", None),
            ("{{ label | upper }}!", "POSITIVE!", "1"),
            ("{{ text }} is {{ label }}, I say.", "A negative thing is positive, I say.", "1"),
            ("{{ text }}{{ label }}", "negative positive", None),  # nothing tells where the label is
            ("It is {% if text %}{{ label }}{% endif %}", "It is positive, not negative", "1"),
            ("It was.", "It was negative", "0"),
        ],
    )
    def test_other_templates(self, completion, text, expected):
        for template in ({"prompt": "p", "completion": completion}, {"user": "u", "assistant": completion}):
            assert parse_label(text, template, self.LABELS) == expected

    @pytest.mark.parametrize(
        ("completion", "text", "expected"),
        [
            ("The sentiment is {{ label }}.", "The sentiment is Mixed.\nMore.", "Mixed"),
            ("The sentiment is {{ label }}.", "The sentiment is U.S. made", "U.S. made"),
            ("{{ label }}", " spam \n", "spam"),
            ("The sentiment is {{ label }}.", "No idea.", None),
            ("The answer.", "The answer.", None),
        ],
    )
    def test_without_labels(self, completion, text, expected):
        assert parse_label(text, {"prompt": "p", "completion": completion}, {}) == expected

    def test_every_completion_gives_its_label_back(self, load):
        templates = [
            SENTIMENT,
            {"prompt": "{{ text }}", "completion": " {{ label | capitalize }}"},
            {"user": "How is {{ text }}?", "assistant": "I find that {{ text }} is {{ label }} all in all."},
        ]
        rows = [{"text": f"a positive thing of {number}", "label": number % 4} for number in range(60)]
        for labels in (self.LABELS, {}):
            for row in load(rows, *templates, labels=labels).train:
                answer = row.completion if isinstance(row.completion, str) else row.completion[0]["content"]
                assert parse_label(answer, row.extra["_template"], row.extra["_labels"]) == row.extra["_label"]
