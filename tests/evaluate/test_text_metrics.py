"""Text metrics: by hand, against the libraries, against what the hub's scripts document, and from sums of statistics."""

from __future__ import annotations

import random
import socket

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score

from align.errors import UserError
from align.evaluate.metrics import load_metric
from align.evaluate.squad import exact_match, token_f1
from align.evaluate.text_metrics import METRICS

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", ".", ",", "Positive", "negative"]


def compute(name: str, predictions: list[str], references: list[str]) -> dict[str, float]:
    return load_metric(name).compute(predictions=predictions, references=references)


def sentences(seed: int, count: int = 30) -> tuple[list[str], list[str]]:
    """Predictions that share words with their references."""
    draw = random.Random(seed)
    references = [[draw.choice(WORDS) for _ in range(draw.randrange(1, 12))] for _ in range(count)]
    predictions = [[word if draw.random() < 0.7 else draw.choice(WORDS) for word in words] for words in references]
    return [" ".join(words[: draw.randrange(13)]) for words in predictions], [" ".join(words) for words in references]


def labels(seed: int, count: int = 30) -> tuple[list[str], list[str]]:
    draw = random.Random(seed)
    some = ("red", "green", "blue")
    return [draw.choice((*some, "no idea")) for _ in range(count)], [draw.choice(some) for _ in range(count)]


# --- by hand


def test_exact_match():
    assert compute("exact_match", ["cat?", "theater", "yelling", "agent"], ["the cat", "theater", "YELLING", "agent007"]) == {
        "exact_match": 0.25  # the example of the hub's metric
    }  # fmt: skip


def test_accuracy_is_of_labels():
    assert compute("accuracy", ["Positive.", "NEGATIVE", "pos"], ["positive", "negative.", "positive"]) == {
        "accuracy": pytest.approx(2 / 3)
    }


def test_f1():
    # pos: 1 right of 1 said and 2 true, F1 2/3. neg: 1 right of 2 said and 2 true, F1 1/2. "maybe" is no label.
    predictions, references = ["Pos.", "neg", "neg", "maybe"], ["pos", "pos", "neg", "neg"]
    assert compute("f1", predictions, references) == {"f1": pytest.approx((2 / 3 + 1 / 2) / 2)}
    # the hub's own example of macro-F1, 0.27
    assert compute("f1", list("021001"), list("012012")) == {"f1": pytest.approx(0.8 / 3)}


def test_bleu():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples
    assert compute("bleu", ["a b c d e"], ["a b c d f"]) == {"bleu": pytest.approx(100 * 0.2**0.25)}
    # all of 5, 4, 3, 2; five words for seven
    assert compute("bleu", ["a b c d e"], ["a b c d e f g"]) == {"bleu": pytest.approx(100 * np.exp(1 - 7 / 5))}


def test_bleu_of_rows_without_four_words_is_zero():
    """As sacrebleu has it for a corpus; only its score of single sentences makes do with fewer."""
    assert (
        compute("bleu", ["a b"], ["a b"]) == {"bleu": sacrebleu.corpus_bleu(["a b"], [["a b"]]).score} == {"bleu": 0.0}
    )


def test_bleu_is_of_the_corpus():
    # 9 of 10, 7 of 8, 5 of 6, 3 of 4 over both rows; the mean of the rows' scores is another number
    expected = 100 * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    assert compute("bleu", ["a b c d e"] * 2, ["a b c d f", "a b c d e"]) == {"bleu": pytest.approx(expected)}


def test_chrf():
    # one of two letters, none of one pair: precision and recall are 1/4 on average
    assert compute("chrf", ["ab"], ["ac"]) == {"chrf": pytest.approx(25.0)}
    predictions = ["The relationship between cats and dogs is not exactly friendly.",
                   "a good bookshop is just a genteel black hole that knows how to read."]  # fmt: skip
    references = ["The relationship between dogs and cats is not exactly friendly.",
                  "A good bookshop is just a genteel Black Hole that knows how to read."]  # fmt: skip
    assert compute("chrf", predictions, references) == {"chrf": pytest.approx(84.64214891738334, rel=1e-9)}  # the hub's


