"""A baseline for classifiers: predict the label from a bag of words.

    python recipes/textbooks/words_only.py recipes/textbooks/1_classify.yaml [--key value ...]

Logistic regression on the TF-IDF of word 1-2-grams, on the same rows as the classify stage with the same recipe and
overrides, and evaluated in the same way. Regularization and class weights are chosen by five-fold cross-validation on
the training rows. Needs scikit-learn.
"""

import sys

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from torch.nn.functional import one_hot

from align.config.load import load_recipe
from align.data.load import DataSettings, load_rows
from align.data.rows import Labelled
from align.encoders import label_metrics
from align.encoders.labels import find_labels
from align.runs.tables import markdown_table

recipe = load_recipe("classify", sys.argv[1], sys.argv[2:])
rows = load_rows(DataSettings.from_recipe(recipe), Labelled)
labels = find_labels(rows.train, rows.evaluation, recipe.problem_type)
(train, train_ids), (held_out, true) = (
    ([row.text for row in some], [labels.encode(row) for row in some]) for some in (rows.train, rows.evaluation)
)
words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000))
settings = {"logisticregression__C": [10, 100, 1000], "logisticregression__class_weight": [None, "balanced"]}
search = GridSearchCV(words, settings, scoring="accuracy").fit(train, train_ids)
answers = one_hot(torch.tensor(search.predict(held_out)), len(labels.names)).float()
targets, weight = torch.tensor(true), torch.ones(len(true))
counts = label_metrics.counts(labels, answers, targets, weight)
measures = label_metrics.summarize(
    labels, counts, float(label_metrics.correct(labels, answers, targets).sum()), len(true)
)
print(f"{len(train)} training rows, {len(true)} held out, {search.best_params_}")
for name in ("accuracy", "macro_f1"):
    print(f"{name} {measures[name]:.3f} [{measures[f'{name}_low']:.3f}, {measures[f'{name}_high']:.3f}]")
print(markdown_table(label_metrics.LABEL_COLUMNS, label_metrics.per_label_table(labels, counts)))
