"""Exact match and token F1 of answers, as the official script of SQuAD 2.0 defines them (arXiv 1806.03822).

Answers are compared in lower case, without ASCII punctuation, the articles a, an, the, and extra white space. Of several
gold answers the best counts. A question without gold answers has the answer "".
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """The text as answers are compared."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, gold: Sequence[str]) -> float:
    """1 if the prediction equals a gold answer, else 0."""
    return _best(lambda said, true: float(said == true), prediction, gold)


def token_f1(prediction: str, gold: Sequence[str]) -> float:
    """The greatest F1 of the words of prediction and gold answer, as multisets; without words in one, 1 if in neither."""
    return _best(_f1, prediction, gold)


def _best(score: Callable[[str, str], float], prediction: str, gold: Sequence[str]) -> float:
    answers = [answer for answer in map(normalize_answer, gold) if answer] or [""]
    return max(score(normalize_answer(prediction), answer) for answer in answers)


def _f1(prediction: str, gold: str) -> float:
    said, true = prediction.split(), gold.split()
    if not said or not true:
        return float(said == true)
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true))
