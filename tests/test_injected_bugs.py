"""Bugs that PPO implementations are known for, put into a copy of the code one by one: each makes a named test fail.

A test that nothing can make fail proves nothing. Each of the tests named here runs twice: as part of the suite, on the
code as it is, and here, on a copy with one line broken, in a fork of a process that has imported nothing of ours.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import ranks

ROOT = Path(__file__).parents[1]

# bug: (file, the line as it is, the line broken, the test that must fail)
BUGS = {
    "the score one slot late": (
        "align/maths/advantages.py",
        "rewards.scatter_add(1, last_index(mask)[:, None], scores[:, None])",
        "rewards.scatter_add(1, (last_index(mask)[:, None] + 1).clamp(max=mask.shape[1] - 1), scores[:, None])",
        "tests/maths/test_maths.py::TestTokenRewards::test_score_lands_on_the_last_real_token_whatever_the_length",
    ),
    "the score on every token": (
        "align/maths/advantages.py",
        "rewards.scatter_add(1, last_index(mask)[:, None], scores[:, None])",
        "rewards + scores[:, None] * mask",
        "tests/maths/test_maths.py::TestTokenRewards::test_score_lands_on_the_last_real_token_whatever_the_length",
    ),
    "the sign of the KL": (
        "align/maths/advantages.py",
        "(-kl_coef * kl)",
        "(kl_coef * kl)",
        "tests/maths/test_maths.py::TestTokenRewards::test_each_row_sums_to_score_minus_kl",
    ),
    "k3 in the reward": (
        "align/ppo/step.py",
        "kl = k1(rollout.old_logprobs, rollout.ref_logprobs)",
        "kl = __import__('align.maths.kl').maths.kl.k3(rollout.old_logprobs, rollout.ref_logprobs)",
        "tests/ppo/test_objectives.py::TestScores::test_clipping_leaves_the_kl_alone",
    ),
    "the KL of a token clamped at 0": (
        "align/ppo/step.py",
        "kl = k1(rollout.old_logprobs, rollout.ref_logprobs)",
        "kl = k1(rollout.old_logprobs, rollout.ref_logprobs).clamp(min=0)",
        "tests/ppo/test_objectives.py::TestScores::test_clipping_leaves_the_kl_alone",
    ),
    "no temperature in the training forward": (
        "align/ppo/update.py",
        "ids, mask, length, recipe.temperature, objective)",
        "ids, mask, length, 1.0, objective)",
        "tests/ppo/test_train.py::TestOneProcess::test_the_first_ratio_of_every_update_is_one_and_the_first_kl_zero",
    ),
    "no temperature in sampling": (
        "align/generation/sampling.py",
        "        scaled = scaled / temperature\n    rows, vocabulary",
        "        pass\n    rows, vocabulary",
        "tests/generation/test_generate.py::test_sampling_follows_the_tempered_distribution",
    ),
    "log-probabilities one token late": (
        "align/models/forward.py",
        "(columns >= first - 1) & (columns < sizes - 1)",
        "(columns >= first) & (columns < sizes)",
        "tests/generation/test_generate.py::test_generation_knows_the_log_probability_of_what_it_sampled",
    ),
    "values one token late": (
        "align/models/forward.py",
        "return scatter_to_mask(all_logits(model, stripped)[indices, 0], mask[:, -length:])",
        "return scatter_to_mask(all_logits(model, stripped)[indices + 1, 0], mask[:, -length:])",
        "tests/generation/test_generate.py::test_values_judge_the_state_before_each_token",
    ),
    "end-of-text outside the mask": (
        "align/generation/generate.py",
        "        looks = passes % interval == 0\n",
        "        looks = passes % interval == 0\n        mask[rows[~alive], places[~alive] - 1] = False\n",
        "tests/generation/test_generate.py::test_responses_are_what_the_training_forward_would_sample",
    ),
    "whitening over the padding": (
        "align/maths/masked.py",
        "    mean = masked_mean(values, mask)\n",
        "    mask = torch.ones_like(mask)\n    mean = masked_mean(values, mask)\n",
        "tests/maths/test_maths.py::TestMasked::test_whitening",
    ),
    "whitening advantages over the padding": (
        "align/ppo/step.py",
        "return masked_whiten(advantages, mask), returns",
        "return masked_whiten(advantages, torch.ones_like(mask)), returns",
        "tests/ppo/test_objectives.py::TestScores::test_advantages_are_white_over_the_real_tokens",
    ),
    "advantages flow through the padding": (
        "align/maths/advantages.py",
        "    values = values.masked_fill(~mask, 0.0)\n    advantages",
        "    advantages",
        "tests/maths/test_maths.py::TestGAE::test_what_lies_in_the_padding_does_not_matter",
    ),
    "dropout left on": (
        "align/models/dropout.py",
        "            module.p = 0.0",
        "            pass",
        "tests/generation/test_generate.py::test_dropout_is_off_in_training_mode",
    ),
    "stale old log-probabilities": (
        "align/ppo/sample.py",
        'in_passes("score_policy", logprobs, models.policy) if recompute else samples.logprobs',
        'in_passes("score_policy", logprobs, models.reference)',
        "tests/ppo/test_train.py::TestOneProcess::test_the_first_ratio_of_every_update_is_one_and_the_first_kl_zero",
    ),
    "a mean per microbatch": (
        "align/ppo/update.py",
        "run.models.value.backward(value.loss.sum() / tokens)",
        "run.models.value.backward(value.loss.sum() / batch.mask.sum())",
        "tests/ppo/test_train.py::TestOneProcess::test_microbatches_do_not_change_the_curve",
    ),
    "the weights of a microbatch instead of a minibatch": (
        "align/ppo/update.py",
        "batch = minibatch.rows(to_device(torch.tensor(part), device))",
        "batch = minibatch.rows(to_device(torch.tensor(part), device)); batch.weights = batch.mask / batch.mask.sum()",
        "tests/ppo/test_objectives.py::TestLossTerms::test_the_gradient_does_not_depend_on_the_cut",
    ),
    "PPO-ptx as a step of its own": (
        "align/ppo/update.py",
        "                sums |= policy_gradient(run, batch, tokens) if",
        "                if texts:\n                    ptx_gradient(run, texts)\n                    run.models.policy.step(1e-3)\n                sums |= policy_gradient(run, batch, tokens) if",
        "tests/ppo/test_objectives.py::TestLossTerms::test_ptx_is_added_to_the_same_step",
    ),
    "the zero of the score left out of the value head": (
        "align/ppo/setup.py",
        'head.bias.sub_(getattr(value.config, "score_mean", 0.0))',
        "head.bias.sub_(0.0)",
        "tests/ppo/test_rewards.py::test_the_value_of_the_last_token_starts_as_the_score",
    ),
    "the KL of a token where that of a response belongs": (
        "align/ppo/step.py",
        "kl = float(response_kl(rollout, recipe.one_step_off_policy).mean())",
        "kl = float(response_kl(rollout, recipe.one_step_off_policy).mean() / rollout.lengths.float().mean())",
        "tests/ppo/test_objectives.py::TestSchedule::test_the_coefficient_adapts_to_the_kl_of_each_update",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_it_is_noticed(bug, tmp_path):
    file, line, broken, test = BUGS[bug]
    tree = tmp_path / "tree"
    for folder in ("align", "reward_models", "tests"):
        shutil.copytree(ROOT / folder, tree / folder)
    shutil.copy(ROOT / "pyproject.toml", tree)
    text = (tree / file).read_text(encoding="utf-8")
    assert text.count(line) == 1, "the line is not there any more: follow it"
    shutil.rmtree((tree / file).parent / "__pycache__", ignore_errors=True)
    (tree / file).write_text(text.replace(line, broken), encoding="utf-8")
    done = ranks.run(fail, test, ranks=1, root=tree, cwd=tree, log=tmp_path / "fork")
    assert done.returncode == 1, f"{test} does not notice {bug}:\n{done.stdout[-2000:]}{done.stderr[-1000:]}"
    assert f"FAILED {test}" in done.stdout or f"ERROR {test}" in done.stdout  # a self-check may stop the run before
    found = json.loads((tree / "found.json").read_text())
    assert set(found["errors"]) <= {"AssertionError", "UserError"}, f"{test} fails for another reason:\n{done.stdout}"
    imported = {path for path in map(Path, found["imported"]) if ROOT in path.parents or tree in path.parents}
    assert tree / file in imported
    assert not [path for path in imported if tree not in path.parents]


class Errors:
    """A plugin for pytest: the types of the exceptions that tests and fixtures raised."""

    def __init__(self) -> None:
        self.types: list[str] = []

    def pytest_exception_interact(self, call: pytest.CallInfo) -> None:
        self.types.append(call.excinfo.typename)


def fail(test: str) -> int:
    """Run one test in this process, a fork that has imported nothing of ours but the copy; pytest's exit code."""
    errors = Errors()
    words = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--basetemp", "../temporary", test]
    code = pytest.main(words, plugins=[errors])
    del sys.modules["libraries"]  # which the server of forks has imported
    imported = [str(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
    Path("found.json").write_text(json.dumps({"errors": errors.types, "imported": imported}))
    return code
