"""The interface through which every stage uses a model, and the two engines that wrap another one.

`align.engine.build` makes the engine of a model: plain torch on one process without a DeepSpeed file, DeepSpeed
otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from align.engine.distributed import World
from align.models.save import save_base_weights


@runtime_checkable
class Engine(Protocol):
    """A model on its device, possibly sharded over ranks, that runs forward."""

    module: nn.Module
    world: World

    def __call__(self, **inputs: Any) -> Any:
        """The model's output. Under ZeRO-3 every rank must call it as often as the others."""

    def unsharded(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The model in evaluation mode with all its weights on this rank, so that ranks generate independently."""


class TrainEngine(Engine, Protocol):
    """An engine that also trains and saves its model.

    The loss given to `backward` is this rank's share of one global sum: shares are added over microbatches and ranks,
    never averaged, so the gradient does not depend on how a batch is split.
    """

    def begin_step(self, passes: int) -> None:
        """Say how many calls of `backward` the next step has on each rank; without, as many as the engine was built for."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the global loss."""

    def step(self, learning_rate: float) -> float:
        """Take one optimizer step, after the last microbatch; returns the gradient norm before clipping."""

    def discard(self) -> None:
        """Drop the gradients accumulated since the last step."""

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, unsharded, on the CPU of rank 0; an empty dict elsewhere. Every rank must call it."""

    def save_pretrained(self, folder: Path) -> None:
        """Write a Hugging Face folder (safetensors) from rank 0, adapters merged. Every rank must call it."""

    def save_checkpoint(self, folder: Path) -> dict[str, list[int]]:
        """Write weights and optimizer state for an exact resume. Every rank must call it.

        Returns:
            size and CRC-32 of each file that this rank wrote, by its name in `folder`.
        """

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what `save_checkpoint` wrote, in any layout; in the same one training continues bit for bit.

        Every rank must call it.
        """


class AdapterOff:
    """The frozen model under a LoRA policy: the policy with its adapter disabled. It takes no memory of its own."""

    def __init__(self, policy: TrainEngine):
        self.policy = policy
        self.module = policy.module
        self.world = policy.world

    def __call__(self, **inputs: Any) -> Any:
        with torch.no_grad(), self.module.disable_adapter():  # type: ignore[operator]
            return self.policy(**inputs)

    def save_pretrained(self, folder: Path) -> None:
        """Write the model without its adapter as a Hugging Face folder, from rank 0. Every rank must call it."""
        weights = self.policy.state_dict()
        if self.world.is_main:
            save_base_weights(self.module, weights, folder)  # type: ignore[arg-type]
        self.world.barrier()

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[nn.Module]:
        with self.policy.unsharded() as model, model.disable_adapter():  # type: ignore[operator]
            yield model


class WholeModel:
    """A model that only runs forward and is whole on every rank, however many there are."""

    def __init__(self, model: nn.Module, world: World):
        self.module = model.to(world.device).eval()
        self.world = world

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def unsharded(self) -> contextlib.AbstractContextManager[nn.Module]:
        return contextlib.nullcontext(self.module)


class NoUpdateEngine:
    """An engine for dry runs of training: it runs forward as `engine` does, and ignores `backward` and `step`."""

    def __init__(self, engine: TrainEngine):
        self.module = engine.module
        self.world = engine.world
        self.unsharded = engine.unsharded
        self.state_dict = engine.state_dict
        self.save_pretrained = engine.save_pretrained
        self.save_checkpoint = engine.save_checkpoint
        self.load_checkpoint = engine.load_checkpoint
        self._engine = engine

    def __call__(self, **inputs: Any) -> Any:
        return self._engine(**inputs)

    def begin_step(self, passes: int) -> None:
        pass

    def backward(self, loss: Tensor) -> None:
        pass

    def step(self, learning_rate: float) -> float:
        return 0.0

    def discard(self) -> None:
        pass
