"""The loops of PPO on an emulated device: nothing that a GPU would refuse, and limits on what makes a GPU wait.

Every limit is near what is counted now. A GPU starts a kernel in some five microseconds, and Python dispatches an operation in
as many, so that these counts are the time of a small model.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from align.config.load import load_recipe
from align.generation.generate import END_INTERVAL
from tests import ranks
from tests.emulated import worker
from tests.ppo.test_train import make_recipe, metrics
from tests.worlds import LETTERS, write_jsonl

CPU = torch.device("cpu")
UPDATES, EPOCHS, MINIBATCHES, MICROBATCHES = 2, 3, 2, 2
# Of the self-checks (16 responses of 8 tokens by batches of 8), the updates (16 each), the evaluations of SFT model and policy (5).
ROLLOUTS, LOOKS = 5, 2 + 2 * 2 + 2
CHECKED = 4  # microbatches of the self-checks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def recipes(folder: Path, name: str) -> dict[str, str]:
    """A short recipe of each stage, whose outputs go to the folder `name`."""
    ppo = make_recipe(folder, total_episodes=16 * UPDATES, output_dir=str(folder / name / "ppo"))
    letters = [LETTERS[i : i + 1 + i % 4] for i in range(16)]
    rows = {
        "sft": [{"prompt": text, "completion": "defgh"[i % 4 :]} for i, text in enumerate(letters)],
        "reward": [
            {"prompt": text, "chosen": "defgh"[i % 4 :], "rejected": "xyz"[i % 2 :]} for i, text in enumerate(letters)
        ],
    }
    paths = {"ppo": ppo}
    for stage in ("sft", "reward"):
        keys = {
            "stage": stage, "model_name_or_path": str(folder / "policy"), "output_dir": str(folder / name / stage),
            "train_dataset": write_jsonl(folder / f"{stage}.jsonl", rows[stage]), "train_batch_size": 8,
            "eval_dataset": write_jsonl(folder / f"{stage}-eval.jsonl", [{**row, "prompt": "zz"} for row in rows[stage][:4]]),
            "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-3, "logging_steps": 1,
            **({"response_length": 4, "normalize_prompts": 4} if stage == "reward" else {}),
        }  # fmt: skip
        paths[stage] = str(folder / f"{name}-{stage}.yaml")
        Path(paths[stage]).write_text(yaml.safe_dump(keys))
    return paths


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    path = folder / "found.json"
    settings = {"log": folder / "rank", "env": {"PYTHONPATH": str(folder), "HF_DEACTIVATE_ASYNC_LOAD": "1"}}
    done = ranks.run(worker.measure, recipes(folder, "there"), str(path), ranks=1, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def test_tensors_of_two_devices_are_refused(found):
    assert found["mixed"].startswith("Expected all tensors to be on the same device, found emulated:0 and cpu")


def test_weights_are_loaded_onto_the_device(found, folder):
    """None stays on the host, where each process would hold a copy."""
    weights = AutoModelForCausalLM.from_pretrained(folder / "policy").parameters()
    assert found["loaded"] == {"emulated:0": sum(4 * weight.numel() for weight in weights)}


def test_looking_for_ends_rarely_samples_the_same(found, folder):
    """Rows that have ended run along until the next look; on a CPU each token has one."""
    samples = torch.load(folder / "found.pt")
    for name in ("2", "refilled", "captured"):
        for there, here in zip(samples[name], worker.rollout(2, CPU), strict=True):
            torch.testing.assert_close(there, here, rtol=0, atol=1e-5)
    assert len(set(samples["2"][1].sum(dim=1).tolist())) > 2, "rows end at different lengths"


def test_decoding_waits_once_in_many_tokens(found):
    for counts in found["decoding"].values():
        assert (
            counts["synchronizations"] <= 1 / END_INTERVAL + 3 / counts["steps"]
        )  # padding, and the length at the end


def test_taking_the_places_of_ended_rows_waits_for_nothing(found):
    counts = found["refilled"]
    assert (
        counts["synchronizations"] <= counts["passes"] / END_INTERVAL + 2
    )  # lengths of prompts, and the longest response


def test_a_captured_step_leaves_little_to_python(found):
    """Choosing a token, and writing where the graph reads; the model's layers are in the graph."""
    outside, replays, captures = (found["captured"][name] for name in ("outside", "replays", "captures"))
    assert captures["synchronizations"] == replays["synchronizations"] == 0
    assert replays["calls"] > 3 * captures["calls"]
    assert outside["operations"] <= 100 * replays["calls"]


def test_operations_of_a_token(found):
    few, many = (found["decoding"][str(layers)] for layers in worker.LAYERS)
    for name, of_a_layer, of_a_token in (("kernels", 40, 72), ("operations", 82, 108)):
        each = (many[name] - few[name]) / 2
        assert each <= of_a_layer
        assert few[name] - 2 * each <= of_a_token


def test_a_gradient_is_added_in_one_kernel(found):
    assert found["bfloat16_sum"] == {"operations": 1, "kernels": 1, "synchronizations": 0}


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_whole_stage_computes_what_a_cpu_computes(found, folder, stage):
    """With evaluations, checkpoints and PPO's self-checks. `found` is made first: the device refuses tensors of two devices."""
    run = importlib.import_module(f"align.{stage}.train").run
    run(load_recipe(stage, recipes(folder, "here")[stage]))
    for there, here in zip(*(metrics(folder / name / stage) for name in ("there", "here")), strict=True):
        assert there.keys() == here.keys()
        for name in here.keys() - {"time"}:
            if not name.startswith(("time/", "memory/")):
                assert there[name] == pytest.approx(here[name], rel=2e-3, abs=1e-4), name


@pytest.mark.parametrize(("stage", "waits"), [("sft", 167), ("reward", 261)])
def test_a_stage_of_trl(found, stage, waits):
    """Two steps of two microbatches and two evaluations. Most of the waits are TRL's, for metrics; two are for each loaded weight."""
    assert found[stage]["all"]["synchronizations"] <= waits, found[stage]["places"]


class TestPPO:
    """Of the whole of `align ppo`."""

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
        # Of each 8 passes the ends; of a rollout the lengths of its prompts, the longest response, twice, end tokens, and the
        # prompts, their mask and the noise on their way to the device.
        assert counts["synchronizations"] == LOOKS + 7 * ROLLOUTS, found["ppo"]["places"]
