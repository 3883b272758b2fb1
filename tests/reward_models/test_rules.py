"""Numeric answers: what is the final number of a text, and every gold answer of GSM8K against itself."""

from __future__ import annotations

import gzip
import json
from fractions import Fraction
from pathlib import Path

import pytest

from align.config.functions import resolve_function
from reward_models.functions import FunctionReward
from reward_models.responses import Responses
from reward_models.rules import final_number, numeric_answer

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl.gz"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("72", 72),
        ("So 48 + 24 = 72.", 72),
        ("She pays $1,234.50.", Fraction("1234.5")),
        ("1,234,567", 1234567),
        ("rows 1,2,34", 34),  # a list, not a number
        ("12,5", 5),
        ("-5", -5),
        ("the change is -$5", -5),
        ("the change is $-5", -5),
        ("\N{MINUS SIGN}5", -5),
        ("8-5", 5),  # what stands between is a subtraction or a range
        ("(8)-5", 5),
        ("30%-5", 5),
        ("= -5", -5),
        ("- 5 apples", 5),  # an item of a list
        ("50%", 50),
        (".5", Fraction(1, 2)),
        ("0.50", Fraction(1, 2)),
        ("3/4 of it", Fraction(3, 4)),
        ("3/0", 3),
        ("#### 10 apples, not 3", 10),
        ("#### 3\nor rather #### 10", 10),
        ("5 + 5 #### ten", None),
        ("5\n####", None),
        ("none", None),
        ("", None),
        ("$", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


def test_equal_numbers_in_other_spelling_and_wrong_ones():
    for spelling in ("#### 1000", "1,000", "$1,000.00", "It is 1000%.", "= 1000.", "2000/2"):
        assert numeric_answer(completions=[spelling], answer=["1000"]) == [1.0]
    for wrong in ("#### 1001", "100", "-1000", "1.000", "1000 less 1", "a thousand", ""):
        assert numeric_answer(completions=[wrong], answer=["1000"]) == [0.0]


def test_the_reference_is_the_answer_else_the_completion():
    assert numeric_answer(["5", "5"], answer=["5", 6], completion=["#### 6", "#### 5"]) == [1.0, 0.0]
    assert numeric_answer(["5", "5"], completion=["2 + 3\n#### 5", "#### 6"], prompts=["a", "b"]) == [1.0, 0.0]
    assert numeric_answer(["5"], answer=["five"]) == [None]
    with pytest.raises(ValueError, match="expected a column `answer` or `completion`"):
        numeric_answer(["5"], prompts=["1"])


def test_messages():
    said = [{"role": "assistant", "content": "It is 5."}]
    assert numeric_answer([said], completion=[[{"role": "assistant", "content": "#### 5"}]]) == [1.0]


def test_as_a_reward_of_ppo():
    """PPO calls it with token ids and all columns of the data."""
    function = resolve_function("reward_models.rules:numeric_answer", "reward_funcs")
    columns = {"completion": ["#### 5", "#### 6"], "answer": ["5", "6"], "orig": [{}, {}]}
    batch = Responses(["a", "b"], ["5", "5"], ["5", "5"], [[1], [1]], [[3], [3]], columns)
    assert FunctionReward("numeric_answer", function).score(batch).tolist() == [1.0, 0.0]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not there")
def test_gsm8k():
    """Each gold solution gets 1 against its own answer, in the spellings that models use, and 0 one off."""
    with gzip.open(GSM8K, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    answers, solutions = [row["answer"] for row in rows], [row["completion"] for row in rows]
    assert len(rows) == 7473
    right = [1.0] * len(rows)
    assert numeric_answer(solutions, answer=answers) == right
    assert numeric_answer(solutions, completion=solutions) == right
    assert numeric_answer([row["orig"]["answer"] for row in rows], completion=solutions) == right
    gold = [Fraction(answer.replace(",", "").replace("$", "")) for answer in answers]
    assert [final_number(solution) for solution in solutions] == gold
    for spelling in ("The answer is ${:,.2f}.", "#### {:f}", "{:,.1f}%", "That makes\n{:.2f} in all"):
        exact = [spelling.format(float(number)) for number in gold]
        assert numeric_answer(exact, answer=answers).count(1.0) >= 0.999 * len(rows)  # some are cut to few places
        off = [spelling.format(float(number) + 1) for number in gold]
        assert numeric_answer(off, answer=answers) == [0.0] * len(rows)
