"""Paths in recipes: `~`, variables, and outputs that overlap inputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from align.cli import report
from align.cli.report_file import json_report_path
from align.config.load import as_recipe, load_recipe
from align.config.paths import expand, expand_output, overlap
from align.config.sft import SFTRecipe
from align.errors import UserError
from tests.worlds import write_jsonl


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "sets/of")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~/x", "{here}/home/x"),
        ("~", "{here}/home"),
        ("$DATA/x", "sets/of/x"),
        ("a/${DATA}", "a/sets/of"),
        ("~/$DATA", "{here}/home/sets/of"),
        ("a~b/c$.jsonl", "a~b/c$.jsonl"),
        ("org/model", "org/model"),
        ("a$NOT_SET", "a$NOT_SET"),  # a file that is called so
    ],
)
def test_expanded(here, path, expected):
    (here / "a$NOT_SET").touch()
    assert expand(path, "key") == expected.format(here=here)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("", "key: expected a path, got an empty one"),
        (" ", "key: expected a path, got an empty one"),
        ("a\0b", "key: expected a path, got 'a\\x00b', which has a NUL character in it"),
        ("$NOT_SET/x", "key: no environment variable NOT_SET, which $NOT_SET/x names; set it, or write the path out"),
        ("${NOT_SET}", "key: no environment variable NOT_SET"),
        ("~nobody-of-that-name/x", "key: no home folder ~nobody-of-that-name"),
        ("$DATA/" + "x" * 256, "key: expected a path, got a name of 256 bytes in it"),
    ],
)
def test_not_expanded(here, path, said):
    with pytest.raises(UserError) as error:
        expand(path, "key")
    assert str(error.value).startswith(said)


def test_a_path_that_is_written_does_not_change_its_meaning_once_its_folders_are_made(here):
    (here / "there").mkdir()
    (here / "link").symlink_to("there")
    for path in ("a/b", "../x", "there/../b", "link/../b", "../there/b"):
        assert expand_output(path, "key") == path
    for path in ("new/../there", "there/new/../b", "/nowhere/../b"):
        with pytest.raises(UserError, match=r"^key: \S+ has `\.\.` after \S+, which is no folder; leave both out\.$"):
            expand_output(path, "key")
    (here / "notes.txt").write_text("mine")
    for write in (lambda path: json_report_path(path), lambda path: report.run(["there"], path)):
        with pytest.raises(UserError, match=r"has `\.\.` after new"):
            write("new/../notes.txt")
    assert (here / "notes.txt").read_text() == "mine"
    assert not (here / "new").exists()


def test_every_path_of_a_recipe_is_expanded(here):
    for name in ("home/t.jinja", "home/d.json", "home/m.py", "home/rows.jsonl"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("{}")
    keys = {
        "output_dir": "~/out", "model_name_or_path": "$DATA/model", "chat_template_path": "~/t.jinja", "deepspeed": "~/d.json",
        "eval_metrics": ["~/m.py"], "train_dataset": ["~/rows.jsonl", {"path": "${DATA}/*.jsonl"}], "eval_dataset": "~/*.jsonl",
    }  # fmt: skip
    (here / "sets" / "of").mkdir(parents=True)
    (here / "r.yaml").write_text(yaml.safe_dump(keys))
    for recipe in (load_recipe("sft", "$DATA/../../r.yaml"), as_recipe(SFTRecipe, keys)):
        home = f"{here}/home"
        assert recipe.output_dir == f"{home}/out"
        assert recipe.model_name_or_path == "sets/of/model"
        assert (recipe.chat_template_path, recipe.deepspeed) == (f"{home}/t.jinja", f"{home}/d.json")
        assert recipe.eval_metrics == [f"{home}/m.py"]
        assert [source.path for source in recipe.train_dataset] == [f"{home}/rows.jsonl", "sets/of/*.jsonl"]
        assert recipe.eval_dataset[0].path == f"{home}/*.jsonl"
    (here / "r.yaml").write_text(yaml.safe_dump({**keys, "output_dir": ""}))
    with pytest.raises(UserError, match=r"^r\.yaml:\d: output_dir: expected a path, got an empty one$"):
        load_recipe("sft", "r.yaml")


OVERLAPS = [
    ("model", "model", "is"),
    ("model/", "./x/../model", "is"),
    ("link", "model", "is"),
    ("model", "link", "is"),
    (".", "model", "holds"),
    ("model/out", "model", "lies in"),
    ("link/out", "model", "lies in"),
    ("data", "data/rows.jsonl", "holds"),
    ("org/name", "org/name", "is"),  # a hub id: the folder would be taken for it
    ("data", "data/*.jsonl", "holds files of"),
    ("data/out", "data/**/*.jsonl", "holds files of"),
    ("data/a/b/out", "data/**/*.jsonl", "holds files of"),
    ("data/out", "data/*/*.json*", "holds files of"),
    ("data/out", "d*/out/metrics.jsonl", "holds files of"),
    ("out", "model", None),
    ("model-2", "model", None),
    ("data/out", "data/rows.jsonl", None),
    ("data/rows.jsonl/x", "data/rows.jsonl", None),  # cannot be made, which is another error
    ("data/out", "data/*.jsonl", None),
    ("data/out", "data/**/*.parquet", None),
    ("data/out", "data/[ab]*/*.jsonl", None),
    ("out/ppo", "out/sft", None),
]


@pytest.mark.parametrize(("output", "path", "how"), OVERLAPS)
def test_overlap(here, output, path, how):
    write_jsonl(here / "data" / "rows.jsonl", [{}])
    (here / "model").mkdir()
    (here / "x").mkdir()
    (here / "link").symlink_to("model")
    assert overlap(output, path) == how
    assert overlap(str(here / output), path) == how


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_name_or_path": "out"}, "model_name_or_path"),
        ({"train_dataset": "out/rows.jsonl"}, "train_dataset[0]"),
        ({"eval_dataset": ["rows.jsonl", "out/*.jsonl"]}, "eval_dataset[1]"),
        ({"chat_template_path": "out/t.jinja"}, "chat_template_path"),
        ({"deepspeed": "out/d.json"}, "deepspeed"),
        ({"eval_metrics": ["bleu", "out/m.py"]}, "eval_metrics"),
        ({"output_dir": "model"}, "model_name_or_path"),
        ({"output_dir": "model/out"}, "model_name_or_path"),
        ({"output_dir": "recipes"}, "the recipe"),
    ],
)
def test_no_input_of_a_recipe_overlaps_its_output(here, changes, key):
    for name in ("out/t.jinja", "out/d.json", "out/m.py", "out/rows.jsonl", "rows.jsonl", "model/config.json"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("{}")
    keys = {"output_dir": "out", "model_name_or_path": "model", "train_dataset": "rows.jsonl", **changes}
    (here / "recipes").mkdir()
    (here / "recipes" / "r.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(UserError, match=r"^recipes/r\.yaml:\d: output_dir: ") as error:
        load_recipe("sft", "recipes/r.yaml")
    assert f"({key}), which the run reads" in str(error.value)


def test_two_names_of_one_folder_that_links_do_not_show(here, monkeypatch):
    """As `Model` and `model` are where case does not count."""
    (here / "model" / "out").mkdir(parents=True)
    (here / "Model" / "out").mkdir(parents=True)
    same = Path.samefile
    monkeypatch.setattr(Path, "samefile", lambda a, b: same(Path(str(a).lower()), str(b).lower()))
    assert overlap("Model/out", "model") == "lies in"
    assert overlap("Model", "model") == "is"
    assert os.path.realpath("Model") != os.path.realpath("model")
