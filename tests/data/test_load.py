"""Sources of rows, what is refused, and the split into training and evaluation rows."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from align.config.data_source import DataSource, check_source
from align.data.load import DataSettings, Rows, load_rows
from align.data.mixture import describe_task_shares, times_used
from align.data.rows import Demonstration, Preference, Prompt, Turns
from align.data.templates import task_name
from align.errors import UserError
from tests.worlds import write_jsonl

SHARED = Path(__file__).parents[3] / "shared" / "data"


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)]


def load(*sources: str | DataSource, form: type = Demonstration, **keys: Any) -> Rows:
    """Rows of the sources, without evaluation rows unless `keys` ask for them."""
    if "eval_dataset" not in keys:
        keys = {"eval_fraction": 0.0, **keys}
    train = [source if isinstance(source, DataSource) else DataSource(path=source) for source in sources]
    return load_rows(DataSettings(train_dataset=train, **{"eval_fraction": 0.05, "seed": 42, **keys}), form)


def prompts(rows: list[Any]) -> list[Turns]:
    return [row.prompt for row in rows]


class TestFiles:
    def test_jsonl_rows_carry_their_line(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('\ufeff{"prompt": "p", "completion": "c", "score": 2}\n\n{"prompt": "q", "completion": "d"}\n')
        rows = load(str(path)).train
        assert rows == [
            Demonstration("p", "c", f"{path}:1", {"score": 2, "task": "a"}),
            Demonstration("q", "d", f"{path}:3", {"task": "a"}),
        ]

    def test_json_list(self, tmp_path):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(pairs(3), indent=1))
        assert [row.where for row in load(str(path)).train] == [f"{path}:{number}" for number in (1, 2, 3)]

    @pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
    def test_gzip(self, tmp_path, suffix):
        text = "prompt,completion\np,c\n" if suffix == "csv" else '{"prompt": "p", "completion": "c"}\n'
        path = tmp_path / f"a.{suffix}.gz"
        path.write_bytes(gzip.compress(text.encode()))
        assert load(str(path)).train == [Demonstration("p", "c", f"{path}:1", {"task": "a"})]

    def test_csv_cells_stay_text(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("question,completion,score\n12,007,1\n13,None,2\n")
        rows = load(DataSource(path=str(path), columns={"prompt": "question"})).train
        assert [(row.prompt, row.completion, row.extra, row.where) for row in rows] == [
            ("12", "007", {"score": 1, "task": "a"}, f"{path}:1"),
            ("13", "None", {"score": 2, "task": "a"}, f"{path}:2"),
        ]

    def test_csv_strengths_are_numbers(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("prompt,chosen,rejected,strength\np,c,r,2\nq,c,r,-1\n")
        rows = load_rows(DataSettings(train_dataset=[DataSource(path=str(path))], seed=0), Preference).train
        assert [(row.chosen, row.extra["margin"]) for row in rows] == [("c", 1), ("r", 0)]

    def test_csv_cells_may_hold_commas_and_line_breaks(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text('prompt,completion\n"a, b\nc",1\nd,2\n')
        rows = load(str(path)).train
        assert [(row.prompt, row.completion, row.where) for row in rows] == [
            ("a, b\nc", "1", f"{path}:1"),
            ("d", "2", f"{path}:2"),
        ]

    def test_parquet_and_no_stale_copy(self, tmp_path):
        path = tmp_path / "a.parquet"
        messages = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]
        Dataset.from_dict({"messages": [messages]}).to_parquet(path)
        assert load(str(path)).train == [Demonstration(messages[:1], messages[1:], f"{path}:1", {"task": "a"})]
        Dataset.from_dict({"prompt": ["q"], "completion": ["d"]}).to_parquet(path)
        assert prompts(load(str(path)).train) == ["q"]

    def test_glob_in_order_of_name(self, tmp_path):
        for name in "badcfe":
            write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "c"}])
        assert prompts(load(str(tmp_path / "*.jsonl")).train) == list("abcdef")

    def test_rows_of_one_file_may_differ_in_kind(self, tmp_path):
        mixed = [*pairs(1), {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}]
        assert len(load(write_jsonl(tmp_path / "a.jsonl", mixed)).train) == 2

    def test_hub_id(self, monkeypatch):
        def hub(path: str, name: str | None, split: str) -> Dataset:
            assert (path, name, split) == ("some/data", "small", "test")
            return Dataset.from_list(pairs(2))

        monkeypatch.setattr("datasets.load_dataset", hub)
        rows = load(DataSource(path="some/data", name="small", split="test")).train
        assert [(row.prompt, row.where) for row in rows] == [
            ("question 0", "some/data:test:1"),
            ("question 1", "some/data:test:2"),
        ]

    def test_generator(self, tmp_path, monkeypatch):
        (tmp_path / "rows_for_test_data.py").write_text(
            "def rows(count):\n    for i in range(count):\n        yield {'prompt': f'p{i}', 'completion': 'c'}\n"
            "def broken():\n    yield {'prompt': 'p', 'completion': 'c'}\n    raise KeyError('lost')\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        source = DataSource(generator="rows_for_test_data:rows", generator_kwargs={"count": 2})
        rows = load(source).train
        assert [(row.prompt, row.where) for row in rows] == [
            ("p0", "rows_for_test_data:rows:1"),
            ("p1", "rows_for_test_data:rows:2"),
        ]
        with pytest.raises(UserError, match=r"rows_for_test_data:broken failed after 1 rows with KeyError: 'lost'"):
            load(DataSource(generator="rows_for_test_data:broken"))
        with pytest.raises(UserError, match=r"rows_for_test_data:rows failed with TypeError: .*count"):
            load(DataSource(generator="rows_for_test_data:rows"))


class TestRefused:
    def test_missing_file(self, tmp_path):
        for name in ("none.jsonl", "none.parquet", "none.csv.gz", "none-*.jsonl", "none"):
            with pytest.raises(UserError, match=f"{tmp_path}/none.*: no such file"):
                load(str(tmp_path / name))
        with pytest.raises(UserError, match=r"none/train.jsonl: no such file"):
            load("none/train.jsonl")

    def test_hub_id_that_cannot_be_fetched(self, tmp_path):
        # In a process of its own: only there can the hub be switched off, so that it fails at once.
        code = (
            "from align.config.data_source import DataSource\n"
            "from align.data.load import DataSettings, load_rows\nfrom align.data.rows import Prompt\nfrom align.errors import UserError\n"
            "settings = DataSettings(train_dataset=[DataSource(path='some/data', split='test')], seed=0)\n"
            "try:\n    load_rows(settings, Prompt)\nexcept UserError as error:\n    print(error)"
        )
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(
            "train_dataset: some/data: neither a file nor a data set that could be fetched from the hub"
        )
        assert "split test" in done.stdout
        assert "Check the id" in done.stdout

    def test_folder_and_unknown_suffix(self, tmp_path):
        (tmp_path / "a.txt").write_text("hello")
        for path in (tmp_path, tmp_path / "a.txt"):
            with pytest.raises(UserError, match=r"expected a .jsonl, .json, .parquet, .csv file"):
                load(str(path))

    @pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "jsonl.gz"])
    def test_file_that_is_not_what_its_name_says(self, tmp_path, suffix):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(b"[\n\xff\xfe,,,\n1,2,3,4,5\n")
        with pytest.raises(UserError, match=rf"a.{suffix}:(1: has 4 cells| cannot be read as)"):
            load(str(path))

    def test_strengths_as_helpsteer_has_them_are_pairs_with_margins_and_ties(self, tmp_path):
        """A positive number is for the second response; `context` are messages (HelpSteer3)."""
        given = [(-3, "a", "b"), (0, "c", "d"), (2, "e", "f"), (1, "g", "h")]
        rows = [
            {"domain": "x", "context": [{"role": "user", "content": f"q{one}"}], "response1": one, "response2": two,
             "overall_preference": number}
            for number, one, two in given
        ]  # fmt: skip
        names = {"prompt": "context", "chosen": "response2", "rejected": "response1", "strength": "overall_preference"}
        source = DataSource(path=write_jsonl(tmp_path / "steps.jsonl", rows), columns=names)
        check_source(source, "train_dataset[0]")
        found = [
            (row.chosen[0]["content"], row.rejected[0]["content"], row.extra.get("margin"), row.extra.get("tie"))
            for row in load(source, form=Preference).train
        ]
        assert found == [("a", "b", 2, None), ("d", "c", None, True), ("f", "e", 1, None), ("h", "g", 0, None)]

    def test_missing_column_names_file_columns_and_near_miss(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completions": "c", "id": 1}])
        with pytest.raises(UserError) as caught:
            load(path)
        message = str(caught.value)
        for part in (path, "no column `completion`", "prompt, completions, id", "did you mean 'completions'?"):
            assert part in message
        assert "`columns:`" in message

    @pytest.mark.parametrize(
        ("row", "form", "expected"),
        [
            ({"question": "p", "response": "c"}, Demonstration, "{prompt: ..., completion: ...}"),
            ({"question": "p", "better": "c", "worse": "d"}, Preference, "{chosen: ..., rejected: ...}"),
            ({"dialogue": []}, Demonstration, "{messages: ...}"),
        ],
    )
    def test_columns_of_other_names_are_all_to_be_mapped(self, tmp_path, row, form, expected):
        with pytest.raises(UserError) as caught:
            load(write_jsonl(tmp_path / "a.jsonl", [row]), form=form)
        assert f"(ours: theirs) in the recipe, as in `train_dataset: [{{path: FILE, columns: {expected}}}]`" in str(
            caught.value
        )

    def test_mapped_column_that_is_missing(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"question": "p", "answer": "c"}])
        with pytest.raises(UserError, match=r"no column `awnser`.*question, answer; did you mean 'answer'.*`columns:`"):
            load(DataSource(path=path, columns={"prompt": "question", "completion": "awnser"}))

    def test_form_that_the_columns_cannot_give(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(1))
        with pytest.raises(UserError, match=r"no column `chosen`.*this stage reads chosen\+rejected"):
            load(path, form=Preference)

    @pytest.mark.parametrize("text", ["", "\n", "[]"])
    def test_empty_data_set(self, tmp_path, text):
        path = tmp_path / "a.json"
        path.write_text(text)
        with pytest.raises(UserError, match=r"a.json: expected rows, found none"):
            load(str(path))

    def test_empty_csv_with_a_header(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text("prompt,completion\n")
        with pytest.raises(UserError, match=r"a.csv: expected rows, found none"):
            load(str(path))

    def test_weight_on_evaluation_rows(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(2))
        with pytest.raises(UserError, match=r"eval_dataset: `weight`"):
            load(path, eval_dataset=[DataSource(path=path, weight=2.0)])


class TestBadRows:
    @pytest.fixture
    def path(self, tmp_path) -> str:
        path = tmp_path / "a.jsonl"
        good = [json.dumps(row) for row in pairs(2)]
        bad = ['{"prompt": "p"', "[1]", '{"prompt": "p"}', '{"prompt": "p", "completion": " "}']
        bad += ['{"prompt": "p", "completion": "\\ud800"}', '{"prompt": "p"}']
        path.write_text("\n".join([good[0], *bad, good[1]]))
        return str(path)

    def test_error_names_rows_and_counts(self, path):
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value) == (
            "6 rows cannot be used:\n"
            f"  not valid JSON: 1 ({path}:2)\n"
            f"  not a mapping of columns: 1 ({path}:3)\n"
            f"  missing field `completion`: 2 ({path}:4, {path}:7)\n"
            f"  empty response: 1 ({path}:5)\n"
            f"  not valid Unicode (a lone surrogate): 1 ({path}:6)\n"
            "Fix them, or leave them out with `on_bad_row: skip`."
        )

    def test_skip_counts(self, path):
        rows = load(path, on_bad_row="skip")
        assert prompts(rows.train) == ["question 0", "question 1"]
        assert rows.report["bad_rows"]["missing field `completion`"] == {
            "count": 2,
            "first": [f"{path}:4", f"{path}:7"],
        }
        assert sum(entry["count"] for entry in rows.report["bad_rows"].values()) == 6
        assert rows.report["sources"][0]["rows"] == 2

    def test_only_the_first_are_named(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": ""}] * 9 + pairs(1))
        with pytest.raises(UserError, match=r"empty response: 9 \(([^ ]+:\d, ){5}\.\.\.\)"):
            load(path)
        assert len(load(path, on_bad_row="skip").report["bad_rows"]["empty response"]["first"]) == 5

    def test_nothing_left(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": ""}])
        good = write_jsonl(tmp_path / "b.jsonl", pairs(3))
        with pytest.raises(UserError, match=r"train_dataset: no training row is left: .*bad rows: empty response: 1\."):
            load(path, on_bad_row="skip")
        with pytest.raises(UserError, match=r"eval_dataset: no evaluation row is left"):
            load(good, on_bad_row="skip", eval_dataset=[DataSource(path=path)])


class TestSources:
    def test_in_the_order_of_the_data(self, tmp_path):
        first, second = pairs(3), [{"prompt": f"other {i}", "completion": "c"} for i in range(3)]
        rows = load(write_jsonl(tmp_path / "b.jsonl", first), write_jsonl(tmp_path / "a.jsonl", second))
        assert prompts(rows.train) == [row["prompt"] for row in first + second]

    @pytest.mark.parametrize(("weight", "counts"), [(2.0, {2: 10}), (0.5, {1: 5}), (2.3, {2: 7, 3: 3})])
    def test_weight(self, tmp_path, weight, counts):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(10))
        source = DataSource(path=path, weight=weight)
        used = Counter(prompts(load(source).train))
        assert Counter(used.values()) == counts
        assert Counter(prompts(load(source).train)) == used  # the same share each time,
        others = [Counter(prompts(load(source, seed=seed).train)) for seed in range(20)]
        assert weight == 2.0 or any(other != used for other in others)  # and another one with another seed

    def test_evaluation_rows_are_not_repeated(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(100))
        rows = load(DataSource(path=path, weight=3.0), eval_fraction=0.3)
        assert set(Counter(prompts(rows.evaluation)).values()) == {1}
        assert set(Counter(prompts(rows.train)).values()) == {3}

    def test_max_rows(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(100))
        some = prompts(load(DataSource(path=path, max_rows=10)).train)
        assert some == sorted(some, key=lambda prompt: int(str(prompt).split()[1]))
        assert len(set(some)) == 10
        assert some != [row["prompt"] for row in pairs(10)]
        assert some == prompts(load(DataSource(path=path, max_rows=10)).train)
        assert some != prompts(load(DataSource(path=path, max_rows=10), seed=1).train)
        assert len(load(DataSource(path=path, max_rows=1000)).train) == 100
        (tmp_path / "elsewhere").mkdir()
        moved = write_jsonl(tmp_path / "elsewhere/a.jsonl", pairs(100))
        assert some == prompts(load(DataSource(path=moved, max_rows=10)).train)

    def test_columns(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"question": "p", "completion": "c", "prompt": "not this", "id": 3}])
        rows = load(DataSource(path=path, columns={"prompt": "question"})).train
        assert (rows[0].prompt, rows[0].completion, rows[0].extra) == ("p", "c", {"id": 3, "task": "a"})

    def test_fingerprint_is_of_the_rows_used(self, tmp_path):
        def fingerprint(rows: list[Any], **keys: Any) -> str:
            source = DataSource(path=write_jsonl(tmp_path / "a.jsonl", rows), **keys)
            return str(load(source, on_bad_row="skip").report["sources"][0]["fingerprint"])

        rows = pairs(5)
        assert len(fingerprint(rows)) == 64
        assert fingerprint(rows) == fingerprint([dict(reversed(row.items())) for row in rows])
        assert fingerprint(rows) == fingerprint([*rows, {"prompt": "bad"}])
        assert fingerprint(rows) != fingerprint([*rows[:4], {"prompt": "question 4", "completion": "answer 5"}])
        assert fingerprint(rows) != fingerprint(rows, max_rows=4)

    def test_report(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(50))
        report = load(DataSource(path=path, weight=2.0), eval_fraction=0.2).report
        assert json.loads(json.dumps(report)) == report
        source = report["sources"][0]
        assert (source["source"], source["rows"], source["weight"], source["used_for"]) == (path, 50, 2.0, "training")
        other = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "other", "completion": "c"}])
        both = load(path, eval_dataset=[DataSource(path=other)]).report["sources"]
        assert [(source["source"], source["used_for"]) for source in both] == [
            (path, "training"),
            (other, "evaluation"),
        ]
        assert report["train_rows"] + 2 * report["evaluation_rows"] == 100


class TestMixture:
    def test_rates_by_hand(self):
        # T 2: the roots of 100, 400 and 900 are in shares 1 : 2 : 3 of 1400 rows
        assert times_used([100, 400, 900], [1, 1, 1], 2) == pytest.approx(
            [1400 / 6 / 100, 1400 / 3 / 400, 1400 / 2 / 900]
        )
        assert times_used([100, 400], [3, 0.5], 1) == [3, 0.5]
        # T 2 with weights: 2 x 10 to 1 x 20 share 2 x 100 + 400 rows equally
        assert times_used([100, 400], [2, 1], 2) == pytest.approx([3, 0.75])
        # a very high T makes them even
        assert times_used([100, 900], [1, 1], 1e9) == pytest.approx([5, 500 / 900])
        assert times_used([0, 4], [1, 1], 2) == [0, 1]  # all of the first are evaluated

    def test_rows_of_a_mixture(self, tmp_path):
        small = [{"prompt": f"small {i}", "completion": "c"} for i in range(100)]
        large = [{"prompt": f"large {i}", "completion": "c"} for i in range(600)]
        sources = [
            DataSource(path=write_jsonl(tmp_path / "small.jsonl", small)),
            DataSource(path=write_jsonl(tmp_path / "large.jsonl", large), max_rows=400),
        ]
        rows = load(*sources, mixture_temperature=2.0)  # the cap counts: 1 : 2 of 500
        used = Counter(prompts(rows.train))
        assert sum(count for prompt, count in used.items() if prompt.startswith("small")) == 167
        assert sum(count for prompt, count in used.items() if prompt.startswith("large")) == 333
        assert {count for prompt, count in used.items() if prompt.startswith("small")} == {1, 2}
        assert {count for prompt, count in used.items() if prompt.startswith("large")} == {1}
        assert prompts(rows.train) == prompts(load(*sources, mixture_temperature=2.0).train)
        assert prompts(rows.train) != prompts(load(*sources, mixture_temperature=2.0, seed=1).train)
        assert rows.report["tasks"] == {
            "large": {"train_rows": 333, "share": 333 / 500, "evaluation_rows": 0},
            "small": {"train_rows": 167, "share": 167 / 500, "evaluation_rows": 0},
        }
        assert [source["train_rows"] for source in rows.report["sources"]] == [167, 333]
        assert [source["rows"] for source in rows.report["sources"]] == [100, 400]
        assert len(load(*sources).train) == 500

    @pytest.mark.parametrize(
        ("keys", "task"),
        [
            ({"path": "data/reviews_train.jsonl.gz"}, "reviews"),
            ({"path": "data/reviews.csv"}, "reviews"),
            ({"path": "reviews/train.parquet"}, "reviews"),
            ({"path": "reviews/train-*.parquet"}, "reviews"),
            ({"path": "/x/strain.jsonl"}, "strain"),
            ({"path": "train.jsonl"}, "train"),
            ({"path": "org/imdb"}, "imdb"),
            ({"path": "nyu-mll/glue", "name": "sst2"}, "sst2"),
            ({"generator": "world:rows"}, "world:rows"),
            ({"path": "reviews.csv", "task": "mood"}, "mood"),
        ],
    )
    def test_name_of_a_task(self, keys, task):
        assert task_name(DataSource(**keys)) == task

    def test_tasks_of_both_sides(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{**row, "task": "own"} for row in pairs(3)])
        other = write_jsonl(tmp_path / "b_eval.jsonl", [{"prompt": "q", "completion": "c"}])
        assert {row.extra["task"] for row in load(path).train} == {"own"}  # a column of the data stays,
        rows = load(DataSource(path=path, task="named"), eval_dataset=[DataSource(path=other)])
        assert {row.extra["task"] for row in rows.train} == {"named"}  # unless the recipe says otherwise
        assert rows.report["tasks"] == {
            "named": {"train_rows": 3, "share": 1.0, "evaluation_rows": 0},
            "b": {"train_rows": 0, "share": 0.0, "evaluation_rows": 1},
        }

    def test_the_report_names_no_more_than_the_most_frequent_tasks(self, tmp_path):
        rows = [{**row, "task": f"task {n}"} for n, row in enumerate(pairs(300))]
        tasks = load(write_jsonl(tmp_path / "a.jsonl", [*rows, {**pairs(301)[-1], "task": "task 299"}])).report["tasks"]
        assert len(tasks) == 100
        assert next(iter(tasks)) == "task 299"
        line = str(describe_task_shares({"tasks": tasks}))
        assert line.startswith("task 299 0.7% (2 rows), task 0 0.3% (1 rows), ")
        assert line.endswith("task 18 0.3% (1 rows), and 80 more")


class TestSplit:
    def test_share_of_prompts(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(2000))
        rows = load(path, eval_fraction=0.1)
        assert len(rows.train) + len(rows.evaluation) == 2000
        assert 160 <= len(rows.evaluation) <= 240  # 200, four standard deviations of 13
        assert rows == load(path, eval_fraction=0.1)
        assert prompts(rows.evaluation) != prompts(load(path, eval_fraction=0.1, seed=1).evaluation)

    def test_equal_prompts_are_on_one_side_in_every_stage_and_format(self, tmp_path):
        prompted = write_jsonl(tmp_path / "a.jsonl", pairs(200) + pairs(200))
        preferences = [
            {"prompt": [{"role": "user", "content": f"question {i} "}], "chosen": "a", "rejected": "b"}
            for i in reversed(range(200))
        ]
        preferred = write_jsonl(tmp_path / "b.jsonl", preferences)
        sft = load(prompted, eval_fraction=0.3)
        reward = load(preferred, form=Preference, eval_fraction=0.3)
        ppo = load(prompted, preferred, form=Prompt, eval_fraction=0.3)
        held_out = {row.prompt for row in sft.evaluation}
        assert 40 < len(held_out) < 80
        assert held_out.isdisjoint(row.prompt for row in sft.train)
        assert {row.prompt[0]["content"].strip() for row in reward.evaluation} == held_out
        assert {row.prompt for row in ppo.evaluation if isinstance(row.prompt, str)} == held_out
        assert {
            row.prompt[0]["content"].strip() for row in ppo.evaluation if not isinstance(row.prompt, str)
        } == held_out

    def test_dialogues_with_one_opening_are_on_one_side(self, tmp_path):
        rows = []
        for i in range(100):
            turns = [{"role": ("user", "assistant")[j % 2], "content": f"turn {j} of {i}"} for j in range(6)]
            rows += [{"messages": turns[:2]}, {"messages": turns[:4]}, {"messages": turns}]
        loaded = load(write_jsonl(tmp_path / "a.jsonl", rows), eval_fraction=0.3)
        sides = [{row.prompt[0]["content"] for row in side} for side in (loaded.train, loaded.evaluation)]
        assert sides[0].isdisjoint(sides[1])
        assert len(sides[0]) + len(sides[1]) == 100

    def test_plain_text_is_split_by_the_text(self, tmp_path):
        rows = [{"text": f"story {i}"} for i in range(200)] * 2
        loaded = load(write_jsonl(tmp_path / "a.jsonl", rows), eval_fraction=0.3)
        sides = [{row.completion for row in side} for side in (loaded.train, loaded.evaluation)]
        assert sides[0].isdisjoint(sides[1])
        assert 40 < len(sides[1]) < 80

    def test_train_rows_with_an_evaluation_prompt_are_dropped(self, tmp_path):
        train = write_jsonl(tmp_path / "a.jsonl", pairs(10) + pairs(2))
        evaluation = write_jsonl(
            tmp_path / "b.jsonl", [{"prompt": f"question {i} ", "completion": "x"} for i in (1, 3, 99)]
        )
        rows = load(train, eval_dataset=[DataSource(path=evaluation)])
        assert prompts(rows.train) == [f"question {i}" for i in (0, 2, 4, 5, 6, 7, 8, 9, 0)]
        assert prompts(rows.evaluation) == ["question 1 ", "question 3 ", "question 99 "]
        assert rows.report["train_rows_dropped_as_evaluated"] == 3

    def test_so_are_dialogues_that_train_on_one_on_the_way(self, tmp_path):
        turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(4)]
        given = {"prompt": turns[:3], "completion": turns[3:]}  # its first assistant turn is not trained
        train = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}, given])
        evaluation = write_jsonl(tmp_path / "b.jsonl", [{"messages": turns[:2]}])
        rows = load(train, eval_dataset=[DataSource(path=evaluation)])
        assert [row.where for row in rows.train] == [f"{train}:2"]
        back = load(evaluation, write_jsonl(tmp_path / "c.jsonl", pairs(1)), eval_dataset=[DataSource(path=train)])
        assert [row.prompt for row in back.train] == ["question 0"]

    def test_max_eval_rows_is_a_seeded_sample(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(200))
        whole = load(path, eval_fraction=0.5)
        some = load(path, eval_fraction=0.5, max_eval_rows=10)
        assert len(some.evaluation) == 10
        assert some.train == whole.train
        assert [row for row in whole.evaluation if row in some.evaluation] == some.evaluation
        assert some.evaluation != whole.evaluation[:10]
        assert some.evaluation == load(path, eval_fraction=0.5, max_eval_rows=10).evaluation

    def test_a_side_without_rows(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", pairs(4))
        with pytest.raises(UserError, match=r"eval_fraction: with 1e-06, none of the 4 rows is held out .*; raise it"):
            load(path, eval_fraction=1e-6)
        with pytest.raises(UserError, match=r"no training row is left: 4 are for evaluation"):
            load(path, eval_fraction=1 - 1e-9)
        with pytest.raises(UserError, match=r"no training row is left: .*4 were dropped.* Give more or other rows\.$"):
            load(path, eval_dataset=[DataSource(path=path)])
        assert load(path, eval_fraction=0.0).evaluation == []


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.slow
class TestRealData:
    @pytest.mark.parametrize("form", [Prompt, Demonstration, Preference])
    @pytest.mark.parametrize(
        ("name", "rows", "bad"),
        [
            ("hh-helpful", 1897, 0),
            ("hh-harmless", 1888, 0),  # some have two assistant turns in a row, which the template may take
            ("politeness-pairs", 876, 0),
            ("topical-chat-ratings", 325, 0),
            ("autoj-pairs", 513, 0),
            ("summeval-pairs", 2413, 0),
        ],
    )
    def test_preferences(self, name, rows, bad, form):
        loaded = load(str(SHARED / name / "train.jsonl.gz"), form=form, on_bad_row="skip", eval_fraction=0.1)
        assert len(loaded.train) + len(loaded.evaluation) == rows - bad
        assert sum(entry["count"] for entry in loaded.report["bad_rows"].values()) == bad

    @pytest.mark.parametrize("name", ["hh-helpful", "hh-harmless"])
    def test_transcripts_give_the_rows_that_were_made_from_them(self, name):
        path = str(SHARED / name / "train.jsonl.gz")
        columns = {"chosen": "orig_chosen", "rejected": "orig_rejected"}
        with gzip.open(path, "rt") as lines:
            raw = [json.loads(line) for line in lines]
        bare = [{key: row[key] for key in ("orig_chosen", "orig_rejected")} for row in raw]

        def whole(source: DataSource) -> dict[str, Preference]:
            rows = load(source, form=Preference, on_bad_row="skip").train
            return {row.where.rsplit(":", 1)[1]: row for row in rows}

        with pytest.MonkeyPatch.context() as patch:
            module = type(sys)("transcripts_for_test_data")
            module.rows = lambda: bare  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "transcripts_for_test_data", module)
            parsed = whole(DataSource(generator="transcripts_for_test_data:rows", columns=columns))
        made = whole(DataSource(path=path))
        equal = [
            (parsed[number].prompt, parsed[number].chosen, parsed[number].rejected)
            == (made[number].prompt, made[number].chosen, made[number].rejected)
            for number in parsed.keys() & made.keys()
        ]
        # The makers of these files also cut stray speaker names, and took the first reply where dialogues part earlier.
        assert len(equal) > 1850
        assert sum(equal) / len(equal) > 0.98

    @pytest.mark.parametrize(
        ("name", "rows", "bad"),
        [("instruct-1100/train", 882, {}), ("sgd-dialogues/dialogues", 17193, {"empty response": 2})],
    )
    def test_demonstrations(self, name, rows, bad):
        loaded = load(str(SHARED / f"{name}.jsonl.gz"), on_bad_row="skip", eval_fraction=0.1)
        assert {reason: entry["count"] for reason, entry in loaded.report["bad_rows"].items()} == bad
        assert len(loaded.train) + len(loaded.evaluation) == rows - sum(bad.values())
