"""A baseline for reward models: predict the preferred response from its words and length only.

    python recipes/hh-rlhf/words_only.py recipes/hh-rlhf/2_reward.yaml [--key value ...]

Logistic regression on differences of TF-IDF word 1-2-grams and of log length, on the same split as the reward stage
with the same recipe and overrides. It does not see the prompt. Needs scikit-learn.
"""

import sys

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from align.config.load import load_recipe
from align.data.load import DataSettings, load_rows
from align.data.rows import Preference, render_text
from align.evaluate.statistics import wilson_interval

recipe = load_recipe("reward", sys.argv[1], sys.argv[2:])
rows = load_rows(DataSettings.from_recipe(recipe), Preference)
train, held_out = (
    [(render_text(row.chosen), render_text(row.rejected)) for row in some] for some in (rows.train, rows.evaluation)
)
words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit([text for pair in train for text in pair])


def differences(pairs: list[tuple[str, str]]) -> csr_matrix:
    """Features of chosen less features of rejected, [pairs, vocabulary + 1]."""
    chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
    lengths = [[np.log1p(len(a)) - np.log1p(len(b))] for a, b in pairs]
    return hstack([words.transform(chosen) - words.transform(rejected), csr_matrix(lengths)]).tocsr()


x = differences(train)
signs = np.where(np.arange(len(train)) % 2, 1, -1)  # half of the pairs are swapped, so that both classes occur
model = LogisticRegression(max_iter=1000).fit(x.multiply(signs[:, None]).tocsr(), signs)
right = int((model.decision_function(differences(held_out)) > model.intercept_).sum())
low, high = wilson_interval(right, len(held_out))
print(
    f"{len(train)} training pairs; accuracy {right / len(held_out):.3f} [{low:.3f}, {high:.3f}] on {len(held_out)} held-out pairs"
)
