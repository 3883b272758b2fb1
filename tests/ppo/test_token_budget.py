"""`max_tokens_per_device`: passes that hold a number of tokens, and updates that do not depend on how a minibatch is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.engine.batch_plan import BatchPlan, pack_by_length
from align.errors import UserError
from tests import ranks
from tests.ppo.runs import ALONE
from tests.ppo.test_objectives import recipe_of
from tests.ppo.test_train import make_recipe
from tests.ppo.token_budget_worker import update, update_each
from tests.worlds import LETTERS, deepspeed_file, write_jsonl

BUDGET = 40
COMMON = {  # SGD, whose step is linear in the gradient: Adam's first step makes much of gradients that are rounding alone
    "optim": "sgd", "learning_rate": 0.1, "adam_epsilon": 1e-5, "rollout_batch_size": 16, "minibatch_size": 8,
    "max_prompt_length": 16, "response_length": 8, "per_device_train_batch_size": 8, "total_episodes": 16, "kl_coef": 0.1,
}  # fmt: skip
CASES = {
    "gae": {"num_ppo_epochs": 1, "value_learning_rate": 1.0, "entropy_coef": 0.1, "ptx_coef": 2.0, "ptx_batch_size": 6},
    "rloo": {"num_ppo_epochs": 1, "advantage_estimator": "rloo", "num_generations": 4},
    "trajectory_balance": {
        "num_ppo_epochs": 4,
        "objective": "trajectory_balance",
        "num_generations": 4,
        "gradient_steps": 2,
    },
    "path_consistency": {
        "num_ppo_epochs": 4,
        "objective": "path_consistency",
        "value_learning_rate": 1.0,
        "gradient_steps": 2,
    },
}


def case(folder: Path, name: str, **changes) -> str:
    """A recipe for prompts of 1 to 16 letters; the model is that of the other cases."""
    folder.mkdir()
    prompts = [{"prompt": (2 * LETTERS)[i : i + 1 + i * 7 % 16]} for i in range(16)]
    keys = {**COMMON, **CASES[name], "train_dataset": write_jsonl(folder / "letters.jsonl", prompts), **changes}
    if name == "gae":
        texts = [{"text": LETTERS[: 2 + i * 5 % 13]} for i in range(9)]
        keys["ptx_dataset"] = write_jsonl(folder / "texts.jsonl", texts)
    return make_recipe(folder, **keys)


def test_rows_are_packed_by_length():
    lengths = [3, 9, 4, 4, 10, 1, 2]
    assert pack_by_length(range(7), lengths, 20) == [[4, 1], [2, 3, 0, 6, 5]]  # 2 x 10 and 5 x 4 tokens
    assert pack_by_length(range(7), lengths, 19) == [[4], [1, 2], [3, 0, 6, 5]]  # 1 x 10, 2 x 9, 4 x 4
    assert pack_by_length(range(7), lengths, 20, 4) == [[4], [1], [2, 3], [0, 6, 5]]  # of equals the first is halved
    assert pack_by_length([1, 5], lengths, 8) == [[1], [5]]  # a row that is too long is alone


def test_all_processes_have_equally_many_passes():
    plan = BatchPlan(2, 6, 1, 3, max_tokens=12)
    # Dealt out in order of length: 3 5 7 and 4 6 12.
    assert plan.passes([12, 3, 4, 6, 7, 5]) == [[[4], [5, 1]], [[0], [3, 2]]]
    # 3 4 4 and 4 4 12: the first fits into one pass, and takes two nevertheless.
    assert plan.passes([4, 4, 4, 4, 12, 3]) == [[[1], [3, 5]], [[4], [0, 2]]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Path:
    """Weights after an update of each case with a pass for each response, on one process."""
    folder = tmp_path_factory.mktemp("budget")
    for name in CASES:
        path = case(folder / name, name, per_device_train_batch_size=1)
        assert update(path, ALONE, folder / name)["policy/padding"] == 0.0
    return folder


def assert_weights(got: Path, expected: Path) -> None:
    for file in expected.glob("*.safetensors"):
        ours, theirs = load_file(got / file.name), load_file(file)
        start = load_file(expected / "policy" / "model.safetensors")
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-6, atol=1e-6)
        assert max(float((theirs[name] - start.get(name, 0.0)).abs().max()) for name in theirs) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_an_update_does_not_depend_on_the_budget(expected, tmp_path, name):
    whole = update(case(tmp_path / "whole", name), ALONE, tmp_path / "whole")
    changes = {"per_device_train_batch_size": 8, "max_tokens_per_device": BUDGET}
    budget = update(case(tmp_path / "budget", name, **changes), ALONE, tmp_path / "budget")
    for each in ("whole", "budget"):
        assert_weights(tmp_path / each, expected / name)
    assert 0.0 < budget["policy/padding"] < 0.6 * whole["policy/padding"]


@pytest.mark.parametrize("names", [["gae"], pytest.param([*CASES][1:], marks=pytest.mark.slow)])
def test_nor_on_the_ranks(expected, tmp_path, names):
    """Of which one may have more to pack than the other."""
    folders = {}
    for name in names:
        for stage in (0, 3):
            file = deepspeed_file(tmp_path / f"zero{stage}.json", stage, fetch_ahead=True)
            folder = tmp_path / f"{name}-{stage}"
            folders[case(folder, name, deepspeed=file, max_tokens_per_device=BUDGET)] = folder
    done = ranks.run(update_each, folders, ranks=2, log=tmp_path / "rank")
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in folders.values():
        assert_weights(folder, expected / folder.name.rpartition("-")[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens_per_device": 23}, r"max_tokens_per_device: expected at least max_prompt_length \+ response_length \(24\), .* got 23"),
        ({"max_tokens_per_device": 24, "per_device_train_batch_size": 4}, "per_device_train_batch_size: .*leave one of them out"),
        ({"use_dynamic_bsz": True}, "called max_tokens_per_device here"),
    ],
)  # fmt: skip
def test_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        recipe_of(tmp_path, **{**COMMON, **changes})
