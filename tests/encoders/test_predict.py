"""`align predict`: spans, answers and labels of tiny models, worked out with plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from align import __main__ as cli
from align.cli.predict import load
from align.config.encoders import ClassifyRecipe
from align.encoders.alignment import decode
from align.encoders.classify import run as run_classify
from align.runs.own_files import MANIFEST
from tests.encoders.test_classify import save_tiny_bert
from tests.encoders.test_question_answering import answer_by_hand, pair_tokenizer
from tests.encoders.test_token_classification import NAMES, encoded
from tests.worlds import letter_ids, letter_tokenizer, manifest, save_tiny_policy, training_keys, write_jsonl


def save(auto, folder: Path, tokenizer=None, **head) -> str:
    """A model with a head of large random weights, so that its answers differ."""
    save_tiny_bert(folder / "base")
    torch.manual_seed(3)
    model = auto.from_pretrained(folder / "base", **head).eval()
    for name, weight in model.named_parameters():
        if not name.startswith("bert"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder / "model")
    (tokenizer or letter_tokenizer()).save_pretrained(folder / "model")
    return str(folder / "model")


def predicted(model: str, folder: Path, rows: list[dict], *words: str) -> list[dict]:
    file, output = write_jsonl(folder / "rows.jsonl", rows), folder / "predicted.jsonl"
    assert cli.main(["predict", model, file, str(output), *words]) == 0
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_spans_of_texts_and_tags_of_words(tmp_path, capsys):
    names = dict(enumerate(NAMES))
    path = save(AutoModelForTokenClassification, tmp_path, id2label=names, label2id={n: i for i, n in names.items()})
    model = AutoModelForTokenClassification.from_pretrained(path).eval()
    long = "abcdefghijklmnopqrstuvwxyz"  # has spans of several letters
    rows = [{"sentence": "abqk", "id": 7}, {"sentence": long}, {"tokens": ["ab", "cd", "q"]}]
    found = predicted(path, tmp_path, rows, "--columns", "text=sentence")
    assert "3 rows with predictions" in capsys.readouterr().out
    for row, text, words in zip(found, ("abqk", long, "ab cd q"), (None, None, ["ab", "cd", "q"]), strict=True):
        ids = encoded(words, ["O"] * 3)[0] if words else torch.tensor([letter_ids(text)])
        best = model(input_ids=ids).logits[0].softmax(dim=-1).max(dim=-1)
        places = [0, 3, 6] if words else range(len(text))
        units = [(0, 2), (3, 5), (6, 7)] if words else [(place, place + 1) for place in places]
        labels = [NAMES[int(best.indices[place])] for place in places]
        spans = decode(labels, units, "IOB2")
        assert [(each["start"], each["end"], each["label"]) for each in row["predicted_spans"]] == spans
        assert [each["text"] for each in row["predicted_spans"]] == [text[start:end] for start, end, _ in spans]
        for each in row["predicted_spans"]:
            inside = [
                float(best.values[p])
                for p, (s, e) in zip(places, units, strict=True)
                if each["start"] <= s and e <= each["end"]
            ]
            assert each["score"] == pytest.approx(sum(inside) / len(inside), abs=1e-6)
        assert row.get("predicted_tags") == (labels if words else None)
    assert found[0]["id"] == 7
    assert any(each["end"] > each["start"] + 1 for each in found[1]["predicted_spans"])


@pytest.mark.parametrize("unanswerable", [True, False])
def test_answers_are_those_of_the_stages_windows(tmp_path, unanswerable):
    path = save(AutoModelForQuestionAnswering, tmp_path, pair_tokenizer(), num_labels=2)
    keys = {"max_length": 8, "doc_stride": 2, "max_answer_length": 3}
    Path(path, MANIFEST).write_text(json.dumps(manifest("question-answering", recipe=keys, unanswerable=unanswerable)))
    model = AutoModelForQuestionAnswering.from_pretrained(path).eval()
    rows = [
        {"question": q, "context": c} for q, c in [("q", "abcdefghi"), ("r", "xy"), ("s", "zzzabc"), ("k", "mnopqr")]
    ]
    for row in predicted(path, tmp_path, rows):
        answer = row["predicted_answer"]
        by_hand = answer_by_hand(model, row["question"], row["context"])
        assert answer["text"] == by_hand or (not unanswerable and by_hand == "")
        assert answer["text"] == row["context"][answer.get("start", 0) : answer.get("end", 0)]
        assert 0 < answer["score"] <= 1
        assert answer["text"] or unanswerable


def test_labels_of_a_trained_classifier(tmp_path):
    save_tiny_bert(tmp_path / "base")
    rows = [
        {"text": text, "label": label} for text, label in (("ab", "yes"), ("cdef", "no"), ("a", "yes"), ("dd", "no"))
    ]
    recipe = ClassifyRecipe(**training_keys("classify", tmp_path, rows, []), max_steps=1)
    run_classify(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(recipe.output_dir).eval()
    for row in predicted(recipe.output_dir, tmp_path, rows):
        best = model(input_ids=torch.tensor([letter_ids(row["text"])])).logits[0].softmax(dim=-1).max(dim=-1)
        assert (row["predicted_label"], row["score"]) == (
            ["no", "yes"][int(best.indices)],
            pytest.approx(float(best.values)),
        )
    # The same model by what its configuration says of its labels, with logits of 0.3 and 0.7 for one text.
    predictor = load(recipe.output_dir)
    logits = torch.logit(torch.tensor([0.3, 0.7]))
    with torch.no_grad():
        ids = predictor.tokenizer("ab", "q", return_tensors="pt")["input_ids"]
        predictor.model.classifier.bias += logits - predictor.model(input_ids=ids).logits[0]
    row = {"text": "ab", "text_pair": "q"}
    expected = {
        None: {"predicted_label": "yes", "score": pytest.approx(49 / 58)},  # odds of 7/3 and 3/7
        "multi_label_classification": {"predicted_labels": [{"label": "yes", "score": pytest.approx(0.7)}]},
        "regression": {"predicted_label": pytest.approx(float(logits[0]))},
    }
    for problem, found in expected.items():
        predictor.model.config.problem_type = problem
        assert next(predictor.predict([row])) == found


def test_what_is_refused(tmp_path, capsys):
    def refused(*words: str) -> str:
        assert cli.main(["predict", *words]) == 2
        return capsys.readouterr().err

    names = dict(enumerate(NAMES))
    path = save(AutoModelForTokenClassification, tmp_path, id2label=names, label2id={n: i for i, n in names.items()})
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": " "}, {"text": "a" * 65}])
    said = refused(path, rows, str(tmp_path / "out.jsonl"))
    assert "rows.jsonl:2" in said
    assert "rows.jsonl:3" in said
    assert "longer than 64 tokens" in said
    assert "or take them out of the file" in said
    assert "on_bad_row" not in said
    assert not (tmp_path / "out.jsonl").exists()
    assert "exists already" in refused(path, rows, rows)
    assert "expected a model, a file of rows and a new file" in refused(path, rows)
    assert "expected ours=theirs" in refused(path, rows, str(tmp_path / "o"), "--columns", "text")
    assert "got LlamaForCausalLM; language models answer" in refused(
        save_tiny_policy(tmp_path / "lm"), rows, str(tmp_path / "o")
    )
    assert "no model at" in refused(str(tmp_path / "gone"), rows, str(tmp_path / "o"))
    Path(path, MANIFEST).write_text(json.dumps(manifest("token-classification", scheme="words")))
    assert "the model tags given words" in refused(path, rows, str(tmp_path / "o"))
