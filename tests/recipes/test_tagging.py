"""The preparation of the tagging recipe, on dialogues made up in the format of the Schema-Guided Dialogue data."""

from __future__ import annotations

import json
from pathlib import Path

from align.data.annotations import read_question, read_tagged
from tests.ranks import python, run

RECIPES = Path(__file__).parents[2] / "recipes" / "tagging"


def turn(speaker: str, utterance: str, *slots: tuple[str, str]) -> dict:
    found = [
        {"slot": name, "start": utterance.index(value), "exclusive_end": utterance.index(value) + len(value)}
        for name, value in slots
    ]
    return {"speaker": speaker, "utterance": utterance, "frames": [{"service": "Trips", "slots": found}]}


def test_rows_have_the_slots_at_their_places_and_dialogues_are_on_one_side(tmp_path):
    cities = [f"City{number}" for number in range(40)]
    dialogues = [
        {
            "dialogue_id": f"{number}",
            "services": ["Trips"],
            "turns": [turn("USER", f"To {city} on Monday.", ("city", city), ("date", "Monday")), turn("SYSTEM", f"{city}, yes?", ("city", city))],
        }
        for number, city in enumerate(cities)
    ]  # fmt: skip
    (tmp_path / "dstc8" / "train").mkdir(parents=True)
    (tmp_path / "dstc8/train/dialogues_001.json").write_text(json.dumps(dialogues))
    slots = [{"name": name, "description": f"The {name}"} for name in ("city", "date", "price")]
    (tmp_path / "dstc8/train/schema.json").write_text(json.dumps([{"service_name": "Trips", "slots": slots}]))
    done = run(python, str(RECIPES / "slots.py"), "dstc8", ranks=1, cwd=tmp_path, log=tmp_path / "log")
    assert done.returncode == 0, done.stderr
    rows = {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "outputs/tagging/data").iterdir()
    }
    assert {name: len(found) for name, found in rows.items()} == {
        "slots_train": 32, "slots_test": 8, "answers_train": 32, "answers_test": 8
    }  # fmt: skip
    for row in rows["slots_train"] + rows["slots_test"]:
        spans = read_tagged(row, "f:1", ("text", "spans")).spans
        assert [(row["text"][start:end][:4], label) for start, end, label in spans] == [
            ("City", "city"),
            ("Mond", "date"),
        ]
    asked = [read_question(row, "f:1") for row in rows["answers_train"] + rows["answers_test"]]
    assert {len(row.answers) for row in asked} == {0, 1, 2}
    assert all(len(row.answers) == {"The city": 2, "The date": 1, "The price": 0}[row.question] for row in asked)
