"""Write the pairs that the recipes read, from files of human preferences.

    python recipes/trust/prepare.py FOLDER [--response_words 80]

FOLDER has hh-helpful, hh-harmless and summeval-pairs, each with train.jsonl or train.jsonl.gz: rows of `prompt` (text, or messages
that end in a user turn), `chosen` and `rejected` (text, or one message). Small models on a CPU need short rows: of a dialogue the last
48 words of its last turn are kept, of an article to summarize the first six; pairs with a response of more than --response_words
words are left out, and counted. By a hash of the opening turn, so that no dialogue and no article is in two files,
outputs/trust/data/NAME gets test.jsonl (a fifth), half_a.jsonl and half_b.jsonl (two fifths each), and prompts.jsonl: the first 96
rows of test.jsonl, on which PPO and best-of-n are measured.
"""

import argparse
import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

OUTPUT = Path("outputs/trust/data")
LAST, FIRST = slice(-48, None), slice(6)  # words of the last turn
SETS = {"hh-helpful": LAST, "hh-harmless": LAST, "summeval-pairs": FIRST}
PROMPTS = 96
PARTS = ("half_a", "half_b", "half_a", "half_b", "test")


def messages(value: Any, role: str) -> list[dict[str, str]]:
    """Text as a message of that role; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def part_of(opening: str) -> str:
    """The file of all pairs whose dialogue opens with this text."""
    digest = hashlib.sha256(" ".join(opening.lower().split()).encode()).digest()
    return PARTS[int.from_bytes(digest[:8], "big") % len(PARTS)]


def prepared(row: dict[str, Any], words: slice, response_words: int) -> tuple[str, dict[str, Any]] | None:
    """The part and the pair of a row; None if a response is too long."""
    turns = messages(row["prompt"], "user")
    responses = {side: messages(row[side], "assistant")[-1]["content"].strip() for side in ("chosen", "rejected")}
    if max(len(text.split()) for text in responses.values()) > response_words:
        return None
    last = " ".join(turns[-1]["content"].split()[words])
    pair = {"prompt": messages(last, "user"), **{side: messages(text, "assistant") for side, text in responses.items()}}
    return part_of(turns[0]["content"]), pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--response_words", type=int, default=80)
    args = parser.parse_args()
    for name, words in SETS.items():
        plain = args.folder / name / "train.jsonl"
        path = plain if plain.is_file() else plain.with_name("train.jsonl.gz")
        open_text = gzip.open if path.suffix == ".gz" else open
        with open_text(path, "rt", encoding="utf-8") as lines:
            pairs = [prepared(json.loads(line), words, args.response_words) for line in lines]
        folder = OUTPUT / name
        folder.mkdir(parents=True, exist_ok=True)
        kept = [pair for pair in pairs if pair is not None]
        for part in dict.fromkeys(PARTS):
            rows = [json.dumps(pair, ensure_ascii=False) + "\n" for where, pair in kept if where == part]
            (folder / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")
            if part == "test":
                (folder / "prompts.jsonl").write_text("".join(rows[:PROMPTS]), encoding="utf-8")
        counts = Counter(part for part, _ in kept)
        print(
            f"{name}: {dict(counts)}, {len(pairs) - len(kept)} with a response of more than {args.response_words} words"
        )


if __name__ == "__main__":
    main()
