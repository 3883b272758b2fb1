"""Bad rows, files of rows, and generators."""

# fmt: off
from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.campaign.cases import Case, Content, Refusal, fifo, folder, link_to, refusals

GOOD = {"prompt": "ab", "completion": "cd"}

# The second of three rows, as text or as a value, in the training rows of a stage; the error has to name file and row.
ROWS: list[tuple[str, str, bytes | dict[str, Any]]] = [
    ("sft", "cut", b'{"prompt": "ab", "comp'),
    ("sft", "single quotes", b"{'prompt': 'ab', 'completion': 'c'}"),
    ("sft", "a list", b'["ab", "c"]'),
    ("sft", "a number", b"5"),
    ("sft", "a word", b'"ab"'),
    ("sft", "null", b"null"),
    ("sft", "two values in a line", b'{"prompt": "a", "completion": "b"} {"prompt": "a"}'),
    ("sft", "trailing comma", b'{"prompt": "a", "completion": "b",}'),
    ("sft", "NUL bytes", b"\0\0\0\0\0\0"),
    ("sft", "Latin-1", b'{"prompt": "caf\xe9", "completion": "b"}'),
    ("sft", "a number of 5000 digits", b'{"prompt": "a", "completion": "b", "n": ' + b"1" * 5000 + b"}"),
    ("sft", "deep brackets", b'{"prompt": "a", "completion": "b", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("sft", "deep open brackets", b"[" * 100_000),
    ("sft", "lone surrogate", b'{"prompt": "a\\ud800", "completion": "b"}'),
    ("sft", "lone surrogate in a column name", b'{"prompt": "a", "completion": "b", "\\udfff": 1}'),
    ("sft", "a row of 100 MB", b'{"prompt": "a", "completion": "@"}'),
    ("sft", "no completion", {"prompt": "ab"}),
    ("sft", "completion is null", {"prompt": "ab", "completion": None}),
    ("sft", "completion is a number", {"prompt": "ab", "completion": 5}),
    ("sft", "completion is NaN", {"prompt": "ab", "completion": float("nan")}),
    ("sft", "completion is a list of texts", {"prompt": "ab", "completion": ["c"]}),
    ("sft", "completion is a mapping", {"prompt": "ab", "completion": {"text": "c"}}),
    ("sft", "completion is empty", {"prompt": "ab", "completion": ""}),
    ("sft", "completion is blank", {"prompt": "ab", "completion": "  \n"}),
    ("sft", "prompt is true", {"prompt": True, "completion": "c"}),
    ("sft", "messages without a role", {"prompt": [{"content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}),
    ("sft", "messages of an unknown role", {"prompt": [{"role": "\x1b[31mking", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}),
    ("sft", "message content is null", {"prompt": [{"role": "user", "content": None}], "completion": [{"role": "assistant", "content": "b"}]}),
    ("sft", "message content is a list", {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": [{"role": "assistant", "content": "b"}]}),
    ("sft", "messages of messages", {"prompt": [[{"role": "user", "content": "a"}]], "completion": [{"role": "assistant", "content": "b"}]}),
    ("sft", "too long", {"prompt": "ab" * 500, "completion": "c" * 5000}),
    ("reward", "no rejected", {"prompt": "ab", "chosen": "c"}),
    ("reward", "rejected is null", {"prompt": "ab", "chosen": "c", "rejected": None}),
    ("reward", "chosen is rejected", {"prompt": "ab", "chosen": "c", "rejected": "c"}),
    ("reward", "chosen is a number", {"prompt": "ab", "chosen": 1, "rejected": "c"}),
    ("ppo", "prompt is null", {"prompt": None}),
    ("ppo", "prompt is a number", {"prompt": 7}),
    ("ppo", "prompt is empty messages", {"prompt": []}),
    ("ppo", "prompt ends with an answer", {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
    ("ppo", "prompt of 10,000 tokens", {"prompt": "a" * 10_000}),
    ("classify", "label is null", {"text": "ab", "label": None}),
    ("classify", "label of another kind", {"text": "ab", "label": 5}),
    ("classify", "label is a mapping", {"text": "ab", "label": {"yes": 1}}),
    ("classify", "label is a list of lists", {"text": "ab", "label": [["yes"]]}),
    ("classify", "label is infinite", {"text": "ab", "label": float("inf")}),
    ("classify", "text is missing", {"label": "yes"}),
    ("classify", "text is a number", {"text": 5, "label": "yes"}),
    ("mlm", "text is null", {"text": None}),
    ("mlm", "text is empty", {"text": ""}),
    ("mlm", "text is a list", {"text": ["ab"]}),
    ("token-classification", "tags are fewer", {"tokens": ["ab", "c"], "tags": ["O"]}),
    ("token-classification", "tags are null", {"tokens": ["ab"], "tags": None}),
    ("token-classification", "tags of names and ids", {"tokens": ["ab", "c"], "tags": ["O", 1]}),
    ("token-classification", "an id without a name", {"tokens": ["ab", "c"], "tags": [0, 1]}),
    ("token-classification", "inside without a beginning", {"tokens": ["ab", "c"], "tags": ["O", "I-X"]}),
    ("token-classification", "inside of another type", {"tokens": ["ab", "c"], "tags": ["B-X", "I-Y"]}),
    ("token-classification", "tokens is text", {"tokens": "ab c", "tags": ["O", "O"]}),
    ("token-classification", "an empty word", {"tokens": ["ab", " "], "tags": ["O", "O"]}),
    ("token-classification", "no words", {"tokens": [], "tags": []}),
    ("token-classification", "too long", {"tokens": ["ab"] * 600, "tags": ["O"] * 600}),
    ("question-answering", "an answer elsewhere", {"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [0]}}),
    ("question-answering", "an answer before the passage", {"question": "q", "context": "abc", "answers": {"text": ["c"], "answer_start": [-1]}}),
    ("question-answering", "an offset of text", {"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": ["1"]}}),
    ("question-answering", "more answers than offsets", {"question": "q", "context": "abc", "answers": {"text": ["b", "c"], "answer_start": [1]}}),
    ("question-answering", "answers are text", {"question": "q", "context": "abc", "answers": "b"}),
    ("question-answering", "an answer of spaces", {"question": "q", "context": "a c", "answers": {"text": [" "], "answer_start": [1]}}),
    ("question-answering", "impossible and answered", {"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [1]}, "is_impossible": True}),
    ("question-answering", "context is null", {"question": "q", "context": None, "answers": {"text": [], "answer_start": []}}),
    ("question-answering", "question is blank", {"question": " ", "context": "abc", "answers": {"text": [], "answer_start": []}}),
    ("question-answering", "a question that fills the window", {"question": "abcdefghijk", "context": "abc", "answers": {"text": ["b"], "answer_start": [1]}}),
    ("question-answering", "an answer longer than windows overlap", {"question": "q", "context": "abcdefghijklmnop", "answers": {"text": ["bcdefghijklmno"], "answer_start": [1]}}),
    ("evaluate", "completion is null", {"prompt": "ab", "completion": None}),
    ("evaluate", "lone surrogate", b'{"prompt": "a\\ud800", "completion": "b"}'),
]  # fmt: skip
GOOD_OF: dict[str, dict[str, Any]] = {
    "reward": {"prompt": "ab", "chosen": "cd", "rejected": "e"}, "ppo": {"prompt": "ab"}, "classify": {"text": "ab", "label": "yes"}, "mlm": {"text": "abc"},
    "token-classification": {"tokens": ["ab", "c", "d"], "tags": ["B-X", "O", "B-Y"]},
    "question-answering": {"question": "q", "context": "abc", "answers": {"text": ["b"], "answer_start": [1]}},
}  # fmt: skip
FILE_OF = {"sft": "answers", "reward": "pairs", "ppo": "prompts", "classify": "labels", "mlm": "texts", "evaluate": "answers_eval", "token-classification": "tags", "question-answering": "questions"}


def second(stage: str, row: bytes | dict[str, Any]) -> Refusal:
    """A good row, the bad one, a good row."""
    good = json.dumps(GOOD_OF.get(stage, GOOD)).encode()
    name = f"data/{FILE_OF[stage]}.jsonl"
    lines = [good, row if isinstance(row, bytes) else json.dumps(row).encode(), good, b""]

    def write(path: Path) -> None:
        path.write_bytes(b"\n".join(lines).replace(b"@", b"a" * 100_000_000))  # not before it is drawn

    return Refusal(stage, files={name: write}, says=[f"{name}:2"])


def answers(content: Content, *says: str, name: str = "data/answers.jsonl", **more: Any) -> Refusal:
    """The training rows of sft are this file."""
    keys = {} if name == "data/answers.jsonl" else {"train_dataset": name}
    return Refusal(files={name: content}, keys=keys, says=says or (name,), **more)


def zeros(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(256):
            file.write(bytes(1 << 20))


LINE = json.dumps(GOOD).encode() + b"\n"
FILES = {
    "empty": answers(b""),
    "blank lines": answers(b"\n\n\n"),
    "gone": answers(None),
    "UTF-16": answers((LINE.decode() * 3).encode("utf-16")),
    "all NUL": answers(b"\0" * 4096),
    "a list that is cut": answers(b"[" + json.dumps(GOOD).encode() + b","),
    "a list of numbers": answers(b"[1, 2, 3]"),
    "a deep list": answers(b"[" * 200_000),
    "columns of another stage": answers([{"text": None, "label": "b"}, {"question": "c"}]),
    "columns with escapes": answers([{"\x1b[31mprompt": "a", "\x07": "b"}]),
    "5000 columns": answers([{f"column{i}": i for i in range(5000)}]),
    "all rows are evaluated too": Refusal(files={"data/answers.jsonl": [{"prompt": "st", "completion": "uv"}]}, says=["train_dataset", "answers.jsonl"]),
    "evaluation rows are empty": Refusal(files={"data/answers_eval.jsonl": b""}, says=["data/answers_eval.jsonl"]),
    "a folder": answers(folder),
    "a pipe": answers(fifo),
    "endless": answers(link_to("/dev/zero")),
    "a link to nothing": answers(link_to("gone.jsonl")),
    "a link to itself": answers(link_to("answers.jsonl")),
    "another format": answers(b"prompt", name="data/rows.xlsx"),
    "weights": answers(b"\x10\0\0\0\0\0\0\0{}", name="data/rows.bin"),
    "an escape in the name": answers(b"", "rows", name="data/\x1b[31mrows.jsonl"),
    "gzip: empty": answers(b"", name="data/rows.jsonl.gz"),
    "gzip: cut": answers(gzip.compress(LINE * 100)[:-12], name="data/rows.jsonl.gz"),
    "gzip: plain text": answers(LINE, name="data/rows.jsonl.gz"),
    "gzip: 256 MB of zeros": answers(zeros, name="data/rows.jsonl.gz"),
    "parquet: empty": answers(b"", name="data/rows.parquet"),
    "parquet: garbage": answers(b"PAR1" + bytes(range(256)) + b"PAR1", name="data/rows.parquet"),
    "parquet: text": answers(LINE, name="data/rows.parquet"),
    "csv: empty": answers(b"", name="data/rows.csv"),
    "csv: header alone": answers(b"prompt,completion\n", name="data/rows.csv"),
    "csv: ragged": answers(b"prompt,completion\na,b\nc,d,e,f\n", name="data/rows.csv"),
    "csv: open quote": answers(b'prompt,completion\na,"b\n', name="data/rows.csv"),
    "csv: NUL": answers(b"prompt,completion\na,b\0\n\0,\0\n", name="data/rows.csv"),
    "csv: Latin-1": answers(b"prompt,completion\ncaf\xe9,b\n", name="data/rows.csv"),
    "csv: no header": answers(b"ab,c\nde,f\n", name="data/rows.csv"),
    "json: a mapping of lists": answers(json.dumps({"prompt": ["a"], "completion": ["b"]}).encode(), name="data/rows.json"),
    "json: cut": answers(json.dumps([GOOD] * 5).encode()[:-9], name="data/rows.json"),
    "classify: one class": Refusal("classify", files={"data/labels.jsonl": [{"text": "ab", "label": "yes"}] * 5, "data/labels_eval.jsonl": [{"text": "st", "label": "yes"}]}, says=["labels.jsonl", "label"]),
    "token-classification: two schemes": Refusal("token-classification", files={"data/tags.jsonl": [{"tokens": ["ab"], "tags": ["B-X"]}, {"tokens": ["ab"], "tags": ["X"]}]}, says=["tags.jsonl"]),
    "token-classification: no entity": Refusal("token-classification", files={"data/tags.jsonl": [{"tokens": ["ab"], "tags": ["O"]}]}, says=["tags"]),
    "token-classification: a type of evaluation alone": Refusal("token-classification", files={"data/tags_eval.jsonl": [{"tokens": ["ab"], "tags": ["B-Z"]}]}, says=["tags_eval.jsonl:1"]),
    "token-classification: spans outside": Refusal("token-classification", files={"data/tags.jsonl": [{"text": "ab", "spans": [{"start": 1, "end": 9, "label": "X"}]}]}, says=["tags.jsonl:1"]),
    "token-classification: spans that overlap": Refusal("token-classification", files={"data/tags.jsonl": [{"text": "abc", "spans": [{"start": 0, "end": 2, "label": "X"}, {"start": 1, "end": 3, "label": "Y"}]}]}, says=["tags.jsonl:1"]),
    "mlm: pairs of one text": Refusal("mlm", files={"data/texts.jsonl": [{"text": "abcdefgh" * 20}]}, keys={"next_sentence_prediction": True}, says=["train_dataset", "next_sentence_prediction"]),
    "predict: no model": Refusal(words=["predict", "no/such/model", "data/labels.jsonl", "found.jsonl"], says=["no/such/model"]),
    "predict: a language model": Refusal(words=["predict", "base", "data/labels.jsonl", "found.jsonl"], says=["base"]),
    "predict: an encoder": Refusal(words=["predict", "encoder", "data/labels.jsonl", "found.jsonl"], says=["encoder"]),
    "predict: the output exists": Refusal(words=["predict", "scorer", "data/labels.jsonl", "notes.txt"], says=["notes.txt"]),
    "predict: the output is the input": Refusal(words=["predict", "scorer", "data/labels.jsonl", "data/labels.jsonl"], says=["labels.jsonl"]),
    "predict: no rows": Refusal(words=["predict", "scorer", "data/none.jsonl", "found.jsonl"], says=["data/none.jsonl"]),
    "predict: no text": Refusal(words=["predict", "scorer", "data/prompts.jsonl", "found.jsonl"], says=["data/prompts.jsonl"]),
    "predict: a bad row": Refusal(words=["predict", "scorer", "data/labels.jsonl", "found.jsonl"], files={"data/labels.jsonl": [{"text": "ab"}, {"text": None}, {"text": "c"}]}, says=["data/labels.jsonl:2"]),
    "predict: columns": Refusal(words=["predict", "scorer", "data/labels.jsonl", "found.jsonl", "--columns", "text"], says=["--columns"]),
    "predict: nothing": Refusal(words=["predict"], says=["MODEL", "model"]),
    "classify: a label of evaluation alone": Refusal("classify", files={"data/labels_eval.jsonl": [{"text": "st", "label": "maybe"}]}, says=["labels_eval.jsonl:1", "maybe"]),
}  # fmt: skip


def generator(name: str, *says: str, **arguments: Any) -> Refusal:
    source = {"generator": f"functions:{name}", **({"generator_kwargs": arguments} if arguments else {})}
    return Refusal(keys={"train_dataset": source}, says=says or (f"functions:{name}", "generator"))


def module(content: bytes, *says: str) -> Refusal:
    return Refusal(files={"functions.py": content}, keys={"train_dataset": {"generator": "functions:rows"}}, says=says or ("functions",))


GENERATORS = {
    "no rows": generator("no_rows"),
    "not iterable": generator("not_iterable"),
    "numbers": generator("not_mappings", "functions:not_mappings:1"),
    "fails": generator("failing_rows"),
    "exits": generator("exiting_rows"),
    "endless": generator("endless_rows"),
    "unknown argument": generator("rows", nosuch=1),
    "argument of another type": generator("rows", count="many"),
    "module: not Python": module(b"def rows(:\n"),
    "module: raises": module(b"raise RuntimeError('not today')\n"),
    "module: exits": module(b"import sys\nsys.exit(0)\n"),
    "module: missing import": module(b"import no_such_module_at_all\n", "no_such_module_at_all"),
    "module: not UTF-8": module(b"x = '\xe9'\n"),
    "module: NUL": module(b"x = 1\0\n"),
    "module: shouts": module(b"raise RuntimeError('\\x1b[31mred')\n"),
}  # fmt: skip


def cases() -> Iterator[Case]:
    yield from refusals("rows", {f"{stage}: {name}": second(stage, row) for stage, name, row in ROWS})
    yield from refusals("data files", FILES)
    yield from refusals("generators", GENERATORS)
