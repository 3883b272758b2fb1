"""The loops of PPO on an emulated device: nothing that a GPU would refuse, and limits on what makes a GPU wait.

Every limit is near what is counted now. A GPU starts a kernel in some five microseconds, and Python dispatches an operation in
as many, so that these counts are the time of a small model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.load import load_recipe
from align.generation.generate import END_INTERVAL
from align.ppo.train import run
from tests import ranks
from tests.emulated import worker
from tests.ppo.test_train import make_recipe, metrics

CPU = torch.device("cpu")
UPDATES, EPOCHS, MINIBATCHES, MICROBATCHES = 2, 3, 2, 2
ROLLOUTS, BATCHES = (
    5,
    8,
)  # of the self-checks (2 batches of 8), the updates (2 each), the evaluations of SFT model and policy (1)
CHECKED = 4  # microbatches of the self-checks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    recipe = make_recipe(folder, total_episodes=16 * UPDATES)
    done = ranks.run(
        worker.measure,
        recipe,
        str(folder / "found.json"),
        ranks=1,
        log=folder / "rank",
        env={"PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_tensors_of_two_devices_are_refused(found):
    assert found["mixed"].startswith("Expected all tensors to be on the same device, found emulated:0 and cpu")


def test_looking_for_ends_rarely_samples_the_same(found, folder):
    """Rows that have ended run along until the next look; on a CPU each token has one."""
    samples = torch.load(folder / "found.pt")
    for there, here in zip(samples["2"], worker.rollout(2, CPU), strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-5)
    assert len(set(samples["2"][1].sum(dim=1).tolist())) > 2, "rows end at different lengths"


def test_decoding_waits_once_in_many_tokens(found):
    for counts in found["decoding"].values():
        assert (
            counts["synchronizations"] <= 1 / END_INTERVAL + 3 / counts["steps"]
        )  # padding, and the length at the end


def test_operations_of_a_token(found):
    few, many = (found["decoding"][str(layers)] for layers in worker.LAYERS)
    for name, of_a_layer, of_a_token in (("kernels", 40, 72), ("operations", 82, 108)):
        each = (many[name] - few[name]) / 2
        assert each <= of_a_layer
        assert few[name] - 2 * each <= of_a_token


def test_a_gradient_is_added_in_one_kernel(found):
    assert found["bfloat16_sum"] == {"operations": 1, "kernels": 1, "synchronizations": 0}


class TestPPO:
    """The whole of `align ppo`, with self-checks, evaluations and checkpoints."""

    def test_it_computes_what_a_cpu_computes(self, found, folder):
        there = metrics(folder / "out")
        run(load_recipe("ppo", make_recipe(folder, total_episodes=16 * UPDATES, output_dir=str(folder / "cpu"))))
        for row, here in zip(there, metrics(folder / "cpu"), strict=True):
            assert row.keys() == here.keys()
            for name in row.keys() - {"time"}:
                if not name.startswith(("time/", "memory/")):
                    assert row[name] == pytest.approx(here[name], rel=2e-3, abs=1e-4), name

    @pytest.mark.parametrize(("phase", "waits", "kernels"), [("update_policy", 2, 450), ("update_value", 1, 400)])
    def test_a_microbatch(self, found, phase, waits, kernels):
        """It waits to strip padding, and to find the tokens of the policy loss; a step waits once, for the norm of its gradient."""
        steps = UPDATES * EPOCHS * MINIBATCHES
        count = steps * MICROBATCHES + CHECKED
        counts = found["ppo"]["phases"][phase]
        assert counts["synchronizations"] == waits * count + steps, found["ppo"]["places"]
        assert counts["kernels"] <= kernels * count

    def test_a_rollout(self, found):
        counts = found["ppo"]["phases"]["generate"]
        # Of each batch of 8: padding, ends, and the longest response, and of a rollout the longest once more.
        assert counts["synchronizations"] == 3 * BATCHES + ROLLOUTS, found["ppo"]["places"]
