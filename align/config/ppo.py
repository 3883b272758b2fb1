"""Keys of the PPO stage, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from align.config import rollout_engine as vllm
from align.config.base import StageRecipe
from align.config.data_source import DataSource
from align.config.deepspeed_file import read_deepspeed_file
from align.config.ensemble import (
    check_ensemble_rules,
    check_normalized_rewards,
    list_reward_models,
    reward_ensemble,
    reward_model_path,
    reward_names,
    reward_variance_coef,
)
from align.config.judge import (
    check_judge_rules,
    early_stopping_patience,
    judge_reward_funcs,
    judge_reward_model_path,
    metric_for_best_model,
)
from align.config.keys import (
    ABOVE_0,
    ABOVE_1,
    AT_LEAST_0,
    AT_LEAST_1,
    BATCH,
    FROM_0_TO_1,
    FROM_0_TO_BELOW_1,
    TOKENS,
    Where,
    key,
    required,
    reward_timeout,
    score_reasoning,
)
from align.config.objective import check_objective, gradient_steps, objective, replay_size
from align.config.responses import check_scored_responses
from align.config.schedule import check_decay_steps
from align.config.sequence_parallel import check_sequence_parallel_rules, sequence_parallel_size
from align.config.token_budget import check_token_budget, max_tokens_per_device
from align.config.value_method import check_value_method, value_method
from align.errors import UserError, run_all
from align.maths.estimators import BALANCE_WITH_VALUES, ESTIMATORS, TRAJECTORY_BALANCE, Estimator

if TYPE_CHECKING:
    EstimatorName: TypeAlias = str
    ImportanceMode: TypeAlias = str
else:
    EstimatorName = Literal[tuple(ESTIMATORS)]
    ImportanceMode = Literal[(*vllm.IMPORTANCE_MODES, "none")]


@dataclass(frozen=True, slots=True, kw_only=True)
class PPORecipe(StageRecipe):
    """Stage 3, `align ppo`: PPO against the reward, with a KL penalty against the SFT reference."""

    sft_model_path: str = required("SFT model: the policy starts from it, and it is the frozen reference.")
    reward_model_path: list[str] = reward_model_path()
    reward_ensemble: Literal["mean", "wco", "uwo"] = reward_ensemble()
    reward_variance_coef: float | None = reward_variance_coef()
    reward_funcs: list[str] = key(
        [], "`module:function` rewards with TRL's signature; the module may be a file beside the recipe."
    )
    reward_weights: list[float] = key(
        [], "Weights of the reward model or ensemble (first, if any) and of `reward_funcs`; 1 each by default."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = key(
        "sum_then_normalize",
        "Several rewards: normalize_then_sum (GDPO, arXiv 2601.05242) normalizes each within the responses to a prompt before "
        "the weighted sum; needs num_generations of 2 or more. TRL's key.",
    )
    value_model_path: str | None = key(
        None,
        "Initial value model; by default the reward model if it has the policy's tokenizer, otherwise the SFT model.",
    )
    value_method: Literal["full", "lora", "shared"] = value_method()
    sequence_parallel_size: int = sequence_parallel_size()
    eval_reward_funcs: list[str] = key(
        [],
        "`module:function` rewards that are only measured, on evaluation prompts: a known ground truth, a gold reward "
        "model.",
    )
    judge_reward_model_path: str | None = judge_reward_model_path()
    judge_reward_funcs: list[str] = judge_reward_funcs()
    metric_for_best_model: str | None = metric_for_best_model()
    early_stopping_patience: int | None = early_stopping_patience()
    reward_timeout: float = reward_timeout()
    score_reasoning: bool = score_reasoning()

    objective: Literal["ppo", "trajectory_balance", "path_consistency"] = objective()
    replay_size: int = replay_size()
    gradient_steps: int = gradient_steps()
    total_episodes: int = key(10_000, "Responses sampled in the run.", AT_LEAST_1)
    rollout_batch_size: int = key(64, "Responses per update over all devices.", BATCH)
    num_generations: int = key(
        1, "Responses to each prompt; an update takes rollout_batch_size / num_generations prompts.", AT_LEAST_1
    )
    minibatch_size: int = key(64, "Responses per optimizer step over all devices.", BATCH)
    num_ppo_epochs: int = key(4, "Passes over each rollout batch.", AT_LEAST_1)
    max_prompt_length: int = key(512, "Maximum tokens of a prompt; longer prompts are bad rows.", TOKENS)
    response_length: int = key(53, "Maximum tokens of a response.", TOKENS)
    stop_strings: list[str] = key(
        [],
        "A response also ends with the token that completes one of these strings, which stays in its text; the model's own "
        "end tokens, all of its generation_config's eos_token_id, end it in any case.",
    )
    temperature: float = key(
        1.0, "Sampling temperature; all log-probabilities are computed at this temperature too.", ABOVE_0
    )
    missing_eos_penalty: float | None = key(
        None, "Subtracted from the score of a response that does not end.", AT_LEAST_0
    )
    missing_eos_score: float | None = key(None, "Replaces the score of a response that does not end.")

    learning_rate: float = key(3e-6, "Peak learning rate of the policy.", ABOVE_0)
    value_learning_rate: float | None = key(
        None, "Peak learning rate of the value model; the policy's by default.", ABOVE_0
    )
    adam_epsilon: float = key(1e-5, "AdamW epsilon.", ABOVE_0)
    advantage_estimator: EstimatorName = key(
        "gae", "How rewards become advantages; of these only `gae` has a value model. rloo, grpo and dr_grpo compare the "
        "responses to one prompt and need num_generations of 2 or more."
    )  # fmt: skip
    kl_coef: float = key(
        0.05,
        "Weight of the KL penalty per token, in units of score per nat; with `normalize_scores` in standard deviations of the "
        "score per nat.",
        AT_LEAST_0,
    )
    kl_estimator: Literal["k1", "k2", "k3"] = key(
        "k1", "Estimator of the penalty: k1 in the reward, k2 or k3 in the loss."
    )
    use_kl_loss: bool = key(False, "Penalize in the loss instead of in the reward; needs kl_estimator k2 or k3.")
    kl_target: float | None = key(
        None, "Adapt kl_coef so that the KL approaches this many nats per response (arXiv 1909.08593).", ABOVE_0
    )
    kl_horizon: int = key(10_000, "With `kl_target`: episodes in which kl_coef changes by at most a fifth.", AT_LEAST_1)
    max_approx_kl: float | None = key(
        None, "End an update at the minibatch whose policy/approx_kl is above this, before its optimizer step.", ABOVE_0
    )
    cliprange: float = key(0.2, "Clip range of the probability ratio.", ABOVE_0)
    dual_clip: float | None = key(
        None, "Upper bound (above 1) on the ratio where the advantage is negative, often 3.", ABOVE_1
    )
    cliprange_value: float = key(0.2, "Clip range of the value around its value at rollout.", ABOVE_0)
    gamma: float = key(1.0, "Discount.", FROM_0_TO_1)
    lam: float = key(0.95, "Lambda of generalized advantage estimation.", FROM_0_TO_1)
    normalize_scores: bool | None = key(
        None,
        "Subtract the running mean of all scores and divide by their running standard deviation, so that kl_coef does not "
        "depend on the scale of a reward model, which is arbitrary; by default, if there is a reward model.",
        before=lambda keys: False if keys.get("reward_model_path") else None,
    )
    score_clip: float | None = key(None, "Clip scores, after normalization, to [-score_clip, score_clip].", ABOVE_0)
    whiten_rewards: bool = key(False, "Scale rewards to unit variance before advantages.")
    entropy_coef: float = key(0.0, "Weight of the entropy bonus, mean over tokens, in nats.", AT_LEAST_0)
    value_warmup_updates: int = key(0, "Number of first updates in which only the value model trains.", AT_LEAST_0)
    ema_decay: float | None = key(
        None,
        "Keep an exponential moving average of the policy with this decay per update, saved in `ema/`.",
        FROM_0_TO_BELOW_1,
    )
    ptx_dataset: list[DataSource] = key(
        [],
        "Text or demonstrations whose likelihood is trained in the same optimizer steps (PPO-ptx, arXiv 2203.02155).",
    )
    ptx_coef: float = key(
        1.0, "Weight of the negative log-likelihood of `ptx_dataset` (mean over tokens) in the loss.", AT_LEAST_0
    )
    ptx_batch_size: int = key(64, "Rows of `ptx_dataset` per optimizer step over all devices.", BATCH)
    value_deepspeed: str | None = key(None, "DeepSpeed JSON file of the value model, instead of `deepspeed`.")
    reference_deepspeed: str | None = key(None, "DeepSpeed JSON file of the reference model, instead of `deepspeed`.")
    reward_deepspeed: str | None = key(
        None,
        "DeepSpeed JSON file of the reward model, instead of `deepspeed`; one that could score on the policy's frozen weights, by "
        "its adapter, then has weights of its own.",
    )
    max_tokens_per_device: int | None = max_tokens_per_device()
    per_device_generation_batch_size: int | None = key(
        None,
        "Responses decoded at once per device; by default on a GPU as many as an eighth of its memory holds, but at least "
        "per_device_eval_batch_size, and that many on a CPU.",
        BATCH,
    )
    ds3_gather_for_generation: bool = key(
        True, "Under ZeRO-3, gather a copy of the policy once per rollout; set to false if it does not fit in memory."
    )
    cuda_graphs: bool = key(
        False,
        "Run each decoding step as a CUDA graph, with which Python starts one operation a token in place of thousands.",
    )
    max_kl: float | None = key(
        None,
        "The best checkpoint has the highest `metric_for_best_model` among those with at most this KL (nats per response).",
        ABOVE_0,
    )
    rollout_engine: Literal["transformers", "vllm"] = vllm.rollout_engine()
    vllm_python: str | None = vllm.vllm_python()
    vllm_server_base_url: list[str] = vllm.vllm_server_base_url()
    vllm_tensor_parallel_size: int = vllm.vllm_tensor_parallel_size()
    vllm_gpu_memory_utilization: float = vllm.vllm_gpu_memory_utilization()
    vllm_server_timeout: float = vllm.vllm_server_timeout()
    vllm_importance_sampling_mode: ImportanceMode = vllm.vllm_importance_sampling_mode()
    vllm_importance_sampling_cap: float = vllm.vllm_importance_sampling_cap()
    one_step_off_policy: bool = vllm.one_step_off_policy()
    num_sample_rows: int = key(8, "Rows of the table of samples.", AT_LEAST_0)
    skip_self_checks: bool = key(False, "Skip the checks of models and rewards before the first update.")

    def __post_init__(self) -> None:
        list_reward_models(self)

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        return self.total_episodes // self.rollout_batch_size

    @property
    def estimator(self) -> Estimator:
        """The properties of the objective: value model, responses to a prompt, aggregation of the loss."""
        if self.objective == "ppo":
            return ESTIMATORS[self.advantage_estimator]
        groups = self.objective == "trajectory_balance" and self.num_generations > 1
        return TRAJECTORY_BALANCE if groups else BALANCE_WITH_VALUES

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps of an update."""
        if self.objective != "ppo":
            return self.gradient_steps
        return self.num_ppo_epochs * (self.rollout_batch_size // self.minibatch_size)

    @property
    def scores_are_normalized(self) -> bool:
        """`normalize_scores`, or its default."""
        return bool(self.reward_model_path) if self.normalize_scores is None else self.normalize_scores


def check_ppo_rules(recipe: PPORecipe, where: Where) -> None:
    """The rules between the keys of the PPO stage.

    Raises:
        UserError: names the first broken rule, with the others.
    """
    sources = reward_names(recipe)
    run_all(
        partial(_check_episodes, recipe, where),
        partial(check_token_budget, recipe, where),
        partial(check_objective, recipe, where),
        partial(check_value_method, recipe, where),
        partial(_check_average, recipe, where),
        partial(check_sequence_parallel_rules, recipe, where),
        partial(vllm.check_rollout_engine, recipe, where),
        partial(check_judge_rules, recipe, where),
        partial(check_ensemble_rules, recipe, where),
        partial(_check_sources, recipe, sources, where),
    )


def _check_episodes(recipe: PPORecipe, where: Where) -> None:
    if recipe.total_episodes < recipe.rollout_batch_size:
        raise UserError(
            f"{where('total_episodes')}: expected at least rollout_batch_size ({recipe.rollout_batch_size}), got "
            f"{recipe.total_episodes}"
        )
    if recipe.rollout_batch_size % recipe.num_generations:
        raise UserError(
            f"{where('num_generations')}: expected a divisor of rollout_batch_size ({recipe.rollout_batch_size}), got "
            f"{recipe.num_generations}"
        )
    check_decay_steps(recipe, recipe.num_updates, where)


def _check_average(recipe: PPORecipe, where: Where) -> None:
    if recipe.ema_decay is None or recipe.deepspeed is None:
        return
    zero = read_deepspeed_file(recipe.deepspeed).get("zero_optimization", {})
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise UserError(
            f"{where('ema_decay')}: averages the policy's weights after each update, and {recipe.deepspeed} keeps them on NVMe "
            '(zero_optimization.offload_param); expected "device": "cpu" there, or leave ema_decay out'
        )


def _check_sources(recipe: PPORecipe, sources: list[str], where: Where) -> None:
    check_scored_responses(recipe, sources, where)
    if recipe.multi_objective_aggregation == "normalize_then_sum":
        check_normalized_rewards(recipe, where, sources)
