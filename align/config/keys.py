"""How a recipe key is declared: its default, its meaning, and the range of its value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from align.errors import UserError

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


def key(default: Any, meaning: str) -> Any:
    """A recipe key: its default, and the sentence that `--help` prints."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


def required(meaning: str) -> Any:
    """A recipe key without a default."""
    return field(metadata={"help": meaning, "required": True})


def _check_ranges(values: Any, where: Callable[[str], str]) -> None:
    for expected, holds, names in _RANGES:
        for name in names.split():
            value = getattr(values, name, None)
            if value is not None and not holds(value):
                raise UserError(f"{where(name)}: expected a number {expected}, got {value}")


def _check_function(spec: str, where: str) -> None:
    module, _, function = spec.partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{where}: expected `module:function`, got {spec!r}")
