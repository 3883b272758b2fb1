"""Keys of what samples the responses of PPO, and the rules between them; TRL's names where it has them.

Functions take the recipe of PPO, whose file imports this one.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from align.config.keys import ABOVE_0, AT_LEAST_1, SECONDS, Where, key
from align.errors import UserError

IMPORTANCE_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
URL = re.compile(r"https?://[^/\s?#]+/?")


def rollout_engine() -> Any:
    """The key `rollout_engine`."""
    return key(
        "transformers",
        "What samples responses: transformers in this process, or vllm in a server process, which is given the policy's "
        "weights before each rollout; it needs vllm_python or vllm_server_base_url.",
    )


def vllm_python() -> Any:
    """The key `vllm_python`."""
    return key(None, "Python of an environment with vLLM, which starts the server and ends it with the run.")


def vllm_server_base_url() -> Any:
    """The key `vllm_server_base_url`."""
    return key(
        [],
        "URLs of running servers (align/generation/vllm_server.py), such as http://127.0.0.1:8100; several share the prompts. They "
        "read weights from output_dir, and have the run's token in ALIGN_VLLM_TOKEN.",
    )


def vllm_tensor_parallel_size() -> Any:
    """The key `vllm_tensor_parallel_size`."""
    return key(1, "With vllm_python: GPUs that the server shares the model among.", AT_LEAST_1)


def vllm_gpu_memory_utilization() -> Any:
    """The key `vllm_gpu_memory_utilization`."""
    return key(0.3, "With vllm_python: share of the GPU's memory that the server takes.", ABOVE_0)


def vllm_server_timeout() -> Any:
    """The key `vllm_server_timeout`."""
    return key(600.0, "Seconds that a server may take to start, and for one rollout; then the run ends.", SECONDS)


def vllm_importance_sampling_mode() -> Any:
    """The key `vllm_importance_sampling_mode`."""
    return key(
        "token_truncate",
        "With objective: ppo, weights p / q of tokens that vLLM sampled with probability q and the policy gives p: by token or by "
        "response (sequence), above vllm_importance_sampling_cap cut to it (truncate) or left out (mask); none: no weights.",
    )


def vllm_importance_sampling_cap() -> Any:
    """The key `vllm_importance_sampling_cap`."""
    return key(2.0, "Largest weight of a token that vLLM sampled.", ABOVE_0)


def one_step_off_policy() -> Any:
    """The key `one_step_off_policy`."""
    return key(
        False,
        "With rollout_engine: vllm: sample the responses of the next update while this one trains; they are of the policy one "
        "update before, which vllm_importance_sampling_mode corrects.",
    )


def check_rollout_engine(recipe: Any, where: Where) -> None:
    """The rules for the keys above.

    Raises:
        UserError: names the first broken rule.
    """
    named = {each.name: each for each in fields(recipe) if each.name.startswith("vllm_")}
    changed = [name for name, each in named.items() if getattr(recipe, name) not in (each.default, [])]
    if recipe.rollout_engine != "vllm":
        changed += ["one_step_off_policy"] * recipe.one_step_off_policy
        if changed:
            raise UserError(f"{where(changed[0])}: is for rollout_engine: vllm, got rollout_engine: transformers")
        if recipe.cuda_graphs and not recipe.ds3_gather_for_generation:
            raise UserError(
                f"{where('cuda_graphs')}: needs ds3_gather_for_generation: true; a sharded model cannot be captured."
            )
        return
    if bool(recipe.vllm_python) == bool(recipe.vllm_server_base_url):
        both = "both" if recipe.vllm_python else "neither"
        raise UserError(f"{where('rollout_engine')}: vllm needs vllm_python or vllm_server_base_url, got {both}")
    if recipe.method == "bottleneck":
        raise UserError(
            f"{where('rollout_engine')}: vllm runs plain models, and a bottleneck adapter cannot be merged into one; use transformers, "
            "or method: lora"
        )
    for name in ("vllm_tensor_parallel_size", "vllm_gpu_memory_utilization"):
        if recipe.vllm_server_base_url and name in changed:
            raise UserError(f"{where(name)}: is for the server that vllm_python starts; give it to your own server.")
    if recipe.vllm_gpu_memory_utilization > 1:
        raise UserError(
            f"{where('vllm_gpu_memory_utilization')}: expected at most 1, got {recipe.vllm_gpu_memory_utilization}"
        )
    for index, url in enumerate(recipe.vllm_server_base_url):
        if not URL.fullmatch(url):
            raise UserError(
                f"{where('vllm_server_base_url')}[{index}]: expected a URL such as http://127.0.0.1:8100, got {url!r}"
            )
    if not recipe.ds3_gather_for_generation:
        raise UserError(
            f"{where('ds3_gather_for_generation')}: is for rollout_engine: transformers; the server has its own copy of the "
            "policy. Leave it out."
        )
    if recipe.per_device_generation_batch_size is not None:
        raise UserError(
            f"{where('per_device_generation_batch_size')}: is for rollout_engine: transformers; the server has a limit of its own. "
            "Leave it out."
        )
    if recipe.cuda_graphs:
        raise UserError(
            f"{where('cuda_graphs')}: is for rollout_engine: transformers; vLLM captures its own. Leave it out."
        )
    weighs = recipe.vllm_importance_sampling_mode in IMPORTANCE_MODES and recipe.objective == "ppo"
    if not weighs and "vllm_importance_sampling_cap" in changed:
        raise UserError(f"{where('vllm_importance_sampling_cap')}: tokens are not weighted here; leave it out.")
    if recipe.objective != "ppo" and "vllm_importance_sampling_mode" in changed:
        raise UserError(
            f"{where('vllm_importance_sampling_mode')}: objective: {recipe.objective} needs no weights, since it holds for "
            "responses of any policy; leave it out."
        )
