"""The bag-of-words baseline: a logistic regression on the words of the two responses, without the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.data.rows import Preference, is_tie, render_text
from align.evaluate.bootstrap import Floats
from align.judge.pairs import Outcomes

MAX_PAIRS = 20_000  # training pairs used; a seeded sample if there are more
FOLDS = 5

Pairs = list[tuple[str, str]]


def words_margins(
    rows: Sequence[Preference], outcomes: Outcomes, training: Sequence[Preference], seed: int
) -> tuple[Floats, str] | None:
    """Margins [n] that the bag-of-words model gives to the rows, and what it was fitted on; None if the data is too small.

    It is fitted on the training pairs. Without any, it is cross-validated on `rows`, in folds that share no prompt.
    """
    from sklearn.model_selection import GroupKFold

    judged = _response_texts(rows)
    if training:
        decided = [row for row in training if not is_tie(row)]
        if len(decided) > MAX_PAIRS:
            chosen = np.random.default_rng([seed, 5]).choice(len(decided), MAX_PAIRS, replace=False)
            decided = [decided[index] for index in sorted(chosen)]
        fitted = _fit_predict(_response_texts(decided), judged)
        return None if fitted is None else (fitted, f"{len(decided)} training pairs")
    if len(np.unique(outcomes.prompts)) < 2 * FOLDS:
        return None
    margins = np.zeros(len(rows))
    for fit, held_out in GroupKFold(FOLDS).split(judged, groups=outcomes.prompts):
        fitted = _fit_predict([judged[i] for i in fit if not outcomes.ties[i]], [judged[i] for i in held_out])
        if fitted is None:
            return None
        margins[held_out] = fitted
    return margins, f"the other folds of {FOLDS}, which share no prompt"


def _response_texts(rows: Sequence[Preference]) -> Pairs:
    return [(render_text(row.chosen), render_text(row.rejected)) for row in rows]


def _fit_predict(training: Pairs, judged: Pairs) -> Floats | None:
    """Margins [judged] of a logistic regression on differences of TF-IDF word 1-2-grams and of log length."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(training) < 2:
        return None
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        words.fit([text for pair in training for text in pair])
    except ValueError:  # no word occurs twice
        return None

    def differences(pairs: Pairs) -> Any:
        """Features of the chosen response minus those of the rejected one, [pairs, vocabulary + 1]."""
        chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
        lengths = [[np.log1p(len(a)) - np.log1p(len(b))] for a, b in pairs]
        return hstack([words.transform(chosen) - words.transform(rejected), csr_matrix(lengths)]).tocsr()

    x = differences(training)
    signs = np.where(np.arange(len(training)) % 2, 1, -1)  # half of the pairs are swapped, so that both classes occur
    model = LogisticRegression(max_iter=1000).fit(x.multiply(signs[:, None]).tocsr(), signs)
    margins: Floats = model.decision_function(differences(judged)) - model.intercept_
    return margins
