"""Benchmarks score as their own code does: numbers by hand, equal scores, detection, bad rows."""

from __future__ import annotations

import numpy as np
import pytest

from align.errors import UserError
from align.judge import benchmark_scores as published
from align.judge import benchmarks as b
from align.judge.rows import render_text


class ByText:
    """Scores that the responses say of themselves."""

    def score(self, rows, responses):
        return np.array([float(render_text(each)) for each in responses])


def scored(rows, chat=True) -> dict:
    return b.score_benchmark(b.read_benchmark("f", [(f"f:{i}", row) for i, row in enumerate(rows, 1)]), ByText(), chat)


def test_reward_bench_weights_subsets_by_published_counts():
    def row(subset, right):
        return {"prompt": "p", "chosen": "1", "rejected": "0" if right else "1", "subset": subset, "id": 1}

    rows = [row("math-prm", True), row("hep-cpp", False), row("hep-cpp", True), row("mt-bench-hard", False)]
    found = scored(rows)
    assert found["benchmark"] == "RewardBench"
    assert found["parts"]["Reasoning"] == pytest.approx((984 * 1 + 164 * 0.5) / (984 + 164))
    assert found["parts"]["Chat Hard"] == 0, "equal scores are wrong"
    assert found["overall"] == pytest.approx(found["parts"]["Reasoning"] / 2)
    assert sum(published.COUNTS.values()) == 2985 + 984 - 447  # the published set has 2,985 rows
    assert {name for names in published.SECTIONS.values() for name in names} == published.COUNTS.keys()


def test_reward_bench_2():
    assert published.best_of([0.7], [0.7, 0.1, 0.2]) == 0.5
    assert published.best_of([0.7], [0.8, 0.1, 0.2]) == 0
    ties = {"ref:1": ([0.9], [0.2]), "tied:1": ([0.8, 0.7], [0.3])}
    assert published.ties_score(ties) == pytest.approx(1.00995, abs=1e-5)
    near = {**ties, "ref:1": ([0.25], [0.2])}  # its gap is below the spread of the tied
    assert published.ties_score(near) == pytest.approx(0.8 + 0.01 * np.tanh(0.05 / 0.1 - 1))
    assert published.ties_score({"ref:1": ([1.0], [0.0]), "tied:1": ([1.0, 1.0], [1.0])}) == pytest.approx(
        0.3
    )  # 0 / 0 adds 0
    row = {"prompt": "p", "num_correct": 1, "total_completions": 4, "subset": "Math", "id": "1"}
    tied = {**row, "subset": "Ties", "chosen": [".8", ".7"], "rejected": [".3"], "id": "tied:1"}
    reference = {**row, "subset": "Ties", "chosen": [".9"], "rejected": [".2"], "id": "ref:1"}
    found = scored([{**row, "chosen": [".7"], "rejected": [".7", ".1", ".2"]}, reference, tied])
    assert found["parts"] == {"Math": 0.5, "Ties": pytest.approx(1.00995, abs=1e-5)}
    assert found["overall"] == pytest.approx((0.5 + 1.00995) / 2, abs=1e-5)


def test_rm_bench():
    row = {"id": "1", "prompt": "p", "chosen": ["1", "2", "3"], "rejected": [".5", "1.5", "2.5"]}
    best = {"id": "2", "prompt": "p", "chosen": ["9"] * 3, "rejected": ["0"] * 3}
    found = scored(
        [{**row, "domain": "chat"}, {**row, "domain": "safety-refuse"}, {**best, "domain": "safety-response"}]
    )
    assert found["parts"]["chat"] == pytest.approx(2 / 3)
    assert found["parts"]["safety"] == pytest.approx((2 / 3 + 1) / 2), "the two safety domains are one"
    assert found["levels"] == pytest.approx({"hard": 0.25, "normal": 1.0, "easy": 1.0})


def test_judge_bench_counts_equal_scores_as_wrong():
    def row(a, second, label):
        return {
            "pair_id": "1",
            "question": "q",
            "response_A": a,
            "response_B": second,
            "label": label,
            "source": "mmlu-pro-law",
        }

    found = scored(
        [row("1", "0", "A>B"), row("1", "0", "B>A"), row("1", "1", "A>B"), row("1", "1", "B>A"), row("0", "1", "B>A")],
        chat=False,
    )
    assert (found["overall"], found["parts"]) == (0.4, {"mmlu-pro": 0.4})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "expected the columns of RewardBench"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "nosuch"},
            "f:1: no text .* unknown `subset` 'nosuch'",
        ),
        ({"prompt": "p", "chosen": ["a"], "rejected": ["b"], "domain": "chat"}, "f:1: no three `chosen`"),
        ({"question": "q", "response_A": "a", "response_B": "b", "label": "A"}, "f:1: .*`label` A>B or B>A"),
        (
            {"prompt": "p", "chosen": ["a"], "rejected": ["b"], "num_correct": 1, "subset": "Ties", "id": "7"},
            "f:1: an `id` '7' of Ties",
        ),
        ("text", "f:1: expected a mapping"),
    ],
)
def test_bad_rows(row, said):
    with pytest.raises(UserError, match=said):
        b.read_benchmark("f", [("f:1", row)])


def test_a_later_row_of_other_types():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "alpacaeval-easy", "id": 1}
    with pytest.raises(UserError, match=r"f:2: no text .* unknown `subset` \['alpacaeval-easy'\]"):
        b.read_benchmark("f", [("f:1", row), ("f:2", {**row, "subset": ["alpacaeval-easy"]})])
