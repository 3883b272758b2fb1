"""Extract passages of textbooks, labeled by book, from a file of sections.

    python recipes/textbooks/passages.py CORPUS.jsonl[.gz] [--train 1200] [--test 600] [--unlabelled 2400]

CORPUS has a line {"id": "<book>/<section>", "text": "..."} per section, with paragraphs separated by an empty line.
Writes to outputs/textbooks/data: train.jsonl and test.jsonl, rows of `text` (a paragraph of 12 to 40 words) and `label`
(the book), and unlabelled.jsonl, other paragraphs of the training sections. Each section is in one split only, because
paragraphs of a section share names and terms, which would leak into the test rows.
"""

import argparse
import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

FOLDER = Path("outputs/textbooks/data")


def digest(text: str) -> int:
    """A hash of the text, by which order and split are the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def passages(corpus: str) -> dict[str, list[dict[str, str]]]:
    """The rows of the splits `train` and `test`, each paragraph once, in hash order."""
    found: dict[str, dict[str, str]] = {"train": {}, "test": {}}
    open_text = gzip.open if corpus.endswith(".gz") else open
    with open_text(corpus, "rt", encoding="utf-8") as lines:
        for section in map(json.loads, lines):
            side = "train" if digest(section["id"]) % 5 else "test"
            for paragraph in section["text"].split("\n\n"):
                text = " ".join(paragraph.split())
                if 12 <= len(text.split()) <= 40:
                    found[side][text] = section["id"].split("/")[0]
    both = found["train"].keys() & found["test"].keys()  # boilerplate that many sections share
    return {
        side: [{"text": text, "label": rows[text]} for text in sorted(rows, key=digest) if text not in both]
        for side, rows in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    for name, rows in (("train", 1200), ("test", 600), ("unlabelled", 2400)):
        parser.add_argument(f"--{name}", type=int, default=rows)
    args = parser.parse_args()
    sides = passages(args.corpus)
    parts = {
        "train": sides["train"][: args.train],
        "test": sides["test"][: args.test],
        "unlabelled": [{"text": row["text"]} for row in sides["train"][args.train :][: args.unlabelled]],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (FOLDER / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts = Counter(row["label"] for row in rows if "label" in row).most_common()
        print(f"{part}: {len(rows)} passages", *(f"  {count:4} {label}" for label, count in counts), sep="\n")
