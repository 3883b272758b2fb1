"""Keys of the reward stage, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.base import TrainerRecipe, check_trainer_rules
from align.config.keys import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    SEED,
    TOKENS,
    Range,
    Where,
    key,
    required,
    reward_timeout,
    score_reasoning,
)
from align.config.sequence_parallel import check_sequence_parallel_rules, sequence_parallel_size
from align.errors import UserError

METRICS = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")  # of an evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRecipe(TrainerRecipe):
    """Stage 2, `align reward`: a scalar reward model from preference pairs."""

    model_name_or_path: str = required("SFT model, another decoder, or an encoder (BERT-like); it gets a scalar head.")
    sft_model_path: str | None = key(
        None,
        "Model whose completions get mean score 0; by default `model_name_or_path` if that is the output of an SFT "
        "stage.",
    )
    new_head: bool = key(
        False,
        "Start with a new scalar head. By default, the one in the files of `model_name_or_path` is kept if there is one, "
        "under whatever name it was saved, such as TRL's `v_head`; one with more than one output is refused.",
    )
    learning_rate: float = key(1e-5, "Peak learning rate.", ABOVE_0)
    sequence_parallel_size: int = sequence_parallel_size()
    center_rewards_coefficient: float | None = key(
        None, "Weight of the squared sum of the two scores, which keeps them near zero (TRL's key).", AT_LEAST_0
    )
    normalize_prompts: int = key(
        256, "Number of prompts whose SFT completions are sampled to set the zero of the score.", AT_LEAST_1
    )
    response_length: int = key(64, "Maximum tokens of the completions of `normalize_prompts`.", TOKENS)
    score_reasoning: bool = score_reasoning()
    ensemble_size: int = key(
        1,
        "Number of reward models, of the seeds from `seed` up, each in a folder of its own in `output_dir`: member_1, member_2, ... "
        "They share the rows, of which `seed` decides which are held out.",
        Range("from 1 to 100", lambda value: 1 <= value <= 100),
    )
    train_judge: bool = key(
        False,
        "Split the training pairs in two halves that share no prompt, and train the reward model on one and, with the next "
        "seed, a judge on the other, in `output_dir`/judge: a reward that PPO never trains on, for `judge_reward_model_path`. "
        "The halves are the same for every seed.",
    )
    eval_reward_funcs: list[str] = key(
        [],
        "`module:function` rewards that are the ground truth; their accuracy on the evaluation pairs is the ceiling.",
    )
    reward_timeout: float = reward_timeout()


def check_reward_rules(recipe: RewardRecipe, where: Where) -> None:
    """The rules between the keys of the reward stage.

    Raises:
        UserError: names the first broken rule.
    """
    check_trainer_rules(recipe, where, METRICS)
    check_sequence_parallel_rules(recipe, where)
    models = recipe.ensemble_size + recipe.train_judge
    if recipe.seed + models - 1 > SEED.largest:
        raise UserError(f"{where('seed')}: of {models} models, the last one's would be too large")
    for name in ("train_dataset", "eval_dataset"):
        for index, source in enumerate(getattr(recipe, name)):
            if source.templates:
                raise UserError(
                    f"{where(name)}[{index}].templates: they produce prompts and completions, and this stage reads "
                    "pairs with `chosen` and `rejected`; leave them out."
                )
