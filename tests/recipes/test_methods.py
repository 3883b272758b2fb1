"""The recipe that compares prompting with tuning: what the preparation makes, and the table with its costs, cut to seconds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests import ranks

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "methods"
SHARED = ROOT.parent / "shared" / "data"
DATA = Path("outputs") / "methods" / "data"


def python(folder: Path, *words: str) -> str:
    done = ranks.run(ranks.python, *words, ranks=1, cwd=folder, log=folder / "process", env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_prompts_and_questions_are_on_one_side(tmp_path, monkeypatch, capsys):
    pairs = [{"prompt": f"p{n}", "chosen": f"please {n}", "rejected": f"no {n}"} for n in range(6)]
    pairs[3]["rejected"] = "too long " * 13  # the pair is left out
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    passages = "Tea grows in Assam. Coffee is a brewed drink. The Nile flows north."
    asked = [
        {"question": f"Is coffee {n} a drink?", "prompt": f"{passages}\n\nQuestion: Is coffee {n} a drink?", "orig": {"gold": f"Yes {n}, it is. More."}}
        for n in range(3) for _ in range(2)
    ]  # fmt: skip
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "pairs.jsonl", "qa.jsonl"])
    runpy.run_path(str(RECIPES / "prepare.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert rows(tmp_path, "replies_test") == [
        {"text": "please 0", "label": "polite"},
        {"text": "no 4", "label": "rude"},
    ]
    assert [row["text"] for row in rows(tmp_path, "replies_train")] == [
        f"{word} {number}" for number in (1, 2, 5) for word in ("please", "no")
    ]
    passage = "Coffee is a brewed drink. Tea grows in Assam. The Nile flows north."  # the best sentence comes first
    assert rows(tmp_path, "questions_test") == [
        {"question": "Is coffee 2 a drink?", "passage": passage, "answer": "Yes 2, it is."}
    ]
    assert [row["answer"] for row in rows(tmp_path, "questions_train")] == ["Yes 1, it is.", "Yes 0, it is."]
    assert "accuracy of the commonest label: 0.500" in said  # polite as often as rude
    # 11 words without articles and the 4 of the answer have one in common: 2 / 15
    assert "token F1 of the passage as the answer: 0.133" in said


@pytest.mark.slow
def test_from_the_data_to_the_table(tmp_path):
    model = SHARED / "stories260K" / "hf"
    files = [SHARED / name / "train.jsonl.gz" for name in ("politeness-pairs", "qa-feedback")]
    if not all(path.exists() for path in (model, *files)):
        pytest.skip("needs ../shared/data")
    python(tmp_path, str(RECIPES / "prepare.py"), *map(str, files))
    base = ["--model_name_or_path", str(model), "--models.base", str(model)]
    assert "it would run" in python(tmp_path, "-m", "align", "check", str(RECIPES), *base)
    for recipe in ("1_replies_prompt", "2_replies_lora", "3_replies_full"):
        python(tmp_path, "-m", "align", "sft", str(RECIPES / f"{recipe}.yaml"), *base[:2], "--max_steps", "2")
    cut = ["--max_eval_rows", "8", "--bootstrap_iters", "50"]
    said = python(tmp_path, "-m", "align", "evaluate", str(RECIPES / "4_replies_evaluate.yaml"), *base[2:], *cut)
    assert "parameters trained" in said
    found = json.loads((tmp_path / "outputs/methods/replies_evaluate/results.json").read_text())
    plain = {each["model"]: each for each in found["costs"] if (each["template"], each["num_shots"]) == ("plain", 0)}
    assert {name: each["trained_parameters"] for name, each in plain.items()} == {
        "base": None,
        "prompt": 20 * 64,  # virtual tokens by hidden size
        "lora": 46_240,
        "full": 260_032,
    }
    assert plain["lora"]["train_tokens"] == plain["full"]["train_tokens"] > 0
    assert plain["prompt"]["prompt_tokens"] == plain["full"]["prompt_tokens"] + 20
    assert all(each["training_seconds"] > 0 for name, each in plain.items() if name != "base")
    assert {each["n"] for each in found["results"]} == {8}
