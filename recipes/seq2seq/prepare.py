"""Rows for summaries and for answers with passages, from SummEval's and qa-feedback's pairs.

    python recipes/seq2seq/prepare.py SUMMEVAL.jsonl[.gz] QA_FEEDBACK.jsonl[.gz]

writes `prompt` and `completion` to outputs/seq2seq/data, split by article and by question.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FOLDER = Path("outputs/seq2seq/data")
WORDS = 60  # of an article, and of the passages of a question


def read(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, gzipped or not."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def first_words(text: str) -> str:
    """The beginning of a text."""
    return " ".join(text.split()[:WORDS])


def summaries(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """By article: its beginning with each summary that was preferred to another."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for row in rows:
        article = row["prompt"].removesuffix("TL;DR:").strip()
        found.setdefault(article, {})[(f"summarize: {first_words(article)}", row["chosen"])] = None
    return {article: list(pairs) for article, pairs in found.items()}


def answers(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """By question: the question and the beginning of its passages with each answer that was preferred, and the human one."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for row in rows:
        passages, _, question = row["prompt"].rpartition("\n\nQuestion: ")
        prompt = f"question: {question} context: {first_words(passages)}"
        for answer in (row["orig"]["gold"], row["chosen"]):
            found.setdefault(question, {})[(prompt, answer)] = None
    return {question: list(pairs) for question, pairs in found.items()}


def write(name: str, groups: dict[str, list[tuple[str, str]]]) -> None:
    """Every eighth article or question to the test rows, the others to the training rows."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    listed = list(groups.values())
    splits = {
        "test": [pair for pairs in listed[::8] for pair in pairs],
        "train": [pair for number, pairs in enumerate(listed) if number % 8 for pair in pairs],
    }
    for split, pairs in splits.items():
        lines = [json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in pairs]
        (FOLDER / f"{name}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(pairs)} rows to {split}")


if __name__ == "__main__":
    write("summaries", summaries(read(sys.argv[1])))
    write("answers", answers(read(sys.argv[2])))
