"""Rows of slots from the Schema-Guided Dialogue data: labeled spans of utterances, and questions about whole dialogues.

    python recipes/tagging/slots.py DSTC8 [--train 2000] [--test 800]

DSTC8 is a checkout of github.com/google-research-datasets/dstc8-schema-guided-dialogue, of which `train/` is read. A fifth of
its dialogues is for testing. Writes to outputs/tagging/data:

    slots_train.jsonl, slots_test.jsonl       text (a user's turn) and spans {start, end, label}; a label is the slot's name
    answers_train.jsonl, answers_test.jsonl   question (a slot's description), context (a dialogue), answers as in SQuAD, with
                                              every mention of the slot; none where the dialogue does not mention it
"""

import argparse
import hashlib
import json
from pathlib import Path

FOLDER = Path("outputs/tagging/data")
LONGEST = 700  # characters of a dialogue that is asked about, so that training takes minutes
ABOUT = {"USER": "User", "SYSTEM": "Assistant"}


def digest(text):
    """A hash of the text, by which the order is the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()


def dialogues(folder):
    """The dialogues for training and testing, in hash order, and the slots' descriptions by service."""
    found = []
    for file in sorted(folder.glob("dialogues_*.json")):
        found += json.loads(file.read_text(encoding="utf-8"))
    schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
    about = {each["service_name"]: {slot["name"]: slot["description"] for slot in each["slots"]} for each in schema}
    found.sort(key=lambda dialogue: digest(dialogue["dialogue_id"]))
    return found[len(found) // 5 :], found[: len(found) // 5], about


def spans(turn, services):
    """The spans of a turn in the format {start, end, label}; two frames may have the same."""
    found = {
        (slot["start"], slot["exclusive_end"], slot["slot"])
        for frame in turn["frames"]
        if frame["service"] in services
        for slot in frame["slots"]
    }
    ordered = sorted(found)
    clean = [each for each in ordered if not any(a != each and a[0] < each[1] and each[0] < a[1] for a in ordered)]
    return [{"start": start, "end": end, "label": label} for start, end, label in clean]


def slot_rows(split, labels=None):
    """Turns of users with at least one slot, each text once; only those whose labels are among `labels`."""
    rows = {}
    for dialogue in split:
        for turn in dialogue["turns"]:
            found = spans(turn, {frame["service"] for frame in turn["frames"]})
            if turn["speaker"] == "USER" and found and (labels is None or {each["label"] for each in found} <= labels):
                rows.setdefault(turn["utterance"], {"text": turn["utterance"], "spans": found})
    return sorted(rows.values(), key=lambda row: digest(row["text"]))


def answer_rows(split, about):
    """One question about each dialogue of a single service: a slot that it mentions, or, of every fourth dialogue, does not."""
    for number, dialogue in enumerate(split):
        (service, *others) = dialogue["services"]
        if others:
            continue
        context, mentions = "", {}
        for turn in dialogue["turns"]:
            context += f"{ABOUT[turn['speaker']]}: "
            for each in spans(turn, {service}):
                place = len(context) + each["start"]
                text = turn["utterance"][each["start"] : each["end"]]
                mentions.setdefault(each["label"], []).append((place, text))
            context += turn["utterance"] + "\n"
        if len(context) > LONGEST:
            continue
        absent = number % 4 == 0
        names = sorted(name for name in about[service] if (name not in mentions) == absent)
        if names:
            name = names[int(digest(dialogue["dialogue_id"]), 16) % len(names)]
            found = mentions.get(name, [])
            yield {
                "question": about[service][name],
                "context": context.rstrip("\n"),
                "answers": {"text": [text for _, text in found], "answer_start": [place for place, _ in found]},
            }


def write(name, rows):
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=800)
    args = parser.parse_args()
    train, test, about = dialogues(args.checkout / "train")
    rows = slot_rows(train)[: args.train]
    texts = {row["text"] for row in rows}
    labels = {span["label"] for row in rows for span in row["spans"]}
    write("slots_train", rows)
    write("slots_test", [row for row in slot_rows(test, labels) if row["text"] not in texts][: args.test])
    write("answers_train", list(answer_rows(train, about))[: args.train])
    write("answers_test", list(answer_rows(test, about))[: args.test])
