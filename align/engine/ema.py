"""An exponential moving average of a model's trained weights; each rank averages its own shard."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from align.compat import full_shape, is_sharded, local_shard
from align.engine.engine import TrainEngine
from align.engine.optimizer import trained_parameters
from align.engine.sharding import save_from_main


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
                average = world.gather(average)[: shape.numel()].view(shape)
            if world.is_main:
                weights[name] = average.cpu().to(weights[name].dtype)
        save_from_main(self.engine.module, weights, folder, world)

    def save_checkpoint(self, folder: Path) -> None:
        """Write this rank's shard."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.averages, self._file(folder))

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what `save_checkpoint` wrote, bit for bit."""
        self.averages = load_file(self._file(folder), device=str(self.engine.world.device))

    def _file(self, folder: Path) -> Path:
        return folder / f"rank-{self.engine.world.rank}.safetensors"
