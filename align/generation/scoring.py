"""Reward-model scores of token sequences, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from align.engine.distributed import World, rows_of_rank
from align.engine.faults import during
from reward_models.responses import Responses
from reward_models.trained import ModelReward


@during("evaluation")
def score_ids(reward: ModelReward, world: World, ids: Sequence[list[int]]) -> Tensor:
    """Scores of all sequences, [B] float32 on the CPU of every rank. Each rank scores its share.

    Args:
        ids: B sequences of token ids, prompt and response together, the same on every rank.
    """
    share = [ids[index] for index in rows_of_rank(world, len(ids))]
    texts = [""] * len(share)
    batch = Responses([*texts], texts, [*texts], prompt_ids=[[] for _ in share], response_ids=share)
    return world.gather(reward.score(batch).to(world.device))[: len(ids)].cpu()
