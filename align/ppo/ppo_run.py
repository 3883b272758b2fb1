"""The objects of a PPO run: the models, the state that changes from update to update, and all of it together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from align.config.ppo import PPORecipe
from align.data.rows import Prompt
from align.engine.batch_plan import BatchPlan
from align.engine.distributed import World
from align.engine.ema import EMA
from align.engine.engine import Engine, TrainEngine
from align.generation.sampler import Sampler
from align.maths.running_moments import RunningMoments
from align.ppo.replay import Replay
from reward_models.combine import RewardSum

TokenizedPrompt = tuple[Prompt, list[int]]
Sums = dict[str, Tensor]  # scalars by metric: sums over the tokens of a microbatch


@dataclass(frozen=True, slots=True)
class Models:
    """Policy and value model are trained, the others frozen. Only GAE has a value model; the judge never enters training.

    Attributes:
        values_are_scores: whether the value model starts as the reward model, its head included.
    """

    policy: TrainEngine
    value: TrainEngine | None
    reference: Engine
    rewards: RewardSum
    judge: RewardSum | None = None
    values_are_scores: bool = False

    @property
    def reward_names(self) -> list[str]:
        """Names of reward sources and members of ensembles, in the order of `Rollout.source_scores`."""
        return self.rewards.names

    def discard(self) -> None:
        """Drop the gradients since the last optimizer step."""
        self.policy.discard()
        if self.value is not None:
            self.value.discard()


def truncated(rewards: RewardSum, world: World) -> float:
    """Responses so far that a reward model had to truncate, since it has fewer positions, summed over all ranks."""
    count = sum(model.truncated for model in rewards.models)
    return float(world.sum(torch.tensor(float(count), device=world.device)))


@dataclass(slots=True)
class Progress:
    """The state of a run beside weights and optimizer states; it is part of a checkpoint.

    Attributes:
        kl_coef: of the next update, in units of score per nat.
        best: metrics of the evaluation whose policy is in `best/`; update 0 is the SFT model.
        best_worth: what its responses are worth by `metric_for_best_model`, by held-out prompt.
        falls: evaluations in a row that were worse than it, with the interval of the difference.
        history: metrics of all evaluations, with their update.
        sampler_gap: largest difference between a log-probability of the decoding loop and of the training forward pass
            when they were last compared, nats.
        eos_rate: highest share of responses that end by themselves so far, of the SFT model or since; None before the first.
        warned, inherited: signs of collapse that were warned of, and those that the SFT model showed and that have lasted.
    """

    kl_coef: float
    score_moments: RunningMoments = field(default_factory=RunningMoments)
    best: dict[str, Any] | None = None
    best_worth: list[float] = field(default_factory=list)
    falls: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    sampler_gap: float = math.inf
    eos_rate: float | None = None
    warned: list[str] = field(default_factory=list)
    inherited: list[str] = field(default_factory=list)


@dataclass(slots=True)
class PPORun:
    """A PPO run on one rank: all that its updates and evaluations work with.

    Attributes:
        prompts: training prompts with their token ids.
        scoring_passes: least number of forward passes, of rows of similar length, in which a rollout is scored.
        learning_rates: of policy and value model, for each update.
        ptx: tokenized rows of `ptx_dataset`.
        replay: the responses that `objective: trajectory_balance` keeps.
        skipped_in_a_row: minibatches skipped since the last one with a finite loss.
    """

    recipe: PPORecipe
    plan: BatchPlan
    world: World
    models: Models
    sampler: Sampler
    prompts: Sequence[TokenizedPrompt]
    scoring_passes: int
    learning_rates: Sequence[tuple[float, float]]
    progress: Progress
    ema: EMA | None = None
    ptx: Dataset | None = None
    replay: Replay | None = None
    skipped_in_a_row: int = 0

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return len(self.learning_rates)

    @property
    def kl_price(self) -> float:
        """What a nat costs, in units of score: the coefficient, times the running spread where scores are normalized by it."""
        return self.progress.kl_coef * (self.progress.score_moments.std if self.recipe.scores_are_normalized else 1.0)
