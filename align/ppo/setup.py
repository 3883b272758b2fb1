"""Build a PPO run from its recipe: the models as engines, the reward sources, the sampler, and the checkpoint's state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from align.config.ppo import PPORecipe
from align.engine.batch_plan import BatchPlan
from align.engine.build import frozen_engine, train_engine
from align.engine.distributed import World
from align.engine.ema import EMA
from align.engine.engine import AdapterOff, Engine
from align.engine.optimizer import learning_rates
from align.engine.sequence_parallel import SequenceGroup
from align.engine.sharding import gathered_parameters, load_device, sharded_load
from align.engine.user_functions import user_function
from align.evaluate.reward_model import RewardModel, load_reward, model_sources
from align.generation.batch_size import decoding_rows, gpu_bytes, row_bytes
from align.generation.sampler import Sampler
from align.generation.vllm import VLLM
from align.models.bottleneck import continue_adapter
from align.models.load import load_policy
from align.models.shared_weights import reward_model_on
from align.models.tokenizer import keep_ends
from align.models.trainable import add_adapter
from align.models.value import load_value_model, value_model_on
from align.ppo.ahead import Ahead
from align.ppo.checkpoint import load_checkpoint
from align.ppo.data import PPOData
from align.ppo.inputs import PPOInputs
from align.ppo.ppo_run import Models, PPORun, Progress
from align.ppo.replay import Replay
from reward_models.bottleneck import base_of
from reward_models.combine import RewardSum
from reward_models.heads import hf_model, keep_head_float32, score_head
from reward_models.responses import RewardSource
from reward_models.trained import ModelReward

REWARD_MODEL = "reward_model"  # its name in logs and errors
SHORT_SEQUENCE = 32  # tokens of prompt and response up to which padding costs less than one more forward pass


def set_up(
    recipe: PPORecipe,
    inputs: PPOInputs,
    data: PPOData,
    plan: BatchPlan,
    world: World,
    checkpoint: Path | None,
    vllm: VLLM | None = None,
) -> PPORun:
    """Load the models and the state of a run, from `checkpoint` if there is one; `vllm` samples instead of the policy."""
    models = load_models(recipe, inputs, plan, world)
    schedule = partial(
        learning_rates,
        scheduler=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_steps,
        updates=recipe.num_updates,
        arguments=recipe.lr_scheduler_kwargs,
    )
    peaks = (recipe.learning_rate, recipe.value_learning_rate or recipe.learning_rate)
    longest = max(len(ids) for _, ids in data.prompts) + recipe.response_length
    config, prompt = hf_model(models.policy.module).config, longest - recipe.response_length
    row = row_bytes(config, prompt, recipe.response_length, 2 if recipe.bf16 else 4)
    run = PPORun(
        recipe=recipe,
        plan=plan,
        world=world,
        models=models,
        sampler=Sampler(
            tokenizer=inputs.tokenizer,
            temperature=recipe.temperature,
            response_length=recipe.response_length,
            batch_size=recipe.per_device_generation_batch_size
            or decoding_rows(row, gpu_bytes(world), recipe.per_device_eval_batch_size),
            seed=recipe.seed,
            gather=recipe.ds3_gather_for_generation,
            cuda_graphs=recipe.cuda_graphs,
            stop_strings=recipe.stop_strings,
            vllm=vllm,
        ),
        prompts=data.prompts,
        scoring_passes=1 if longest <= SHORT_SEQUENCE else 4,
        learning_rates=list(zip(*map(schedule, peaks), strict=True)),
        progress=Progress(recipe.kl_coef),
        ema=EMA(models.policy, recipe.ema_decay) if recipe.ema_decay is not None else None,
        ptx=data.ptx,
    )
    if (size := recipe.sequence_parallel_size) > 1:
        run.sequence = SequenceGroup(world, size)
    if recipe.objective != "ppo":
        run.replay = Replay(recipe.replay_size * recipe.rollout_batch_size, world, run.sampler.pad_token_id)
    if recipe.one_step_off_policy:
        run.ahead = Ahead(run.sampler, world)
    if checkpoint is not None:
        load_checkpoint(run, checkpoint, len(data.held_out))
    return run


def load_models(recipe: PPORecipe, inputs: PPOInputs, plan: BatchPlan, world: World) -> Models:
    """Load the policy, value, reference and reward models, each as an engine of its own."""
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32  # of frozen weights
    with sharded_load(recipe, "policy"):
        loaded = load_policy(
            base_of(recipe.sft_model_path),
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            device=load_device(world),
        )
    keep_ends(loaded, inputs.tokenizer)
    on_policy = value_model_on(loaded, recipe.trust_remote_code) if recipe.value_method == "shared" else None
    scorers = {
        key: reward_model_on(loaded, str(given.adapter), given.config, recipe.trust_remote_code)
        for key, given in inputs.on_policy.items()
    }
    adapted = add_adapter(loaded, recipe) if recipe.method != "full" else loaded
    continue_adapter(adapted, recipe.sft_model_path)
    policy = train_engine(adapted, recipe, world, recipe.learning_rate, plan.policy_passes)
    if recipe.method != "full" and base_of(recipe.sft_model_path) == recipe.sft_model_path:
        reference: Engine = AdapterOff(policy)
    else:
        with sharded_load(recipe, "reference"):
            frozen = load_policy(
                recipe.sft_model_path,
                dtype=dtype,
                attn_implementation=recipe.attn_implementation,
                trust_remote_code=recipe.trust_remote_code,
                device=load_device(world),
            )
        reference = frozen_engine(frozen, recipe, world, "reference")
    value = None
    if recipe.estimator.value_model:
        if on_policy is None:
            with sharded_load(recipe, "value"):
                model, missing = load_value_model(
                    inputs.value_path,
                    inputs.value_head,
                    attn_implementation=recipe.attn_implementation,
                    trust_remote_code=recipe.trust_remote_code,
                    device=load_device(world),
                )
        else:
            model, missing = on_policy
        start_value_head(model, missing)
        trained = model if recipe.value_method == "full" else add_value_adapter(model, recipe)
        keep_head_float32(trained)
        rate = recipe.value_learning_rate or recipe.learning_rate
        value = train_engine(trained, recipe, world, rate, plan.accumulation, "value")

    def load(name: str, given: RewardModel) -> ModelReward:
        return load_reward(name, given, recipe, world, scorers.get(given.key))

    sources = RewardSum(_sources(recipe, inputs, load), recipe.reward_weights or None)
    judges: list[RewardSource] = [
        *([] if inputs.judge is None else [load("judge_reward_model", inputs.judge)]),
        *(user_function(name, "judge_reward_funcs", recipe.reward_timeout) for name in recipe.judge_reward_funcs),
    ]
    starts_as_reward = bool(inputs.rewards) and inputs.value_path == inputs.rewards[0].path
    same = value is not None and inputs.value_head is not None and starts_as_reward
    return Models(policy, value, reference, sources, RewardSum(judges) if judges else None, values_are_scores=same)


def add_value_adapter(value: PreTrainedModel, recipe: PPORecipe) -> PeftModel:
    """Add LoRA to the layers of a value model; its head is trained whole."""
    return add_adapter(value, replace(recipe, method="lora"), "TOKEN_CLS", [score_head(value)[0].split(".")[0]])


def start_value_head(value: PreTrainedModel, missing: set[str]) -> None:
    """Initialize the value head from the reward model's (arXiv 2009.01325 appendix G.1), its zero point included.

    The value at the last token then starts as the score. A new head, on a language model, starts at 0, so that every
    value is 0 (arXiv 1909.08593).
    """
    _, head = score_head(value)
    with gathered_parameters(list(head.parameters()), modify=True), torch.no_grad():
        if "bias" in missing:
            head.bias.zero_()
        if "weight" in missing:
            head.weight.zero_()
        else:
            head.bias.sub_(getattr(value.config, "score_mean", 0.0))
    value.config.score_mean = 0.0  # it is in the bias now


def _sources(
    recipe: PPORecipe, inputs: PPOInputs, load: Callable[[str, RewardModel], ModelReward]
) -> list[RewardSource]:
    coef = recipe.reward_variance_coef or 0.0
    return model_sources(REWARD_MODEL, inputs.rewards, load, recipe.reward_ensemble, coef) + [
        user_function(name, "reward_funcs", recipe.reward_timeout) for name in recipe.reward_funcs
    ]
