"""Write ratings of replies, and the pairs that follow from them, in three folds that share no context.

    python recipes/ratings/prepare.py PAIRS.jsonl[.gz] [--raters RATERS.json]

PAIRS has a row for two replies to one context: `prompt` (messages, the last one to be answered), `chosen`, `rejected`, and under
`orig` the `fact` that the reply was to use and `chosen_scores` and `rejected_scores` with the mean rating `overall` of three raters,
1 to 5. RATERS is the file of USR (Mehri and Eskenazi 2020) with each rater's number: a list of {"fact", "responses": [{"response",
"Overall": [4, 5, 3]}]}; replies that PAIRS does not have are left out.

In outputs/ratings/data/fold_1 to fold_3, each with a third of the contexts held out:

    ratings.jsonl, held_out_ratings.jsonl    text (the last turn), text_pair (the reply), rating (the mean), label (the same less 3,
                                             the middle of the scale), raters (each one's, or null)
    pairs.jsonl, held_out_pairs.jsonl        every two replies to one context: prompt, chosen, rejected, and margin, the
                                             difference of their ratings, or tie
    held_out_prompts.jsonl                   the held-out contexts
"""

import argparse
import gzip
import hashlib
import json
from itertools import combinations
from pathlib import Path
from typing import Any

OUTPUT = Path("outputs/ratings/data")
FOLDS = 3
MIDDLE = 3.0
WORDS = 40  # of the last turn

Replies = dict[str, tuple[float, list[float] | None]]  # mean rating, and each rater's


def plain(text: str) -> str:
    return " ".join(text.split())


def read_pairs(path: str) -> dict[tuple[str, str], Replies]:
    """The rated replies to each context, which is its last turn and its fact."""
    contexts: dict[tuple[str, str], Replies] = {}
    open_text = gzip.open if path.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            turn = " ".join(row["prompt"][-1]["content"].split()[-WORDS:])
            replies = contexts.setdefault((turn, plain(row["orig"]["fact"])), {})
            for side in ("chosen", "rejected"):
                replies[plain(row[side])] = (row["orig"][f"{side}_scores"]["overall"], None)
    return contexts


def add_raters(contexts: dict[tuple[str, str], Replies], path: str) -> None:
    """Add the raters' own numbers."""
    rated = {
        (plain(each["fact"].lower()), plain(response["response"].lower())): [float(n) for n in response["Overall"]]
        for each in json.loads(Path(path).read_text("utf-8"))
        for response in each["responses"]
    }
    for (_, fact), replies in contexts.items():
        for reply, (mean, _) in replies.items():
            replies[reply] = (mean, rated.get((fact.lower(), reply.lower())))


def pairs(turn: str, replies: Replies) -> list[dict[str, Any]]:
    """Every two replies to a context, the better one as `chosen`."""
    found = []
    for one, two in combinations(sorted(replies), 2):
        better, worse = sorted((one, two), key=lambda reply: -replies[reply][0])
        difference = round(replies[better][0] - replies[worse][0], 4)
        verdict = {"margin": difference} if difference else {"tie": True}
        found.append({"prompt": turn, "chosen": better, "rejected": worse, **verdict})
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("--raters")
    args = parser.parse_args()
    contexts = read_pairs(args.pairs)
    if args.raters:
        add_raters(contexts, args.raters)
    order = sorted(contexts, key=lambda context: hashlib.sha256("\n".join(context).encode()).hexdigest())
    for fold in range(FOLDS):
        folder = OUTPUT / f"fold_{fold + 1}"
        for name, some in (
            ("", [each for place, each in enumerate(order) if place % FOLDS != fold]),
            ("held_out_", order[fold::FOLDS]),
        ):
            ratings = [
                {
                    "text": context[0],
                    "text_pair": reply,
                    "rating": mean,
                    "label": round(mean - MIDDLE, 4),
                    "raters": raters,
                }
                for context in some
                for reply, (mean, raters) in sorted(contexts[context].items())
            ]
            compared = [pair for context in some for pair in pairs(context[0], contexts[context])]
            write(folder / f"{name}ratings.jsonl", ratings)
            write(folder / f"{name}pairs.jsonl", compared)
            if name:
                write(folder / f"{name}prompts.jsonl", [{"prompt": context[0]} for context in some])
            ties = sum("tie" in pair for pair in compared)
            print(
                f"{folder.name} {name}: {len(some)} contexts, {len(ratings)} ratings, {len(compared)} pairs, {ties} ties"
            )


if __name__ == "__main__":
    main()
