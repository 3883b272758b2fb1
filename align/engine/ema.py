"""An exponential moving average of a model's trained weights; each rank averages its own shard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from align.compat.deepspeed import full_shape, is_sharded, local_shard
from align.engine.engine import TrainEngine
from align.engine.optimizer import trained_parameters
from align.engine.parts import Part, SavedParts, write_parts
from align.engine.sharding import save_from_main
from align.errors import UserError

AVERAGE = "average"


class EMA:
    """average <- decay * average + (1 - decay) * weights, float32, once per update (arXiv 2203.02155 uses 0.992)."""

    def __init__(self, engine: TrainEngine, decay: float):
        self.engine, self.decay = engine, decay
        self.averages = {name: local_shard(p).float().clone() for name, p in trained_parameters(engine.module)}

    @torch.no_grad()
    def update(self) -> None:
        """Include the current weights."""
        for name, parameter in trained_parameters(self.engine.module):
            self.averages[name].lerp_(local_shard(parameter).float(), 1 - self.decay)

    def save_pretrained(self, folder: Path) -> None:
        """Write the averaged model as a Hugging Face folder from rank 0. Every rank must call it."""
        world = self.engine.world
        weights = self.engine.state_dict()
        for name, parameter in trained_parameters(self.engine.module):
            average = self.averages[name]
            if is_sharded(parameter):  # shards are padded to one size
                shape = full_shape(parameter)
                on_device = average.to(world.device)  # offloaded shards are on the CPU, where NCCL gathers nothing
                average = world.gather(on_device)[: shape.numel()].view(shape)
            if world.is_main:
                weights[name] = average.cpu().to(weights[name].dtype)
        save_from_main(self.engine.module, weights, folder, world)

    def save_checkpoint(self, folder: Path) -> dict[str, list[int]]:
        """Write this rank's part; returns size and CRC-32 of each file that it wrote, by its name in `folder`."""
        parts = {}
        for name, (sharded, shape, start, held) in self._local_parts().items():
            parts[name] = Part(tuple(shape), start, {AVERAGE: held}, replicated=not sharded)
        return write_parts(folder, parts, self.engine.world)

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what `save_checkpoint` wrote, bit for bit, in any layout.

        Raises:
            UserError: the files are damaged or of another model.
        """
        saved = SavedParts(folder)
        for name, (_, shape, start, held) in self._local_parts().items():
            if saved.shapes.get(name) != tuple(shape):
                raise UserError(
                    f"{folder}: holds the averages of another model: {name} has shape {saved.shapes.get(name)} there and "
                    f"{tuple(shape)} in this run; delete the output folder to start over."
                )
            if len(held):
                held.copy_(saved.read(name, AVERAGE, start, len(held)))

    def _local_parts(self) -> dict[str, tuple[bool, torch.Size, int, Tensor]]:
        """By name: whether ranks hold parts, shape of the whole average, where the part begins, and the part."""
        held = {}
        for name, parameter in trained_parameters(self.engine.module):
            average, shape = self.averages[name].view(-1), full_shape(parameter)
            sharded = is_sharded(parameter)
            start = len(average) * self.engine.world.rank if sharded else 0
            held[name] = (sharded, shape, start, average[: max(0, shape.numel() - start)])  # without padding
        return held