def test_rouge():
    scores = compute("rouge", ["the cat sat", "c d\na b"], ["the cat ran away", "a b\nc d"])
    # row 1: 2 words of 3 and of 4; 1 pair of 2 and of 3. Row 2: all words; pairs ab, cd of three; two in order; by lines all.
    assert scores == {
        "rouge1": pytest.approx((4 / 7 + 1) / 2),
        "rouge2": pytest.approx((2 / 5 + 2 / 3) / 2),
        "rougeL": pytest.approx((4 / 7 + 1 / 2) / 2),
        "rougeLsum": pytest.approx((4 / 7 + 1) / 2),
    }


# --- against the libraries, and resampled


def reference_scores(name: str, predictions: list[str], references: list[str]) -> dict[str, float]:
    if name == "exact_match":
        return {name: np.mean([p == r for p, r in zip(predictions, references, strict=True)])}
    if name == "accuracy":
        return {name: accuracy_score(references, predictions)}
    if name == "f1":
        return {name: f1_score(references, predictions, average="macro", labels=sorted(set(references)))}
    if name == "bleu":
        return {name: sacrebleu.corpus_bleu(predictions, [references]).score}
    if name == "chrf":
        return {name: sacrebleu.corpus_chrf(predictions, [references]).score}
    if name == "squad":  # tests/evaluate/test_squad.py has its definition
        scores = {"squad_exact_match": exact_match, "squad_f1": token_f1}
        pairs = [(p, [r]) for p, r in zip(predictions, references, strict=True)]
        return {each: np.mean([score(*pair) for pair in pairs]) for each, score in scores.items()}
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    rows = [RougeScorer(kinds).score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {kind: np.mean([row[kind].fmeasure for row in rows]) for kind in kinds}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_a_metric_is_what_its_library_says_on_all_rows_and_on_a_resample(name, seed):
    """From texts by `compute`, and from sums of row statistics, for the rows as they are and drawn anew."""
    predictions, references = (labels if name in ("accuracy", "f1") else sentences)(seed)
    expected = pytest.approx(reference_scores(name, predictions, references), rel=1e-9)
    metric = load_metric(name)
    assert metric.compute(predictions=predictions, references=references) == expected
    statistics = metric.statistics(predictions, references)
    assert metric.score(statistics.sum(axis=0)) == expected
    rows = np.random.default_rng(seed).integers(0, len(references), len(references))
    again = [predictions[row] for row in rows], [references[row] for row in rows]
    assert metric.score(statistics[rows].sum(axis=0)) == pytest.approx(reference_scores(name, *again), rel=1e-9)


def test_f1_of_a_resample_leaves_out_labels_that_do_not_occur():
    metric = load_metric("f1")
    statistics = metric.statistics(["a", "b", "a"], ["a", "b", "b"])
    assert metric.score(statistics[[0, 0]].sum(axis=0)) == {"f1": 1.0}
    assert not metric.has_row_scores


def test_nothing_written(tmp_path):
    for name in METRICS:
        assert set(compute(name, ["", ""], ["a b", "c"]).values()) == {0.0}


# --- loading


def test_no_network_is_asked(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in METRICS:
        assert compute(name, ["a"], ["a"])


SCRIPT = """
import datasets
import evaluate

class Longest(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
                                   features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions, references):
        return {"longest": max(map(len, predictions)), "of": "letters"}
"""


def test_a_metric_script(tmp_path):
    (tmp_path / "longest.py").write_text(SCRIPT, encoding="utf-8")
    metric = load_metric(str(tmp_path / "longest.py"))
    assert metric.compute(predictions=["a", "bcd"], references=["", ""]) == {"longest": 3, "of": "letters"}


def test_no_such_metric(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"^metrics: no metric 'blue'; did you mean 'bleu'\?; built in are perplexity, exact_match"
    ):
        load_metric("blue", ("perplexity",))
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.py.*no_such_module_anywhere"):
        load_metric(str(tmp_path / "broken.py"))
