"""Scoring preference pairs, by a reward model or by Python rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from align.data.encode import encode_pair
from align.data.reasoning import scored_turns, split_text
from align.data.rows import Preference, Turns, as_response, is_tie, render_text, tools_of
from align.engine.distributed import World
from align.errors import UserError
from align.evaluate.bootstrap import Floats
from align.generation.scoring import score_ids
from align.judge.pairs import Outcomes, number_prompts
from reward_models.combine import RewardSum
from reward_models.responses import Responses
from reward_models.trained import ModelReward

SIDES = ("chosen", "rejected")


class Scorer(Protocol):
    """A reward model or a sum of Python rewards."""

    def score(self, rows: Sequence[Preference], responses: Sequence[Turns]) -> Floats:
        """Scores [n] of responses to the prompts of n rows, on every rank."""
        ...


@dataclass(frozen=True, slots=True)
class ModelScorer:
    """A trained reward model; prompts and responses are tokenized as in its training."""

    reward: ModelReward
    world: World
    tokenizer: PreTrainedTokenizerBase
    is_encoder: bool

    def score(self, rows: Sequence[Preference], responses: Sequence[Turns]) -> Floats:
        """Scores [n], on every rank."""
        ids = [
            encode_pair(
                self.tokenizer, row.prompt, scored_turns(self.tokenizer, response), self.is_encoder, tools_of(row)
            )
            for row, response in zip(rows, responses, strict=True)
        ]
        return np.asarray(score_ids(self.reward, self.world, ids).double().numpy())


@dataclass(frozen=True, slots=True)
class FunctionScorer:
    """A sum of Python rewards. There is no tokenizer: `completion_ids` are empty lists."""

    rewards: RewardSum
    world: World
    score_reasoning: bool
    batch_size: int
    on_pass: Callable[[int], None] = lambda count: None

    def score(self, rows: Sequence[Preference], responses: Sequence[Turns]) -> Floats:
        """Scores [n], on every rank.

        Raises:
            UserError: a function fails, or gives a row no score.
        """
        scores = torch.zeros(len(rows), dtype=torch.float64, device=self.world.device)
        size = self.batch_size
        for start in range(0, len(rows), size * self.world.size):
            mine = slice(start + self.world.rank * size, start + (self.world.rank + 1) * size)
            all_ranks = slice(start, start + size * self.world.size)
            if rows[mine]:
                try:
                    found = self.rewards.score(self._batch(rows[mine], responses[mine]))[0]
                except ValueError as error:
                    raise UserError(f"reward_funcs: {error}") from error
                scores[mine] = found.double().to(scores.device)
            scores[all_ranks] = self.world.sum(
                scores[all_ranks]
            )  # after each batch, so that ranks wait for one call at most, which `reward_timeout` limits
            self.on_pass(len(rows[mine]))
        return np.asarray(scores.cpu().numpy())

    def _batch(self, rows: Sequence[Preference], responses: Sequence[Turns]) -> Responses:
        if not self.score_reasoning:
            responses = [_answer(response) for response in responses]
        texts = [render_text(response) for response in responses]
        names = dict.fromkeys(name for row in rows for name in row.extra)
        columns = {name: [row.extra.get(name) for row in rows] for name in names}
        empty: list[list[int]] = [[] for _ in rows]
        return Responses([row.prompt for row in rows], texts, list(responses), empty, empty, columns)


def _answer(response: Turns) -> Turns:
    if isinstance(response, str):
        return split_text(response)[1]
    return [{**turn, "content": split_text(turn["content"])[1]} for turn in response]


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """n pairs with the scores [n] of their chosen and of their rejected responses."""

    rows: list[Preference]
    chosen: Floats
    rejected: Floats

    @classmethod
    def from_scorer(cls, scorer: Scorer, rows: Sequence[Preference]) -> ScoredPairs:
        """Score both responses of each pair."""
        return cls(list(rows), *(scorer.score(rows, [getattr(row, side) for row in rows]) for side in SIDES))

    @property
    def outcomes(self) -> Outcomes:
        """The margins of the pairs."""
        prompts = number_prompts([render_text(row.prompt) for row in self.rows])
        return Outcomes(self.chosen - self.rejected, prompts, np.array([is_tie(row) for row in self.rows], dtype=bool))

    @property
    def lengths(self) -> tuple[Floats, Floats]:
        """Characters [n] of the chosen and of the rejected responses."""
        chosen, rejected = (
            np.array([len(render_text(getattr(row, side))) for row in self.rows], dtype=np.float64) for side in SIDES
        )
        return chosen, rejected


def with_text(response: Turns, text: str) -> Turns:
    """A response with its text replaced, as text or as messages like the original."""
    return text if isinstance(response, str) else [{"role": "assistant", "content": text}]


def as_pair(prompt: Turns, chosen: str, rejected: str, where: str, extra: dict[str, Any] | None = None) -> Preference:
    """A row from texts, in the format (text or messages) of its prompt."""
    return Preference(prompt, as_response(prompt, chosen), as_response(prompt, rejected), where, extra or {})
