"""`align check` of a PPO recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.cli.check.memory import Footprint, count_parameters, count_trained, decoding_line, head_line, skeleton
from align.cli.check.sample_rows import Sample, Start
from align.cli.check.training import TrainingCheck
from align.config.ppo import PPORecipe
from align.data.load import Rows
from align.data.rows import Prompt
from align.data.tokenize import tokenize_prompts
from align.models.context_length import check_responses_fit
from align.models.load import load_config
from align.ppo.inputs import check_ppo_inputs
from align.ppo.rollout_server import vllm_version
from reward_models.heads import score_head
from reward_models.linear_head import SequenceClassifier, TokenClassifier


class PPOCheck(TrainingCheck[PPORecipe]):
    """Four models: policy and value model train, reference and reward model are frozen."""

    form = Prompt

    def max_tokens(self, recipe: PPORecipe) -> int:
        return recipe.max_prompt_length + recipe.response_length

    def start(self, recipe: PPORecipe, rows: Rows | None, folder: Path) -> Start:
        inputs = check_ppo_inputs(recipe)
        others = {"value": load_config(inputs.value_path, "value_model_path", recipe.trust_remote_code)}
        several = len(inputs.rewards) > 1
        scorers = {f"reward{f' {n}' * several}": model for n, model in enumerate(inputs.rewards, start=1)}
        scorers |= {"judge": inputs.judge} if inputs.judge is not None else {}
        others |= {role: model.config for role, model in scorers.items()}
        adapters = {role: model.adapter for role, model in scorers.items() if model.adapter is not None}
        policy = load_config(recipe.sft_model_path, "sft_model_path", recipe.trust_remote_code)
        notes = inputs.describe_heads(recipe.estimator.value_model)
        if recipe.vllm_python is not None:
            notes.append(f"responses are sampled by vLLM {vllm_version(os.path.expanduser(recipe.vllm_python))}")
        return Start(policy, inputs.tokenizer, others=others, adapters=adapters, notes=notes)

    def sample(self, recipe: PPORecipe, rows: Sequence[Prompt], start: Start) -> Sample:
        prompts, bad = tokenize_prompts(rows, start.tokenizer, recipe.max_prompt_length, recipe.on_bad_row)
        ids = [ids for _, ids in prompts]
        check_responses_fit(ids, recipe.response_length, start.config)
        note = "the policy answers here, and its answer is trained"
        return Sample({"prompt": (ids[0], [False] * len(ids[0]))}, note, ids, bad)

    def more_memory(self, recipe: PPORecipe, start: Start) -> list[str]:
        lines = [head_line(start.config)] if recipe.method == "full" else []
        if recipe.rollout_engine == "transformers":
            rows = recipe.per_device_generation_batch_size
            sizes = (recipe.max_prompt_length, recipe.response_length)
            lines.append(decoding_line(start.config, rows, *sizes, recipe.bf16))
        elif recipe.vllm_python is not None:
            share = f"{recipe.vllm_gpu_memory_utilization:.0%}"
            lines.append(f"  vLLM: {share} of its GPU's memory beside all this (vllm_gpu_memory_utilization)")
        return lines

    def footprints(self, recipe: PPORecipe, start: Start) -> list[Footprint]:
        code = recipe.trust_remote_code
        model = skeleton(AutoModelForCausalLM, start.config, code)
        size = count_parameters(model)
        models = [Footprint("policy", *count_trained(model, recipe, "CAUSAL_LM", model.get_output_embeddings()))]
        if recipe.estimator.value_model:
            value = skeleton(TokenClassifier, start.others["value"], code, num_labels=1)
            models.append(value_footprint(value, recipe))
        if recipe.method == "full":  # otherwise the reference is the policy with its adapter off
            models.append(Footprint("reference", size, 0))
        scorers = {name: config for name, config in start.others.items() if name != "value"}
        for name, config in scorers.items():
            scorer = skeleton(SequenceClassifier, config, code, num_labels=1)
            models.append(Footprint(name, scorer_parameters(scorer, start.adapters.get(name)), 0))
        if recipe.ds3_gather_for_generation:
            models.append(Footprint("whole policy, while it generates", models[0].parameters, 0, gathered=True))
        return models


def value_footprint(value: PreTrainedModel, recipe: PPORecipe) -> Footprint:
    """The value model by its skeleton, which changes; weights that it shares with the policy are counted there."""
    if recipe.value_method == "full":
        whole = trained = count_parameters(value)
    else:
        lora, shared = replace(recipe, method="lora"), count_parameters(value.base_model)
        name, head = score_head(value)
        whole, trained = count_trained(value, lora, "TOKEN_CLS", head, [name.split(".")[0]])
        whole -= shared if recipe.value_method == "shared" else 0
    return Footprint("value", whole, trained)


def scorer_parameters(scorer: PreTrainedModel, adapter: str | None) -> int:
    """Parameters of a reward model by its skeleton, which changes; without weights that it shares with the policy.

    Args:
        adapter: the folder of that with which it is on them.
    """
    if adapter is None:
        return count_parameters(scorer)
    shared = count_parameters(scorer.base_model)
    settings = PeftConfig.from_pretrained(adapter)
    settings.base_model_name_or_path = None  # PEFT warns of another name than the skeleton's
    with torch.device("meta"):
        return count_parameters(get_peft_model(scorer, settings)) - shared


check = PPOCheck().check
