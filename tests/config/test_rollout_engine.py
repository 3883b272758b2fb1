"""The keys of what samples responses: what is refused, in which words."""

from __future__ import annotations

import pytest

from align.config.load import as_recipe
from align.config.ppo import PPORecipe
from align.errors import UserError

MINIMAL = {"output_dir": "out", "train_dataset": "rows.jsonl", "sft_model_path": "sft", "reward_model_path": "rm"}
BALANCE = {"objective": "trajectory_balance", "num_generations": 4}
OWN = {"rollout_engine": "vllm", "vllm_python": "python"}
URL = {"rollout_engine": "vllm", "vllm_server_base_url": ["http://127.0.0.1:8100"]}


@pytest.mark.parametrize("keys", [OWN, URL, {**OWN, "vllm_importance_sampling_mode": "none"}, {**URL, **BALANCE}])
def test_accepted(keys):
    assert as_recipe(PPORecipe, {**MINIMAL, **keys}).rollout_engine == "vllm"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vllm_python": "python"}, "vllm_python: is for rollout_engine: vllm"),
        ({"vllm_importance_sampling_cap": 3.0}, "vllm_importance_sampling_cap: is for rollout_engine: vllm"),
        ({"one_step_off_policy": True}, "one_step_off_policy: is for rollout_engine: vllm"),
        ({"rollout_engine": "vllm"}, "needs vllm_python or vllm_server_base_url, got neither"),
        ({**OWN, **URL}, "needs vllm_python or vllm_server_base_url, got both"),
        (
            {**URL, "vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size: is for the server that vllm_python starts",
        ),
        ({**OWN, "vllm_gpu_memory_utilization": 1.5}, "expected at most 1, got 1.5"),
        ({**URL, "vllm_server_base_url": ["127.0.0.1:8100"]}, r"vllm_server_base_url\[0\]: expected a URL such as"),
        ({**OWN, "ds3_gather_for_generation": False}, "the server has its own copy"),
        ({**OWN, "per_device_generation_batch_size": 64}, "the server has a limit of its own"),
        ({**OWN, "cuda_graphs": True}, "vLLM captures its own"),
        ({"cuda_graphs": True, "ds3_gather_for_generation": False}, "a sharded model cannot be captured"),
        ({**OWN, **BALANCE, "vllm_importance_sampling_mode": "token_mask"}, "trajectory_balance needs no weights"),
        ({**OWN, **BALANCE, "vllm_importance_sampling_cap": 4.0}, "tokens are not weighted here"),
        (
            {**OWN, "vllm_importance_sampling_mode": "none", "vllm_importance_sampling_cap": 4.0},
            "tokens are not weighted here",
        ),
        ({**OWN, "vllm_importance_sampling_mode": "clip"}, "token_truncate, token_mask, sequence_truncate"),
    ],
)
def test_refused(keys, message):
    with pytest.raises(UserError, match=message):
        as_recipe(PPORecipe, {**MINIMAL, **keys})
