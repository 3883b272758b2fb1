"""Responses sampled one update ahead: vLLM samples for the next update while this one trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from align.engine.distributed import World
from align.engine.engine import Engine
from align.engine.parts import SavedParts, write_replicated
from align.generation.sampler import PromptBatch, Sampler, Samples
from align.generation.vllm import Asked

NAMES = ("ids", "mask", "logprobs")


@dataclass(slots=True)
class Ahead:
    """The responses to the prompts of the next update, of the policy before this one.

    Attributes:
        asked: they; None before the first update.
    """

    sampler: Sampler
    world: World
    asked: Asked | None = None

    def sample(self, engine: Engine, batch: PromptBatch, following: PromptBatch | None) -> Samples:
        """The responses to `batch`, and begin those to `following`, by the weights of now.

        Args:
            following: the prompts of the next update; None after the last.

        Raises:
            UserError: a server failed.
        """
        asked = self.asked or self.sampler.ask(engine, self.world, batch)
        samples = self.sampler.receive(asked, batch)
        self.asked = None if following is None else self.sampler.ask(engine, self.world, following)
        return samples

    def save_checkpoint(self, folder: Path) -> dict[str, list[int]]:
        """Write the responses, once they are there, each rank its share; returns size and CRC-32 of each file that it wrote."""
        rows = {} if self.asked is None else dict(zip(NAMES, self.asked.receive(), strict=True))
        return write_replicated(folder, rows, self.world)

    def load_checkpoint(self, folder: Path) -> None:
        """Restore what any number of ranks wrote.

        Raises:
            UserError: the files are damaged.
        """
        saved = SavedParts(folder)
        if not saved.shapes:  # after the last update
            return
        with saved.readable():
            ids, mask, logprobs = (saved.whole(name).to(self.world.device) for name in NAMES)
        rows, length = ids.shape
        self.asked = Asked(self.world, (rows, length), rows=(ids, mask, logprobs))
