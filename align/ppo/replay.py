"""The replay buffer of the objectives `trajectory_balance` and `path_consistency`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from align.engine.distributed import World
from align.engine.parts import SavedParts, write_replicated
from align.generation.sampling import generator
from align.ppo.rollout import Rollout, pad_rollout


@dataclass(slots=True)
class Replay:
    """The newest sampled and scored responses, oldest first; the same on every rank.

    Attributes:
        size: maximum number of responses.
        rows: the responses; None before the first rollout.
    """

    size: int
    world: World
    pad_token_id: int
    rows: Rollout | None = None

    def add(self, rollout: Rollout) -> None:
        """Append a rollout, and drop the oldest responses beyond `size`."""
        if self.rows is not None:
            pair = (self.rows, rollout)
            prompt_width, response_width = (
                max(getattr(each, name).shape[1] for each in pair) for name in ("prompt_mask", "mask")
            )
            wide = [pad_rollout(each, prompt_width, response_width, self.pad_token_id) for each in pair]
            rollout = Rollout(**{name: torch.cat([getattr(each, name) for each in wide]) for name in Rollout.axes()})
        newest = torch.arange(max(0, len(rollout) - self.size), len(rollout), device=self.world.device)
        self.rows = rollout.rows(newest)

    def draw(self, seed: int, update: int, steps: int, count: int, group_size: int) -> Iterator[Tensor]:
        """Indices of the rows [`count`] of each of `steps` minibatches, in whole groups of responses to one prompt.

        Groups are taken from successive seeded permutations of all groups, so that they are used about equally often.

        Args:
            group_size: responses to a prompt, which are consecutive rows.
        """
        assert self.rows is not None
        groups, each = len(self.rows) // group_size, count // group_size
        order = torch.empty(0, dtype=torch.int64)
        permutations = 0
        for _ in range(steps):
            while len(order) < each:
                more = torch.randperm(groups, generator=generator(seed, "replay", update, permutations))
                order, permutations = torch.cat([order, more]), permutations + 1
            chosen, order = order[:each], order[each:]
            yield (chosen[:, None] * group_size + torch.arange(group_size)).flatten().to(self.world.device)

    def save_checkpoint(self, folder: Path) -> dict[str, list[int]]:
        """Write the rows, each rank its share; returns size and CRC-32 of each file that this rank wrote."""
        rows = {} if self.rows is None else {name: getattr(self.rows, name) for name in Rollout.axes()}
        return write_replicated(folder, rows, self.world)

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what any number of ranks wrote.

        Raises:
            UserError: the files are damaged.
        """
        saved = SavedParts(folder)
        with saved.readable():
            rows = {name: saved.whole(name).to(self.world.device) for name in saved.shapes}
            self.rows = Rollout(**rows)
