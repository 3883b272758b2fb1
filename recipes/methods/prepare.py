"""Rows for two tasks: is a reply polite, and an answer to a question beside what was retrieved for it.

    python recipes/methods/prepare.py POLITENESS.jsonl[.gz] QA_FEEDBACK.jsonl[.gz]

writes to outputs/methods/data, a third of the prompts and of the questions to the test rows:

- replies_train.jsonl and replies_test.jsonl: `text`, a reply of at most 24 words, and `label`, polite or rude. Training rows are both
  replies of a prompt, test rows one of them, so that they are independent.
- questions_train.jsonl and questions_test.jsonl: `question`, `passage` and `answer`, the first sentence of the human answer, cut
  at 20 words. The passage is what a search with the question finds in its Wikipedia passages: the sentences that share the rarest words
  with it, up to 24 words.

Prints what answers without a model would score on the test rows.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.evaluate.squad import token_f1

FOLDER = Path("outputs/methods/data")
REPLY_WORDS, PASSAGE_WORDS, ANSWER_WORDS = 24, 24, 20


def read(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file, gzipped or not."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def sentences(text: str) -> list[str]:
    """The sentences of a text, with white space made single."""
    return re.split(r"(?<=[.!?]) (?=[A-Z\"“])", " ".join(text.split()))


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def replies(pairs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Rows by split, from pairs of a polite (`chosen`) and a rude (`rejected`) reply."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    kept = [pair for pair in pairs if max(len(pair[name].split()) for name in ("chosen", "rejected")) <= REPLY_WORDS]
    for number, pair in enumerate(kept):
        both = [{"text": pair["chosen"], "label": "polite"}, {"text": pair["rejected"], "label": "rude"}]
        if number % 3:
            rows["train"] += both
        else:
            rows["test"].append(both[number // 3 % 2])
    return rows


def questions(pairs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Rows by split, one of each question."""
    first = {pair["question"]: pair for pair in reversed(list(pairs))}
    texts = {question: sentences(pair["prompt"].rpartition("\n\nQuestion: ")[0]) for question, pair in first.items()}
    occurs = Counter(word for found in texts.values() for sentence in found for word in words(sentence))
    total = sum(map(len, texts.values()))
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for number, (question, found) in enumerate(texts.items()):
        asked = words(question)
        best = sorted(found, key=lambda each: -sum(math.log(total / occurs[word]) for word in asked & words(each)))
        passage = " ".join(" ".join(best).split()[:PASSAGE_WORDS])
        answer = " ".join(sentences(first[question]["orig"]["gold"])[0].split()[:ANSWER_WORDS])
        rows["train" if number % 3 else "test"].append({"question": question, "passage": passage, "answer": answer})
    return rows


def write(name: str, rows: dict[str, list[dict[str, str]]]) -> None:
    """The rows of each split, as JSONL."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        (FOLDER / f"{name}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(found)} rows to {split}")


def commonest(rows: dict[str, list[dict[str, str]]]) -> float:
    """Accuracy on the test rows of always giving the commonest label of the training rows."""
    label, _ = Counter(row["label"] for row in rows["train"]).most_common(1)[0]
    return sum(row["label"] == label for row in rows["test"]) / len(rows["test"])


def passages_as_answers(rows: dict[str, list[dict[str, str]]]) -> float:
    """Token F1 on the test rows of giving the passage as the answer."""
    return sum(token_f1(row["passage"], [row["answer"]]) for row in rows["test"]) / len(rows["test"])


if __name__ == "__main__":
    judged, asked = replies(read(sys.argv[1])), questions(read(sys.argv[2]))
    write("replies", judged)
    write("questions", asked)
    print(f"accuracy of the commonest label: {commonest(judged):.3f}")
    print(f"token F1 of the passage as the answer: {passages_as_answers(asked):.3f}")
