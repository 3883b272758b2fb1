"""The real PPO stage against the exact optimum of languages small enough to write out, by the functions of `align verify`.

J(pi) = E[score] - beta KL(pi || ref) has the optimum J* = beta log E_ref exp(score / beta). A wrong sign of score or
KL, a score on the wrong token, a mask that is off by one, and a temperature that one forward pass forgets all end
away from it. The enumeration is proven first, against numbers worked out without a model.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.cli import verify
from align.cli.verify_languages import (
    DENSE,
    LARGE,
    REWARDS,
    SMALL,
    SMALL_BY_VLLM,
    ExactResult,
    exact_result,
    optimal_logprobs,
    sine_table,
)
from tests.ranks import run_recipes
from tests.worlds import deepspeed_file

# J*, E*[score], KL(pi* || ref), P*(ends) of the small language: the table of logits sin(1 + 4 i + a), in plain Python.
OPTIMA = {
    0.1: (1.868755631, 2.297016151, 4.282605199, 0.992417381),
    0.25: (1.298833004, 2.037302546, 2.953878166, 0.953201281),
    0.5: (0.855737020401, 1.379801262, 1.048128484, 0.885226410),
    1.0: (0.554151778884, 0.909106658, 0.354954879, 0.782305698),
    2.0: (0.357156127, 0.575763517, 0.109303695, 0.684751655),
}
# With responses to a prompt, temperature, beta, and how many times the updates that `align verify` takes with GAE. At a
# lower temperature the gradient has more noise; three seeds of each end at divergences from 0.002 to 0.005.
ESTIMATORS = {"rloo": (4, 0.7, 0.5, 2), "grpo": (16, 1.0, 1.0, 1), "dr_grpo": (4, 1.0, 1.0, 1), "reinforce_plus_plus": (1, 1.0, 1.0, 1)}  # fmt: skip


def reward(name: str):
    namespace: dict = {}
    exec(REWARDS, namespace)
    return namespace[name]


def table_logprobs(temperature: float = 1.0) -> torch.Tensor:
    """log ref of every response of the small language, from the table alone, [1, 40]."""
    prefixes = [body for n in range(3) for body in itertools.product(range(3), repeat=n)]
    rows = dict(zip(prefixes, (sine_table(13, 4) / temperature).log_softmax(dim=1).tolist(), strict=True))
    found = [sum(rows[response[:t]][a] for t, a in enumerate(response)) for response in SMALL.responses()]
    return torch.tensor([found], dtype=torch.float64)


@pytest.fixture(scope="module")
def references() -> dict:
    return {language.name: language.reference() for language in (SMALL, LARGE, DENSE)}


class TestEnumeration:
    def test_every_response_is_there_once(self, references):
        for language, count in ((SMALL, 40), (LARGE, 1111), (DENSE, 1464)):
            responses, end = language.responses(), len(language.letters)
            assert len(set(responses)) == len(responses) == count
            for response in responses:
                assert end not in response[:-1]
                assert response[-1] == end or len(response) == language.length == 3
            total = language.logprobs(references[language.name]).exp().sum(dim=1)
            assert total.tolist() == pytest.approx([1.0] * len(language.prompts), abs=1e-6)

    def test_the_scores(self):
        score = dict(zip(SMALL.responses(), SMALL.scores(reward("letters"))[0].tolist(), strict=True))
        assert score[3,] == 0.3
        assert score[0, 0, 3] == 2.3
        assert score[0, 1, 2] == 1 - 0.5 - 1
        after = dict(zip(LARGE.prompts, LARGE.scores(reward("echo")).tolist(), strict=True))
        responses = LARGE.responses()
        assert after["a"][responses.index((10,))] == 0.5
        assert after["b"][responses.index((1, 1, 10))] == 4 - 0.5 + 0.5
        assert after["cd"][responses.index((3, 2, 3))] == 4 - 0.5
        assert after["cd"][responses.index((2, 2, 2))] == -1 - 0.5
        dense = DENSE.scores(reward("arbitrary"))
        assert [float(dense[0, 0]), float(dense[3, 700])] == pytest.approx([0.33058038243, -0.14103078659], abs=1e-9)

    def test_the_transformer_is_the_table(self, references):
        torch.testing.assert_close(SMALL.logprobs(references["small"]), table_logprobs(), atol=1e-5, rtol=0)
        torch.testing.assert_close(SMALL.logprobs(references["small"], 0.5), table_logprobs(0.5), atol=1e-5, rtol=0)

    def test_padding_changes_no_probability(self, references):
        """A response to a prompt, one forward pass for each, nothing padded."""
        responses = LARGE.responses()
        for prompt, found in zip(LARGE.prompts, LARGE.logprobs(references["large"]), strict=True):
            ids = [10, *map("abcdefghij".index, prompt)]
            for index in (0, 5, 60, 500):
                with torch.no_grad():
                    logits = references["large"](torch.tensor([[*ids, *responses[index]]])).logits[0]
                steps = logits.log_softmax(dim=1)[len(ids) - 1 : -1]
                wanted = sum(float(row[token]) for row, token in zip(steps, responses[index], strict=True))
                assert float(found[index]) == pytest.approx(wanted, abs=1e-5)

    def test_the_reference(self):
        p, score = table_logprobs().exp(), SMALL.scores(reward("letters"))
        mean = (p * score).sum()
        assert float(mean) == pytest.approx(0.113894573685, abs=1e-12)
        assert float((p * score**2).sum() - mean**2) == pytest.approx(1.073341, abs=1e-6)
        ends = torch.tensor([float(response[-1] == 3) for response in SMALL.responses()])
        assert float((p * ends).sum()) == pytest.approx(0.540590903, abs=1e-9)
        lengths = torch.tensor([float(len(response)) for response in SMALL.responses()])
        assert float((p * lengths).sum()) == pytest.approx(2.59141, abs=1e-5)

    @pytest.mark.parametrize("beta", OPTIMA)
    def test_the_optimum(self, beta):
        log_q, score = table_logprobs(), SMALL.scores(reward("letters"))
        log_best = optimal_logprobs(log_q, score, beta)
        ends = torch.tensor([float(response[-1] == 3) for response in SMALL.responses()])
        at_best = exact_result(log_best, log_q, score, beta)
        best = log_best.exp()
        found = (at_best.optimum, float((best * score).sum()), at_best.optimal_kl, float((best * ends).sum()))
        assert found == pytest.approx(OPTIMA[beta], abs=1e-9)
        assert at_best.reached == pytest.approx(at_best.optimum, abs=1e-12)
        assert at_best.kl == pytest.approx(at_best.optimal_kl, abs=1e-12)
        assert at_best.divergence == pytest.approx(0.0, abs=1e-12)
        assert at_best.normalised == pytest.approx(1.0, abs=1e-12)

    def test_its_likeliest_responses(self):
        best = optimal_logprobs(table_logprobs(), SMALL.scores(reward("letters")), 0.5)[0].exp()
        values, order = best.topk(5)
        assert [SMALL.responses()[i] for i in order] == [(0, 3), (0, 0, 3), (1, 0, 3), (0, 2, 3), (2, 0, 3)]
        assert values.tolist() == pytest.approx([0.41019, 0.23877, 0.09049, 0.05564, 0.03627], abs=5e-6)

    def test_the_reference_stands_at_zero(self):
        log_q, score = table_logprobs(), SMALL.scores(reward("letters"))
        at_start = exact_result(log_q, log_q, score, 0.5)
        assert at_start.normalised == at_start.kl == 0.0
        assert at_start.reached == at_start.reference == pytest.approx(0.113894573685, abs=1e-12)

    @pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
    def test_any_policy_misses_the_optimum_by_its_divergence(self, beta):
        score = LARGE.scores(reward("echo"))
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            log_p, log_q = (
                (3 * torch.randn(score.shape, generator=generator, dtype=torch.float64)).log_softmax(dim=1)
                for _ in range(2)
            )
            found = exact_result(log_p, log_q, score, beta)
            assert found.optimum - found.reached == pytest.approx(beta * found.divergence, abs=1e-11)
            assert found.divergence > 0
            assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()) / 3, abs=1e-11)

    def test_a_lost_response_is_noticed(self, tmp_path, monkeypatch):
        case = verify.write_case(tmp_path, SMALL, 0.5)
        shutil.copytree(case.recipe.sft_model_path, case.recipe.output_dir)
        verify.measure(case)
        responses = SMALL.responses()[:-1]
        monkeypatch.setattr(verify.Language, "responses", lambda self: responses)
        with pytest.raises(AssertionError, match="not every response was counted"):
            verify.measure(case)

    def test_vllms_languages_are_the_others_with_heads_of_a_size_that_it_computes(self):
        for mine, theirs in zip(verify.BY_VLLM, verify.LANGUAGES, strict=True):
            config = mine.reference().config
            assert config.hidden_size // config.num_attention_heads == 32
            assert (mine.name, mine.responses(), mine.reward) == (theirs.name, theirs.responses(), theirs.reward)
        torch.testing.assert_close(
            SMALL_BY_VLLM.logprobs(SMALL_BY_VLLM.reference()), table_logprobs(), atol=1e-5, rtol=0
        )


@pytest.fixture(autouse=True)
def forked(monkeypatch) -> None:
    """Ranks in place of the launcher."""
    monkeypatch.setattr(verify, "run_folder", run_recipes)


def reached(folder: Path, beta: float, num_gpus: int | None = None, **changes) -> ExactResult:
    """Where PPO on the small language ends."""
    case = verify.write_case(folder, SMALL, beta, **changes)
    verify.train(str(folder), [case], num_gpus)
    found = verify.measure(case)
    print(found, found.normalised)
    return found


class TestPPO:
    @pytest.mark.slow
    def test_align_verify(self, tmp_path):
        """Both languages at two values of beta, as a user starts it; a small processor has two minutes."""
        done = subprocess.run(
            [sys.executable, "-m", "align", "verify", "--json", tmp_path / "report.json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 of 4 passed" in done.stdout
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["passed"] is True
        for case in report["cases"]:
            print(case)
            assert case["passed"] is True
            assert case["normalised"] >= 0.98
            assert case["language"] == "large" or case["kl_to_optimum"] < 0.02
            gap = case["j_optimum"] - case["j"]
            assert gap == pytest.approx(case["beta"] * case["kl_to_optimum"], abs=1e-5)
            assert case["kl_of_optimum"] > 0.3  # not to be had by standing still
        assert [(case["language"], case["beta"]) for case in report["cases"]] == [
            (language, beta) for language in ("small", "large") for beta in (0.5, 1.0)
        ]

    def test_with_a_value_model(self, tmp_path):
        found = reached(tmp_path, 1.0)
        assert found.normalised >= 0.98
        assert found.divergence < 0.02

    @pytest.mark.parametrize(
        "estimator", [pytest.param(name, marks=() if name == "grpo" else pytest.mark.slow) for name in ESTIMATORS]
    )
    def test_every_estimator_without_a_value_model(self, tmp_path, estimator):
        """One at another temperature: sampling, reference and every training forward belong to one distribution."""
        num_generations, temperature, beta, times = ESTIMATORS[estimator]
        found = reached(
            tmp_path,
            beta,
            advantage_estimator=estimator,
            num_generations=num_generations,
            temperature=temperature,
            total_episodes=times * verify.UPDATES["small"] * verify.ROLLOUT,
        )
        assert found.normalised >= 0.98
        assert found.divergence < 0.02

    @pytest.mark.slow
    def test_two_ranks_at_zero_3(self, tmp_path):
        """One minibatch per rollout at twice the learning rates: four seeds end at divergences from 0.002 to 0.006.

        A pass costs DeepSpeed's hooks the same for any number of rows, so that this takes half the time of two minibatches.
        """
        found = reached(
            tmp_path,
            1.0,
            num_gpus=2,
            total_episodes=65 * verify.ROLLOUT,
            deepspeed=deepspeed_file(tmp_path / "zero3.json", 3, fetch_ahead=True),
            minibatch_size=verify.ROLLOUT,
            per_device_train_batch_size=verify.ROLLOUT // 2,
            learning_rate=2 * verify.SETTINGS["learning_rate"],
            value_learning_rate=2 * verify.SETTINGS["value_learning_rate"],
        )
        assert found.normalised >= 0.98
        assert found.divergence < 0.02


class TestVerdict:
    @pytest.mark.parametrize(
        ("language", "missing", "divergence", "passed"),
        [
            (SMALL, 0.019, 0.019, True),
            (SMALL, 0.021, 0.019, False),
            (SMALL, 0.019, 0.021, False),
            (LARGE, 0.019, 0.04, True),
            (LARGE, 0.021, 0.01, False),
        ],
    )
    def test_both_gates(self, language, missing, divergence, passed):
        found = ExactResult(1.0, 3.0 - 2 * missing, 3.0, divergence, 0.5, 0.5)
        assert found.normalised == pytest.approx(1 - missing)
        assert verify.Verdict(language, 1.0, found).passed is passed

    def test_an_untrained_policy_fails(self, monkeypatch, capsys):
        """The command as a whole, with a stage that returns the reference."""
        recipes = []

        def untrained(recipe):
            recipes.append(recipe)
            shutil.copytree(recipe.sft_model_path, recipe.output_dir)

        monkeypatch.setattr(verify, "run_ppo", untrained)
        assert verify.run(json_path="-", overrides=["--seed", "7"]) == 1
        report = json.loads(capsys.readouterr().out)
        assert report["passed"] is False
        for case in report["cases"]:
            assert case["normalised"] == pytest.approx(0.0, abs=1e-6)
            assert case["passed"] is False
        assert [recipe.seed for recipe in recipes] == [7] * 4
        assert not any(Path(recipe.output_dir).exists() for recipe in recipes)

        assert verify.run() == 1
        out = capsys.readouterr().out
        assert out.count("FAIL") == 4
        assert "0 of 4 passed" in out
        assert max(map(len, out.splitlines())) <= 140
        assert math.isclose(report["cases"][0]["j_optimum"], OPTIMA[0.5][0], abs_tol=1e-5)
