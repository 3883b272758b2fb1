"""The ratings recipe: what its preparation makes, its measures by hand, and both rewards from training to best-of-n."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from align.config.load import load_recipe
from align.judge.ratings import correlation
from tests.encoders.test_classify import save_tiny_bert
from tests.worlds import save_tiny_policy, write_jsonl

RECIPES = Path(__file__).parents[2] / "recipes" / "ratings"
DATA = Path("outputs") / "ratings" / "data"
CONTEXTS = 9
POINTS = {"aab": (5, 4, 3), "bbc": (2, 2, 1), "cde": (4, 4, 4), "dd": (1, 3, 1), "in no pair": (3, 3, 3)}


def script(name: str, monkeypatch, *words: str, main: bool = True) -> dict:
    monkeypatch.setattr(sys, "argv", [name, *words])
    return runpy.run_path(str(RECIPES / name), run_name="__main__" if main else name)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Pairs of four replies to each context; two of the replies have the same mean rating."""
    monkeypatch.chdir(tmp_path)
    rows, raters = [], []
    for number in range(CONTEXTS):
        turn, fact = f"{'w ' * 40}{'abcdefghi'[number] * 3}", f"fact {number}"
        for one, two in (("aab", "bbc"), ("cde", "dd"), ("cde", "bbc")):
            scores = [{"overall": round(sum(POINTS[reply]) / 3, 10)} for reply in (one, two)]
            orig = {"fact": fact, "chosen_scores": scores[0], "rejected_scores": scores[1]}
            prompt = [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": turn},
            ]
            rows.append({"prompt": prompt, "chosen": one, "rejected": two, "orig": orig})
        responses = [{"response": f"{reply}\n", "Overall": [*POINTS[reply]]} for reply in POINTS]
        raters.append({"fact": f"{fact} \n", "responses": responses})
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    Path("raters.json").write_text(json.dumps([*raters, {"fact": "of no pair", "responses": []}]))
    return tmp_path


def read(fold: int, name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"fold_{fold}" / f"{name}.jsonl").read_text().splitlines()]


def test_every_context_is_held_out_once_and_pairs_follow_from_the_ratings(place, monkeypatch):
    script("prepare.py", monkeypatch, "pairs.jsonl", "--raters", "raters.json")
    held_out = [{row["text"] for row in read(fold, "held_out_ratings")} for fold in (1, 2, 3)]
    assert [len(some) for some in held_out] == [3, 3, 3]
    assert len(set().union(*held_out)) == CONTEXTS
    for fold, mine in enumerate(held_out, start=1):
        training = {row["text"] for row in read(fold, "ratings")}
        assert (len(training), training & mine) == (6, set())
        assert {row["prompt"] for row in read(fold, "pairs")} == training
        assert {row["prompt"] for row in read(fold, "held_out_pairs")} == mine
    row = read(1, "ratings")[0]
    assert len(row["text"].split()) == 40
    assert {each["text_pair"]: each["label"] for each in read(1, "ratings")[:4]} == {
        "aab": 1,
        "bbc": -1.3333,
        "cde": 1,
        "dd": -1.3333,
    }
    assert (row["text_pair"], row["rating"], row["raters"]) == ("aab", 4, [5, 4, 3])
    pairs = [(pair["chosen"], pair["rejected"], pair.get("margin"), pair.get("tie")) for pair in read(1, "pairs")[:6]]
    assert pairs == [
        ("aab", "bbc", 2.3333, None), ("aab", "cde", None, True), ("aab", "dd", 2.3333, None),
        ("cde", "bbc", 2.3333, None), ("bbc", "dd", None, True), ("cde", "dd", 2.3333, None),
    ]  # fmt: skip
    script("prepare.py", monkeypatch, "pairs.jsonl")
    assert {row["raters"] for row in read(1, "ratings")} == {None}


def test_the_measures_of_the_comparison(monkeypatch):
    """A correlation is the mean over the folds, whatever the zero of each; a context that is drawn twice counts twice."""
    compare = script("compare.py", monkeypatch, main=False)
    fold, prompts = np.array([1, 1, 1, 2, 2, 2, 3, 3]), np.array([0, 0, 0, 1, 1, 1, 2, 2])
    ratings = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0])
    scores = np.array([1.0, 2.0, 3.0, 103.0, 102.0, 102.5, 1.0, 3.0])  # right, one pair of three right, right
    ones, twice = np.ones(8), np.where(prompts == 2, 2.0, 1.0)
    one = [(scores, ratings)]
    assert compare["measure"]("spearman", one, fold, prompts, ones) == pytest.approx((1 - 0.5 + 1) / 3)
    assert compare["measure"]("pair accuracy", one, fold, prompts, ones) == pytest.approx(5 / 7)
    assert compare["measure"]("pair accuracy", one, fold, prompts, twice) == pytest.approx(6 / 8)
    both = [*one, (ratings, ratings)]
    assert compare["measure"]("kendall", both, fold, prompts, ones) == pytest.approx((1 + (1 - 1 / 3 + 1) / 3) / 2)
    drawn = []
    text = compare["with_interval"](lambda weights: drawn.append(weights) or weights.sum(), fold, prompts)
    assert text == "8.000 [8.000, 8.000]"
    assert len(drawn) == compare["RESAMPLES"] + 1
    assert all((weights == 1).all() for weights in drawn), "a fold of one context has that one in each resample"


def test_from_ratings_and_pairs_to_best_of_n(place, monkeypatch, capsys):
    """Both models from one base on the same contexts; the card and best-of-n take one as the reward and the other beside it."""
    from align.best_of_n.sample import run as best_of_n
    from align.encoders.classify import run as classify
    from align.judge.judge import run as judge
    from align.reward.train import run as reward

    save_tiny_bert(place / "outputs/ratings/one_layer", max_position_embeddings=128)
    monkeypatch.setenv("STORIES", save_tiny_policy(place / "policy"))
    for path in ("pairs.jsonl", "raters.json"):  # the letters that the tiny tokenizer has
        Path(path).write_text(Path(path).read_text().replace("w ", "w"))
    script("prepare.py", monkeypatch, "pairs.jsonl", "--raters", "raters.json")
    small = ["--max_steps", "2"]
    recipes = {
        name: load_recipe(stage, str(RECIPES / f"{name}.yaml"), more)
        for stage, name, more in (
            ("classify", "1_ratings", small), ("reward", "2_pairs", small),
            ("judge-reward", "3_compare", ["--bootstrap_iters", "20"]),
            ("bon", "best_of_n", ["--num_generations", "2", "--response_length", "4", "--bootstrap_iters", "20"]),
        )
    }  # fmt: skip
    trained = {name: {row["text"] for row in read(1, "ratings")} for name in ("1_ratings", "2_pairs")}
    classify(recipes["1_ratings"])
    reward(recipes["2_pairs"])
    card = judge(recipes["3_compare"]).card
    compare = script("compare.py", monkeypatch, main=False)
    held_out = read(1, "held_out_ratings")
    assert not {row["text"] for row in held_out} & trained["1_ratings"]
    ratings = np.array([row["rating"] for row in held_out])
    for name, found in (("1_ratings", card["ratings"]), ("2_pairs", card["ratings"]["second"])):
        scores = compare["scores"](Path("outputs/ratings") / name, held_out)
        assert found["spearman"]["value"] == pytest.approx(correlation("spearman", scores, ratings), abs=1e-6)
    best_of_n(recipes["best_of_n"])
    rows = [json.loads(line) for line in Path("outputs/ratings/best_of_n/responses.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 3, "two responses to each held-out context"
