"""Scores of token sequences, shared out over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from align.engine.distributed import World, rows_of_rank
from reward_models.responses import Responses
from reward_models.trained import ModelReward


def score_ids(reward: ModelReward, world: World, ids: Sequence[list[int]]) -> Tensor:
    """Scores of all sequences, on every rank, each rank having scored its share. [B] float32, on the CPU."""
    mine = [ids[index] for index in rows_of_rank(world, len(ids))]
    texts = [""] * len(mine)
    batch = Responses([*texts], texts, [*texts], prompt_ids=[[] for _ in mine], response_ids=mine)
    return world.gather(reward.score(batch).to(world.device))[: len(ids)].cpu()
