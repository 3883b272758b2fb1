"""Keys of the reward stage."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.base import TrainerRecipe
from align.config.keys import key, required


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRecipe(TrainerRecipe):
    """Stage 2, `align reward`: a scalar reward model from preference pairs."""

    model_name_or_path: str = required(
        "SFT model, another decoder, or an encoder (BERT-like) to put the scalar head on."
    )
    sft_model_path: str | None = key(
        None, "Model whose completions get mean score zero; `model_name_or_path` when that is an SFT stage's output."
    )
    learning_rate: float = key(1e-5, "Peak learning rate of AdamW.")
    center_rewards_coefficient: float | None = key(
        None, "Weight of the squared sum of the two scores, which keeps them near zero (TRL's key)."
    )
    normalize_prompts: int = key(256, "Prompts on which SFT completions are sampled to set the zero of the score.")
    response_length: int = key(64, "Most tokens of those completions.")
    eval_reward_funcs: list[str] = key(
        [], "`module:function` known true rewards; their accuracy on the evaluation pairs is the ceiling."
    )
