"""What the values of a recipe must satisfy beyond their types: ranges, and keys that depend on one another."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.config import (
    DataSource,
    EvaluateRecipe,
    PPORecipe,
    RewardRecipe,
    SFTRecipe,
    StageRecipe,
    TrainerRecipe,
    UserError,
)
from align.retention_limits import check_retention
from align.strict import nearest
from align.templates import check_template

COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", "text", "text_pair", "label")
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

# What each stage may train; the others train all their weights.
METHODS = {
    "sft": ("full", "freeze", "head", "lora", "dora", "qlora", "ia3", "prompt", "prefix"),
    "reward": ("full", "freeze", "head", "lora", "dora", "ia3"),
    "ppo": ("full", "lora", "dora", "ia3"),
    "classify": ("full", "freeze", "head", "lora", "dora", "ia3"),
    "mlm": ("full", "freeze"),
}

_RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    (
        "at least 1",
        lambda value: value >= 1,
        "train_batch_size per_device_train_batch_size per_device_eval_batch_size rollout_batch_size minibatch_size "
        "num_ppo_epochs total_episodes max_prompt_length response_length normalize_prompts lora_r lora_alpha num_virtual_tokens "
        "logging_steps eval_steps save_steps save_total_limit max_eval_rows max_rows num_generations kl_horizon ptx_batch_size "
        "early_stopping_patience mixture_temperature max_new_tokens bootstrap_iters max_eval_generations",
    ),
    (
        "above 0",
        lambda value: value > 0,
        "learning_rate value_learning_rate adam_epsilon num_train_epochs temperature cliprange cliprange_value max_kl weight "
        "kl_target max_approx_kl score_clip neftune_noise_alpha",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        "seed weight_decay max_grad_norm warmup_steps kl_coef missing_eos_penalty center_rewards_coefficient num_sample_rows "
        "entropy_coef ptx_coef value_warmup_updates freeze_layers max_forgetting",
    ),
    ("from 0 to 1", lambda value: 0 <= value <= 1, "gamma lam"),
    (
        "from 0 to below 1",
        lambda value: 0 <= value < 1,
        "eval_fraction adam_beta1 adam_beta2 ema_decay label_smoothing_factor replay_fraction",
    ),
    ("above 1", lambda value: value > 1, "dual_clip"),
    ("above 0 and below 1", lambda value: 0 < value < 1, "mlm_probability"),
    ("at least 2, a prompt and a response token", lambda value: value >= 2, "max_length"),
    ("at least 259, all bytes and three special tokens", lambda value: value >= 259, "tokenizer_vocab_size"),
    ("-1, or at least 1", lambda value: value == -1 or value >= 1, "max_steps"),
]


def check_values(recipe: StageRecipe | EvaluateRecipe, where: Callable[[str], str]) -> None:
    """Refuse values out of range, keys that exclude one another, and named files that are not there.

    Args:
        where: key to its place in words, with which an error begins.

    Raises:
        UserError: the first thing that is wrong.
    """
    for name in ("train_dataset", "eval_dataset", "ptx_dataset", "retention"):
        for index, source in enumerate(getattr(recipe, name, [])):
            _check_source(source, f"{where(name)}[{index}]")
            if source.templates and isinstance(recipe, RewardRecipe):
                raise UserError(
                    f"{where(name)}[{index}].templates: they make prompts and completions, and this stage reads pairs with "
                    "`chosen` and `rejected`; leave them out."
                )
    if recipe.chat_template_path and not Path(recipe.chat_template_path).is_file():
        raise UserError(f"{where('chat_template_path')}: no file {recipe.chat_template_path}; name a Jinja file.")
    if isinstance(recipe, EvaluateRecipe):
        _check_evaluate(recipe, where)
        return
    _check_ranges(recipe, where)
    if recipe.lr_scheduler_type not in SCHEDULES:
        hint = nearest(recipe.lr_scheduler_type, SCHEDULES)
        raise UserError(
            f"{where('lr_scheduler_type')}: expected one of {', '.join(SCHEDULES)}, got {recipe.lr_scheduler_type!r}{hint}"
        )
    if not recipe.train_dataset:
        raise UserError(
            f"{where('train_dataset')}: expected a path, a hub id or a mapping, got nothing; name the training rows."
        )
    for name in ("deepspeed", "value_deepspeed", "reference_deepspeed", "reward_deepspeed"):
        if path := getattr(recipe, name, None):
            _check_deepspeed(Path(path), where(name))
    for name in ("reward_funcs", "eval_reward_funcs"):
        for index, spec in enumerate(getattr(recipe, name, [])):
            _check_function(spec, f"{where(name)}[{index}]")
    _check_method(recipe, where)
    if isinstance(recipe, TrainerRecipe):
        _check_best(recipe, where)
    if isinstance(recipe, SFTRecipe):
        _check_sft(recipe, where)
        check_retention(recipe, where)
    elif isinstance(recipe, PPORecipe):
        _check_ppo(recipe, where)


def _check_ranges(values: Any, where: Callable[[str], str]) -> None:
    for expected, holds, names in _RANGES:
        for name in names.split():
            value = getattr(values, name, None)
            if value is not None and not holds(value):
                raise UserError(f"{where(name)}: expected a number {expected}, got {value}")


def _check_source(source: DataSource, where: str) -> None:
    if (source.path is None) == (source.generator is None):
        got = "both" if source.path else "neither"
        raise UserError(f"{where}: expected either `path` or `generator`, got {got}")
    _check_ranges(source, lambda name: f"{where}.{name}")
    if source.generator:
        _check_function(source.generator, f"{where}.generator")
    for column in source.columns:
        if column not in COLUMNS:
            hint = nearest(column, COLUMNS) or "; it is written `ours: theirs`"
            raise UserError(f"{where}.columns: expected names among {', '.join(COLUMNS)}, got {column!r}{hint}")
    if source.templates:
        _check_templates(source, where)
    elif source.labels:
        raise UserError(f"{where}.labels: nothing reads them without `templates`; write these, or leave them out.")


def _check_templates(source: DataSource, where: str) -> None:
    if source.columns:
        raise UserError(f"{where}.columns: `templates` read the source's own columns by name; leave `columns` out.")
    for index, template in enumerate(source.templates):
        check_template(template, f"{where}.templates[{index}]")
    words: dict[str, str] = {}
    for label, word in source.labels.items():
        plain = " ".join(word.casefold().split())
        if not plain:
            raise UserError(f"{where}.labels.{label}: expected text, got {word!r}")
        if plain in words:
            raise UserError(
                f"{where}.labels: {word!r} stands for both {words[plain]} and {label}, so that an answer could not be "
                "told apart; give each a text of its own."
            )
        words[plain] = label


def _check_function(spec: str, where: str) -> None:
    module, _, function = spec.partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{where}: expected `module:function`, got {spec!r}")


def _check_deepspeed(path: Path, where: str) -> None:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{where}: cannot read {path} ({error.strerror}); see recipes/deepspeed for ready ones."
        ) from None
    except ValueError as error:
        raise UserError(f"{where}: {path} is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{where}: expected a JSON object in {path}, got a {type(loaded).__name__}")
    if loaded.get("fp16", {}).get("enabled", False) not in (False, "auto"):
        raise UserError(f"{where}: {path} switches fp16 on, which is not offered; leave it out and use `bf16: true`.")


def _check_best(recipe: TrainerRecipe, where: Callable[[str], str]) -> None:
    asked = "load_best_model_at_end" if recipe.load_best_model_at_end else "early_stopping_patience"
    if not getattr(recipe, asked):
        return
    if recipe.eval_steps is None:
        raise UserError(f"{where(asked)}: needs evaluations to choose by; set eval_steps")
    if not recipe.eval_dataset and recipe.eval_fraction == 0:
        raise UserError(f"{where(asked)}: needs held-out rows to choose by; set eval_dataset or eval_fraction")
    if recipe.load_best_model_at_end and recipe.save_steps not in (None, recipe.eval_steps):
        raise UserError(
            f"{where('save_steps')}: expected eval_steps ({recipe.eval_steps}) with load_best_model_at_end, so that what is "
            f"judged is saved, got {recipe.save_steps}"
        )


def _check_method(recipe: StageRecipe, where: Callable[[str], str]) -> None:
    virtual = recipe.method in ("prompt", "prefix")
    offered = METHODS.get(str(recipe.stage), ("full",))
    if recipe.method not in offered:
        why = "cannot be merged, so later stages could not start from it" if virtual else "is not offered here"
        raise UserError(
            f"{where('method')}: expected one of {', '.join(offered)} in the {recipe.stage} stage, got {recipe.method}, which {why}"
        )
    partial = bool(recipe.freeze_layers) + (recipe.trainable_pattern is not None)
    if recipe.method == "freeze" and partial != 1:
        raise UserError(
            f"{where('method')}: freeze needs either freeze_layers or trainable_pattern, got {'both' if partial else 'neither'}"
        )
    if recipe.method != "freeze" and partial:
        name = "freeze_layers" if recipe.freeze_layers else "trainable_pattern"
        raise UserError(f"{where(name)}: is for method: freeze, got method: {recipe.method}")
    if recipe.trainable_pattern is not None:
        try:
            re.compile(recipe.trainable_pattern)
        except re.error as error:
            raise UserError(f"{where('trainable_pattern')}: not a regular expression: {error}") from None
    if virtual and (getattr(recipe, "packing", False) or getattr(recipe, "padding_free", False)):
        raise UserError(
            f"{where('method')}: {recipe.method} puts tokens before each row, which packed rows have no place for"
        )
    if virtual and recipe.deepspeed and _stage_of(Path(recipe.deepspeed)) == 3:
        raise UserError(
            f"{where('method')}: {recipe.method} is not offered at ZeRO 3; use ZeRO 2, it trains few parameters"
        )


def _stage_of(path: Path) -> int:
    return int(json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))


def _check_sft(recipe: SFTRecipe, where: Callable[[str], str]) -> None:
    if (recipe.model_name_or_path is None) == (not recipe.model_config):
        got = "both; empty one with null" if recipe.model_config else "neither"
        raise UserError(
            f"{where('model_name_or_path')}: expected either a model to fine-tune, or `model_config` to train one from scratch, got {got}"
        )
    if recipe.model_config and "model_type" not in recipe.model_config:
        raise UserError(
            f"{where('model_config')}: expected a `model_type` such as llama among its keys, got {', '.join(recipe.model_config)}"
        )
    if recipe.label_smoothing_factor and recipe.loss_normalization == "example_mean":
        raise UserError(
            f"{where('label_smoothing_factor')}: is a mean over tokens; use loss_normalization: token_mean with it, or set it to 0"
        )
    if recipe.packing and recipe.train_sampling_strategy == "group_by_length":
        raise UserError(
            f"{where('train_sampling_strategy')}: with packing all rows are of like length; leave group_by_length out"
        )


def _check_ppo(recipe: PPORecipe, where: Callable[[str], str]) -> None:
    if recipe.rollout_batch_size % recipe.minibatch_size:
        raise UserError(
            f"{where('minibatch_size')}: expected a divisor of rollout_batch_size ({recipe.rollout_batch_size}), got {recipe.minibatch_size}"
        )
    if recipe.total_episodes < recipe.rollout_batch_size:
        raise UserError(
            f"{where('total_episodes')}: expected at least rollout_batch_size ({recipe.rollout_batch_size}), got {recipe.total_episodes}"
        )
    if recipe.rollout_batch_size % recipe.num_generations:
        raise UserError(
            f"{where('num_generations')}: expected a divisor of rollout_batch_size ({recipe.rollout_batch_size}), got {recipe.num_generations}"
        )
    _check_objective(recipe, where)
    sources = [*([recipe.reward_model_path] if recipe.reward_model_path else []), *recipe.reward_funcs]
    if not sources:
        raise UserError(f"{where('reward_model_path')}: expected a reward model, or `reward_funcs`, got neither")
    if recipe.reward_weights and len(recipe.reward_weights) != len(sources):
        raise UserError(
            f"{where('reward_weights')}: expected {len(sources)} weights, one each for {', '.join(sources)}, got {len(recipe.reward_weights)}"
        )
    if recipe.missing_eos_penalty is not None and recipe.missing_eos_score is not None:
        raise UserError(
            f"{where('missing_eos_score')}: expected only one of missing_eos_penalty (subtracts) and missing_eos_score (replaces), got both"
        )


def _check_objective(recipe: PPORecipe, where: Callable[[str], str]) -> None:
    estimator = recipe.advantage_estimator
    if estimator in ("rloo", "grpo", "dr_grpo") and recipe.num_generations < 2:
        raise UserError(
            f"{where('num_generations')}: expected 2 or more with advantage_estimator: {estimator}, which compares the "
            f"responses to one prompt, got {recipe.num_generations}"
        )
    if estimator != "gae" and (named := [n for n in ("value_model_path", "value_deepspeed") if getattr(recipe, n)]):
        raise UserError(f"{where(named[0])}: advantage_estimator: {estimator} has no value model; leave it out.")
    if estimator != "gae" and recipe.value_warmup_updates:
        raise UserError(
            f"{where('value_warmup_updates')}: advantage_estimator: {estimator} has no value model; leave it out."
        )
    if recipe.use_kl_loss and recipe.kl_estimator == "k1":
        raise UserError(
            f"{where('kl_estimator')}: k1 as a loss has an expected gradient of 0, so nothing would hold the policy; "
            "use k2 (whose gradient is that of KL(policy || reference)) or k3, or use_kl_loss: false"
        )
    if not recipe.use_kl_loss and recipe.kl_estimator != "k1":
        why = "is biased" if recipe.kl_estimator == "k2" else "has a gradient that vanishes near the reference"
        raise UserError(
            f"{where('kl_estimator')}: {recipe.kl_estimator} inside the reward {why}; use k1, or use_kl_loss: true"
        )
    if recipe.method != "full" and recipe.reference_deepspeed:
        raise UserError(
            f"{where('reference_deepspeed')}: with an adapter the reference is the policy with its adapter off, and has no "
            "engine of its own; leave it out."
        )


def _check_evaluate(recipe: EvaluateRecipe, where: Callable[[str], str]) -> None:
    if recipe.temperature < 0:
        raise UserError(f"{where('temperature')}: expected 0 (the likeliest token) or more, got {recipe.temperature}")
    _check_ranges(dataclasses.replace(recipe, temperature=recipe.temperature or 1.0), where)
    if not recipe.models:
        raise UserError(f"{where('models')}: expected folders or hub ids of models, got none")
    if not recipe.train_dataset and not recipe.eval_dataset:
        raise UserError(
            f"{where('eval_dataset')}: expected rows to evaluate on, got no eval_dataset and no train_dataset"
        )
    if any(source.weight != 1 for source in recipe.eval_dataset):
        raise UserError(f"{where('eval_dataset')}: `weight` is for training rows; limit evaluation rows by `max_rows`.")
    if not recipe.metrics and recipe.grader is None:
        raise UserError(f"{where('metrics')}: expected names of metrics, or a `grader`, got neither")
    if recipe.grader is not None:
        _check_function(recipe.grader, where("grader"))
    if "" in recipe.stop_strings:
        raise UserError(f"{where('stop_strings')}: expected text that ends a prediction, got an empty string")
    shots = recipe.num_shots
    if not shots or min(shots) < 0 or len(set(shots)) < len(shots):
        raise UserError(f"{where('num_shots')}: expected different numbers from 0, got {shots}")
    if max(shots) and not recipe.train_dataset:
        raise UserError(f"{where('train_dataset')}: expected rows that give the {max(shots)} examples, got none")
