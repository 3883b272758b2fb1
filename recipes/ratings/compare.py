"""Compare rewards from ratings and from pairs of the same ratings with people, over all folds and seeds, beside baselines.

    python recipes/ratings/compare.py [--seeds 1 2 3]

Reads outputs/ratings/data and the reward models outputs/ratings/{ratings,pairs}_foldF_seedS. Every context is held out once. A
correlation is the mean over the folds, because models of different folds have different zeros; pairs are those of one context whose
ratings differ. A line for several seeds has the mean of their numbers. 95% intervals resample contexts within each fold. Needs
scikit-learn.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from transformers import AutoTokenizer

from align.judge.ratings import CORRELATIONS, correlation, rated_pairs
from align.runs.tables import markdown_table
from reward_models import load_reward_model, score_sequences

FOLDER = Path("outputs/ratings")
FOLDS = (1, 2, 3)
RESAMPLES = 300
MEASURES = (*CORRELATIONS, "pair accuracy")

Row = dict[str, object]
Predictions = list[
    tuple[np.ndarray, np.ndarray]
]  # of each run or rater: scores [n], and the ratings [n] they are compared with


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / "data" / name).read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def scores(folder: Path, rows: list[Row]) -> np.ndarray:
    """Scores [n] of a reward model of either kind."""
    model, tokenizer = load_reward_model(str(folder)).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        ids = torch.tensor([tokenizer(row["text"], row["text_pair"])["input_ids"]])
        found.append(float(score_sequences(model, ids, torch.ones_like(ids, dtype=torch.bool))))
    return np.array(found)


def words_alone(training: list[Row], judged: list[Row]) -> np.ndarray:
    """Ridge regression of the rating on TF-IDF of the reply's word 1-2-grams and its log length."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit([row["text_pair"] for row in training])

    def features(rows: list[Row]) -> csr_matrix:
        lengths = [[np.log1p(len(row["text_pair"]))] for row in rows]
        return hstack([words.transform([row["text_pair"] for row in rows]), csr_matrix(lengths)]).tocsr()

    ridge = RidgeCV(alphas=np.logspace(-2, 2, 9)).fit(features(training), [row["rating"] for row in training])
    return ridge.predict(features(judged))


def measure(name: str, predictions: Predictions, fold: np.ndarray, prompts: np.ndarray, weights: np.ndarray) -> float:
    """One of `MEASURES`, the mean over the predictions."""
    found = []
    for values, ratings in predictions:
        if name in CORRELATIONS:
            parts = [fold == each for each in FOLDS]
            found += [np.mean([correlation(name, values[part], ratings[part], weights[part]) for part in parts])]
        else:
            right, places = rated_pairs(values, ratings, prompts)
            times = np.bincount(prompts, weights)[places]  # as often as the context, up to its number of replies
            found.append(np.average(right, weights=times / np.bincount(prompts)[places]))
    return float(np.mean(found))


def with_interval(score: Callable[[np.ndarray], float], fold: np.ndarray, prompts: np.ndarray, sign: str = "") -> str:
    """A measure of weights [n], with the 95% interval over contexts."""
    random, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        times = np.zeros(prompts.max() + 1)
        for each in FOLDS:
            mine = np.unique(prompts[fold == each])
            times += np.bincount(random.choice(mine, len(mine)), minlength=len(times))
        drawn.append(score(times[prompts]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return f"{score(np.ones(len(prompts))):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    held_out = {each: read(f"fold_{each}/held_out_ratings.jsonl") for each in FOLDS}
    rows = [row for each in FOLDS for row in held_out[each]]
    fold = np.repeat(FOLDS, [len(held_out[each]) for each in FOLDS])
    prompts = np.unique([row["text"] for row in rows], return_inverse=True)[1]
    ratings = np.array([row["rating"] for row in rows])
    runs = {
        kind: [
            np.concatenate([scores(FOLDER / f"{kind}_fold{each}_seed{seed}", held_out[each]) for each in FOLDS])
            for seed in args.seeds
        ]
        for kind in ("ratings", "pairs")
    }
    words = np.concatenate([words_alone(read(f"fold_{each}/ratings.jsonl"), held_out[each]) for each in FOLDS])
    lengths = np.array([float(len(row["text_pair"])) for row in rows])
    predictors: dict[str, Predictions] = {
        **{f"{kind}, seed {seed}": [(found, ratings)] for kind in runs for seed, found in zip(args.seeds, runs[kind], strict=True)},
        **{kind: [(found, ratings) for found in runs[kind]] for kind in runs},
        "words alone": [(words, ratings)],
        "length": [(lengths, ratings)],
    }  # fmt: skip
    if all(row["raters"] for row in rows):
        raters = np.array([row["raters"] for row in rows])  # [n, raters]
        predictors["a rater, by the others' mean"] = [
            (raters[:, one], np.delete(raters, one, axis=1).mean(axis=1)) for one in range(raters.shape[1])
        ]
    table = [
        [title, *(with_interval(lambda w, n=name, p=found: measure(n, p, fold, prompts, w), fold, prompts) for name in MEASURES)]
        for title, found in predictors.items()
    ]  # fmt: skip
    for one, two in (("ratings", "pairs"), ("ratings", "words alone"), ("pairs", "words alone")):

        def less(weights: np.ndarray, name: str, one: str = one, two: str = two) -> float:
            first, second = (measure(name, predictors[each], fold, prompts, weights) for each in (one, two))
            return first - second

        found = [with_interval(lambda w, n=name: less(w, n), fold, prompts, "+") for name in MEASURES]
        table.append([f"{one} less {two}", *found])
    print(f"{len(rows)} replies to {prompts.max() + 1} contexts")
    print(markdown_table(["", *MEASURES], table))


if __name__ == "__main__":
    main()
