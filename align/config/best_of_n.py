"""Keys of `align bon`, best-of-n, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.config.data_source import DataSource
from align.config.ensemble import (
    check_ensemble_rules,
    list_reward_models,
    reward_ensemble,
    reward_model_path,
    reward_names,
    reward_variance_coef,
)
from align.config.judge import check_judge_is_another, judge_reward_funcs, judge_reward_model_path
from align.config.keys import (
    ABOVE_0,
    AT_LEAST_0,
    BATCH,
    RESAMPLES,
    SEED,
    TOKENS,
    Range,
    Where,
    check_function_names,
    check_ranges,
    key,
    required,
    reward_timeout,
    score_reasoning,
)
from align.config.recipe import Recipe
from align.config.responses import check_scored_responses
from align.errors import UserError

SAMPLES = Range("at least 2", lambda value: value >= 2, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfNRecipe(Recipe):
    """`align bon`: best-of-n sampling, its frontier of reward against KL, and data sets of the best responses.

    Each prompt gets `num_generations` responses, which are scored as PPO scores them. Nothing is trained.
    """

    output_dir: str = required(
        "Folder for `results.json`, `results.md`, `frontier.svg`, and the data sets `best.jsonl`, `random.jsonl`, `pairs.jsonl` and "
        "`responses.jsonl`."
    )
    accept_changes: list[str] = key(
        [],
        "Keys such as train_dataset or reward_funcs: what they name may have changed since the results in `output_dir`.",
    )
    seed: int = key(42, "Seed of sampling, of random choices and of resampling.", SEED)

    model_name_or_path: str = required("Language model to sample from: an SFT model, or a policy.")
    reward_model_path: list[str] = reward_model_path()
    reward_ensemble: Literal["mean", "wco", "uwo"] = reward_ensemble()
    reward_variance_coef: float | None = reward_variance_coef()
    reward_funcs: list[str] = key(
        [], "`module:function` rewards with TRL's signature; the module may be a file beside the recipe."
    )
    reward_weights: list[float] = key(
        [], "Weights of the reward model or ensemble (first, if any) and of `reward_funcs`; 1 each by default."
    )
    judge_reward_model_path: str | None = judge_reward_model_path()
    judge_reward_funcs: list[str] = judge_reward_funcs()
    reward_timeout: float = reward_timeout()
    score_reasoning: bool = score_reasoning()

    train_dataset: list[DataSource] = required(
        "Prompts: those that PPO is evaluated on for a frontier to compare with PPO's, those to train on for data sets."
    )

    num_generations: int = key(16, "Responses to each prompt, N; estimates are for every n up to N.", SAMPLES)
    max_prompt_length: int = key(512, "Maximum tokens of a prompt; longer prompts are bad rows.", TOKENS)
    response_length: int = key(53, "Maximum tokens of a response.", TOKENS)
    stop_strings: list[str] = key([], "A response also ends with the token that completes one of these strings.")
    temperature: float = key(1.0, "Sampling temperature; the KL divergence is from the model at it.", ABOVE_0)
    missing_eos_penalty: float | None = key(
        None, "Subtracted from the score of a response that does not end.", AT_LEAST_0
    )
    missing_eos_score: float | None = key(None, "Replaces the score of a response that does not end.")
    rejected: Literal["worst", "random"] = key(
        "worst", "The rejected response in `pairs.jsonl`: the worst, or a random one with a lower score than the best."
    )
    bootstrap_iters: int = key(1000, "Resamples of the prompts for each interval.", RESAMPLES)

    per_device_eval_batch_size: int = key(16, "Responses decoded and scored at once per device.", BATCH)

    def __post_init__(self) -> None:
        list_reward_models(self)


def check_best_of_n_rules(recipe: BestOfNRecipe, where: Where) -> None:
    """The ranges of the numbers, and the rules between the keys.

    Raises:
        UserError: names the first broken rule.
    """
    check_ranges(recipe, where)
    for name in ("reward_funcs", "judge_reward_funcs"):
        check_function_names(getattr(recipe, name), where(name))
    check_ensemble_rules(recipe, where)
    check_scored_responses(recipe, reward_names(recipe), where)
    check_judge_is_another(recipe, where)
    if not recipe.train_dataset:
        raise UserError(f"{where('train_dataset')}: expected prompts, got nothing; name the rows to respond to.")
