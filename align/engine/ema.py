"""An exponential moving average of a model's trained weights, kept where the weights are: each rank has its shard."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.engine.torch_engine import Engine
from align.models.save import save_weights


class EMA:
    """average <- decay average + (1 - decay) weights, in float32, once per update (arXiv 2203.02155 uses 0.992)."""

    def __init__(self, engine: Engine, decay: float):
        self.engine, self.decay = engine, decay
        self.averages = {name: _shard(p).float().clone() for name, p in self._trained()}

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as they are now."""
        for name, parameter in self._trained():
            self.averages[name].lerp_(_shard(parameter).float(), 1 - self.decay)

    def save_pretrained(self, folder: Path) -> None:
        """Write the averaged model as a Hugging Face folder from rank 0. Every rank must call it."""
        world = self.engine.world
        weights = self.engine.state_dict()
        for name, parameter in self._trained():
            whole = self.averages[name]
            if (shape := getattr(parameter, "ds_shape", None)) is not None:  # shards are padded to one size
                whole = world.gather(whole)[: shape.numel()].view(shape)
            if world.is_main:
                weights[name] = whole.cpu().to(weights[name].dtype)
        if world.is_main:
            save_weights(self.engine.module, weights, folder)
        world.barrier()

    def save_checkpoint(self, folder: Path) -> None:
        """Write this rank's part."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.averages, self._file(folder))

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from `save_checkpoint`, to the bit."""
        self.averages = load_file(self._file(folder), device=str(self.engine.world.device))

    def _file(self, folder: Path) -> Path:
        return folder / f"rank-{self.engine.world.rank}.safetensors"


def _shard(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: a flat piece under ZeRO-3, all of it otherwise."""
    shard: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    return shard
