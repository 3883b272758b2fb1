"""Data that is odd in form or size, and generators that misbehave: one clear error with file and row, at once."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from align.config.data_source import DataSource
from align.data import compressed, sources
from align.data.load import DataSettings, Rows, load_rows
from align.data.rows import Demonstration, Labelled
from align.errors import UserError

GOOD = '{"prompt": "p", "completion": "c"}\n'
HEADER = "prompt,completion\n"


def load(source: DataSource | str, **keys: Any) -> Rows:
    source = source if isinstance(source, DataSource) else DataSource(path=source)
    form = keys.pop("form", Demonstration)
    return load_rows(DataSettings(train_dataset=[source], eval_fraction=0.0, seed=0, **keys), form)


def serve(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # the whole path may be too long


def write(content: str | bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


# Each: the file's name, what makes it, and a part of the error.
FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a named pipe": ("a.jsonl", os.mkfifo, "a.jsonl: expected a file, got a named pipe"),
    "a named pipe, gzipped": ("a.jsonl.gz", os.mkfifo, "a.jsonl.gz: expected a file, got a named pipe"),
    "a socket": ("a.json", serve, "a.json: expected a file, got a socket"),
    "an endless device": ("a.csv", lambda path: path.symlink_to("/dev/zero"), "a.csv: expected a file, got a device"),
    "a folder": ("a.jsonl", Path.mkdir, "a.jsonl: expected a .jsonl, .json, .parquet, .csv file"),
    "a broken link": ("a.jsonl", lambda path: path.symlink_to("gone"), "a.jsonl: is a link to gone, which is not there"),
    "a link of git-annex": (
        "a.parquet",
        lambda path: path.symlink_to("../.git/annex/objects/aB/Cd/SHA256E-s1--0/SHA256E-s1--0"),
        "fetch the file by `git annex get`",
    ),
    "a pointer of git-lfs": (
        "a.jsonl",
        write("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "holds a pointer of git instead of the file; fetch the file by `git lfs pull`",
    ),
    "nothing": ("a.jsonl", write(""), "a.jsonl: expected rows, found none"),
    "blank lines": ("a.jsonl", write("\n \n\n"), "a.jsonl: expected rows, found none"),
    "an empty list": ("a.json", write("[]"), "a.json: expected rows, found none"),
    "an empty csv": ("a.csv", write(""), "a.csv: cannot be read as csv: EmptyDataError"),
    "UTF-16": ("a.jsonl", write(GOOD.encode("utf-16")), "a.jsonl: is in UTF-16; save it in UTF-8"),
    "UTF-16 csv": ("a.csv", write(HEADER.encode("utf-16")), "a.csv: is in UTF-16; save it in UTF-8"),
    "a row in Latin-1": ("a.jsonl", write((GOOD + GOOD.replace('"c"', '"é"')).encode("latin-1")), "not valid UTF-8: 1 (a.jsonl:2)"),
    "a list in Latin-1": ("a.json", write(b'[\n{"prompt": "\xe9"}]'), "a.json: cannot be read as json: ValueError: line 2 is not UTF-8"),
    "a csv row in Latin-1": ("a.csv", write(f"{HEADER}p,c\np,é\n".encode("latin-1")), "a.csv:2: is not UTF-8; save the file"),
    "a cut row": ("a.jsonl", write(GOOD + GOOD[:20]), "not valid JSON: 1 (a.jsonl:2)"),
    "all rows cut": ("a.jsonl", write(GOOD[:20] + "\n" + GOOD[:20]), "2 rows cannot be used:\n  not valid JSON: 2 (a.jsonl:1, a"),
    "null characters": ("a.jsonl", write(GOOD + "\0" * 50 + "\n"), "not valid JSON: 1 (a.jsonl:2)"),
    "rows that are no mappings": ("a.jsonl", write('1\n"x"\n[]\nnull\n'), "not a mapping of columns: 4 (a.jsonl:1, a.jsonl:2"),
    "a deep row": ("a.jsonl", write(GOOD + "[" * 100_000 + "\n"), "not valid JSON: 1 (a.jsonl:2)"),
    "a deep column": (
        "a.jsonl", write(GOOD + '{"prompt": "p", "completion": "c", "x": ' + "[" * 900 + "]" * 900 + "}"), ""),
    "a lone surrogate": ("a.jsonl", write(GOOD + GOOD.replace('"c"', '"\\udfff"')), "a lone surrogate): 1 (a.jsonl:2)"),
    "text that is a number": ("a.jsonl", write(GOOD.replace('"c"', "NaN")), "neither text nor a list of messages: 1 (a.j"),
    "text that is a mapping": ("a.jsonl", write(GOOD.replace('"c"', '{"a": 1}')), "neither text nor a list of messages: 1"),
    "messages that are numbers": ("a.jsonl", write(GOOD.replace('"c"', "[1]")), "entries other than messages with `role`"),
    "many columns": (
        "a.jsonl",
        write(json.dumps(dict.fromkeys(map(str, range(100_000)), 0))),
        "no column `prompt` and no `completion`; its columns are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11",
    ),
    "no gzip": ("a.jsonl.gz", write(GOOD), "a.jsonl.gz: cannot be read as jsonl: BadGzipFile"),
    "cut gzip": ("a.jsonl.gz", write(cut(gzip.compress(os.urandom(9999)))), "a.jsonl.gz: cannot be read as jsonl: EOFError"),
    "broken gzip": ("a.jsonl.gz", write(gzip.compress(b"")[:10] + b"\xff" * 50), "cannot be read as jsonl: error: Error -3"),
    "no Parquet": ("a.parquet", write("PAR1" + "x" * 50 + "PAR1"), "a.parquet: cannot be read as parquet"),
    "too many cells": ("a.csv", write(HEADER + "p,c\np,c,d\n"), "a.csv:2: has 3 cells, and the header has 2; put cells"),
    "too many cells everywhere": ("a.csv", write(HEADER + "p,c,d\np,c,d\n"), "a.csv:1: has 3 cells, and the header has 2"),
    "a comma at each end": ("a.csv", write(HEADER + "p,c,\np,c,\n"), "a.csv:1: has 3 cells, and the header has 2"),
    "too few cells": ("a.csv", write(HEADER + "p,c\np\n"), "missing field `completion`: 1 (a.csv:2)"),
    "a column twice": ("a.csv", write("prompt,completion,prompt\np,c,q\n"), "the header names the column `prompt` twice"),
    "an open quote": ("a.csv", write(HEADER + 'p,c\n"p,c\np,c\n'), "a.csv: cannot be read as csv: ParserError"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "make", "said"), FILES.values(), ids=FILES)
def test_a_file(folder, name, make, said):
    make(Path(name))
    if not said:
        assert len(load(name).train) == 2
        return
    with pytest.raises(UserError) as error:
        load(name)
    assert said in str(error.value)
    assert len(str(error.value)) < 1500


def test_globs(folder):
    with pytest.raises(UserError, match=r"\*\.jsonl: no such file; fix the path"):
        load("*.jsonl")
    (folder / "b.jsonl").mkdir()
    (folder / "a.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match=r"b\.jsonl: expected a \.jsonl"):
        load("*.jsonl")
    (folder / "a[1].csv").write_text(HEADER + "p,c\n")
    assert len(load("a[1].csv").train) == 1


def test_a_row_of_many_characters(folder, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW", 1000)
    monkeypatch.setattr("align.data.load.MAX_ROW", 1000)
    long = json.dumps({"prompt": "p" * 2000, "completion": "c"})
    # Four reads of the rest of the line
    (folder / "a.jsonl").write_text(GOOD + long * 2 + "\n" + GOOD + long)
    with pytest.raises(UserError, match=r"more than 1,000 characters: 2 \(a.jsonl:2, a.jsonl:4\)"):
        load("a.jsonl")
    assert [row.where for row in load("a.jsonl", on_bad_row="skip").train] == ["a.jsonl:1", "a.jsonl:3"]
    (folder / "a.json").write_text(f"[{GOOD}, {long}]")
    with pytest.raises(UserError, match=r"more than 1,000 characters: 1 \(a.json:2\)"):
        load("a.json")
    Dataset.from_list([json.loads(long)]).to_parquet("a.parquet")
    with pytest.raises(UserError, match=r"more than 1,000 characters: 1 \(a.parquet:1\)"):
        load("a.parquet")
    (folder / "a.csv").write_text(f"{HEADER}p,c\n{'p' * 140_000},c\n")
    with pytest.raises(UserError, match=r"more than 1,000 characters: 1 \(a.csv:2\)"):
        load("a.csv")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet"])
def test_a_small_file_of_too_many_rows(folder, monkeypatch, name):
    monkeypatch.setattr(compressed, "MAX_EXPANDED", 10**5)
    row = {"prompt": "p" * 300, "completion": "c"}
    for count in (100, 3000):  # 30,000 characters, whatever their ratio, and 900,000
        if name == "a.parquet":
            Dataset.from_list([row] * count).to_parquet(name)
        else:
            lines = [json.dumps(row)] * count
            text = {
                "a.jsonl.gz": "\n".join(lines),
                "a.json.gz": f"[{','.join(lines)}]",
                "a.csv.gz": HEADER + f"{row['prompt']},c\n" * count,
            }
            (folder / name).write_bytes(gzip.compress(text[name].encode()))
        if count == 100:
            assert len(load(name).train) == count
    with pytest.raises(UserError, match=rf"^{name}: expands to more than 100,000 characters, 200 times its size"):
        load(name)


def test_a_row_of_100_mb_is_refused_in_seconds(folder):
    with open("a.jsonl", "w") as file:
        file.write(GOOD + '{"prompt": "' + "p" * 10**8 + '", "completion": "c"}\n')
    began = time.monotonic()
    with pytest.raises(UserError, match=r"more than 33,554,432 characters: 1 \(a.jsonl:2\)"):
        load("a.jsonl")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("1e999", "`label` is not a finite number"),
        ("9" * 400, "`label` is too large a number"),
        ("{}", "`label` is neither"),
    ],
)
def test_a_label(folder, label, said):
    (folder / "a.jsonl").write_text(f'{{"text": "t", "label": {label}}}\n')
    with pytest.raises(UserError, match=said):
        load("a.jsonl", form=Labelled)


# The body of a generator, and a part of the error.
GENERATORS: dict[str, tuple[str, str]] = {
    "returns nothing": ("return None", "failed with TypeError: 'NoneType' object is not iterable"),
    "returns a number": ("return 7", "failed with TypeError: 'int' object is not iterable"),
    "yields nothing": ("yield from ()", "odd_rows:rows: expected rows, found none"),
    "yields text": ("yield 'x'", "not a mapping of columns: 1 (odd_rows:rows:1)"),
    "yields pairs": ("yield GOOD\n    yield ('p', 'c')", "not a mapping of columns: 1 (odd_rows:rows:2)"),
    "yields numbers as columns": ("yield GOOD\n    yield {1: 'x', 'a': 1}", "a column whose name is not text: 1 (odd_rows:rows:2)"),
    "yields only numbers as columns": ("yield {1: 'x'}", "odd_rows:rows: no column `messages`; its columns are 1;"),
    "yields a row within itself": (
        "row = dict(GOOD)\n    row['x'] = [row]\n    yield row", "nested too deeply, or with keys that are not text: 1"),
    "yields odd keys inside": ("yield {**GOOD, 'x': {(1, 2): 3}}", "nested too deeply, or with keys that are not text: 1"),
    "yields mixed keys inside": ("yield {**GOOD, 'x': {1: 3, 'a': 4}}", "nested too deeply, or with keys that are not text: 1"),
    "raises": ("raise OSError('no disk')\n    yield", "odd_rows:rows failed with OSError: no disk"),
    "raises after some": ("yield GOOD\n    yield GOOD\n    1 / 0", "failed after 2 rows with ZeroDivisionError"),
    "exits": ("yield GOOD\n    raise SystemExit", "failed after 1 rows with SystemExit"),
    "recurses": ("yield from rows()", "failed with RecursionError"),
    "takes arguments": ("yield arguments['x']", "failed with KeyError: 'x'"),
}  # fmt: skip


def generator(folder: Path, body: str) -> DataSource:
    sys.modules.pop("odd_rows", None)
    importlib.invalidate_caches()
    code = f"GOOD = {json.loads(GOOD)}\ndef rows(**arguments):\n    {body}\n"
    (folder / "odd_rows.py").write_text(code)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    return DataSource(generator="odd_rows:rows")


@pytest.mark.parametrize(("body", "said"), GENERATORS.values(), ids=GENERATORS)
def test_a_generator(folder, body, said):
    with pytest.raises(UserError) as error:
        load(generator(folder, body))
    assert said in str(error.value)


def test_a_generator_without_end(folder, monkeypatch):
    monkeypatch.setattr(sources, "MAX_GENERATED_ROWS", 1000)
    with pytest.raises(UserError, match=r"odd_rows:rows yields more than 1,000 rows, and may never end; make it end"):
        load(generator(folder, "while True: yield GOOD"))
    assert len(load(generator(folder, "for _ in range(1000): yield GOOD")).train) == 1000


def test_a_slow_generator_is_reported(folder, monkeypatch, capsys):
    monkeypatch.setattr(sources, "REPORT_SECONDS", 0.05)
    load(generator(folder, "import time; yield GOOD; time.sleep(0.3); yield GOOD"))
    said = capsys.readouterr().err
    assert "generator: odd_rows:rows: 1 rows after 0 s; Ctrl-C ends it\n" in said
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_generator_may_change_the_row_that_it_has_yielded(folder):
    body = "row = dict(GOOD)\n    for letter in 'abc':\n        row['prompt'] = letter\n        yield row"
    assert [row.prompt for row in load(generator(folder, body)).train] == ["a", "b", "c"]


def test_the_key_of_the_recipe_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    os.mkfifo(tmp_path / "b.jsonl")
    for path, said in {"b.jsonl": "expected a file, got a named pipe", "gone.jsonl": "no such file"}.items():
        with pytest.raises(UserError, match=f"^eval_dataset: .*{path}: {said}"):
            load(str(tmp_path / "a.jsonl"), eval_dataset=[DataSource(path=str(tmp_path / path))])
