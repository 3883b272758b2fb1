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
from align.engine.sequence_parallel import SequenceGroup
from align.generation.sampler import Sampler
from align.maths.running_moments import RunningMoments
from align.ppo.ahead import Ahead
from align.ppo.replay import Replay
from reward_models.combine import RewardSum

TokenizedPrompt = tuple[Prompt, list[int]]
Sums = dict[str, Tensor]  # scalars by metric: sums over the tokens of a microbatch


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a run. Policy and value model (GAE only) are trained, the others frozen; the judge only evaluates.

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
    """Number of responses that reward models have truncated to their maximum length so far, over all ranks."""
    count = sum(model.truncated for model in rewards.models)
    return float(world.sum(torch.tensor(float(count), device=world.device)))


@dataclass(slots=True)
class Progress:
    """The state of a run other than weights and optimizer states; it is part of a checkpoint.

    Attributes:
        kl_coef: KL coefficient of the next update, in units of the score (normalized, if scores are) per nat.
        score_moments: running moments of the scores.
        best: metrics of the evaluation whose policy is in `best/`, and its `update`, 0 for the SFT model.
        best_worth: its `metric_for_best_model` for each held-out prompt.
        falls: number of consecutive evaluations that were significantly worse than it.
        history: metrics of all evaluations, with their update.
        sampler_gap: largest difference between the log-probabilities of decoding loop and training at the last comparison,
            in nats.
        eos_rate: highest EOS rate so far, the SFT model's included; None before it is measured.
        warned: kinds of collapse that were reported.
        inherited: kinds of collapse that the first update showed and that have lasted since.
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
    """A PPO run on one rank: everything that updates and evaluations need.

    Attributes:
        prompts: training prompts with their token ids.
        scoring_passes: minimum number of forward passes, with rows of similar length, to score a rollout.
        learning_rates: of policy and value model, for each update.
        ptx: tokenized rows of `ptx_dataset`.
        replay: earlier responses, for other objectives than PPO, which has None.
        ahead: responses of the next update, with `one_step_off_policy`.
        sequence: the processes that share rows with this one in training passes, if any.
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
    ahead: Ahead | None = None
    sequence: SequenceGroup | None = None
    skipped_in_a_row: int = 0

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return len(self.learning_rates)

    @property
    def raw_score_kl_coef(self) -> float:
        """The KL coefficient in units of the raw score: times the running standard deviation if scores are normalized."""
        return self.progress.kl_coef * (self.progress.score_moments.std if self.recipe.scores_are_normalized else 1.0)
