"""This rank's prompts to responses, with the settings that training and evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.data.collate import chunks, pad_left
from align.engine.distributed import World
from align.engine.torch_engine import Engine
from align.generation.generate import generate
from align.generation.sampling import uniforms


@dataclass(frozen=True, slots=True)
class Sampler:
    """How responses are drawn: the settings that training, evaluation and every log-probability share."""

    tokenizer: PreTrainedTokenizerBase
    temperature: float
    response_length: int
    batch_size: int
    seed: int
    gather: bool = True

    def respond(
        self, engine: Engine, world: World, prompts: Sequence[Sequence[int]], purpose: str, indexes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Responses of `engine` to this rank's prompts.

        Returns:
            prompt_ids, prompt_mask [B, Q], response_ids, mask, logprobs [B, T'].
        """
        pad = int(self.tokenizer.pad_token_id)
        prompt_ids, prompt_mask = (tensor.to(world.device) for tensor in pad_left(prompts, pad))
        noise = uniforms(self.seed, purpose, indexes, self.response_length).to(world.device)
        responses = torch.full(noise.shape, pad, device=world.device)
        mask = torch.zeros(noise.shape, dtype=torch.bool, device=world.device)
        logprobs = torch.zeros(noise.shape, device=world.device)

        def anyone(unfinished: bool) -> bool:
            return bool(world.max(torch.tensor(float(unfinished), device=world.device)))

        def fill(model: nn.Module | Engine, together: Callable[[bool], bool]) -> None:
            for part in chunks(len(prompts), self.batch_size):
                ids, real, chances = generate(
                    model, prompt_ids[part], prompt_mask[part], noise[part], self.temperature,
                    int(self.tokenizer.eos_token_id), pad, together,
                )  # fmt: skip
                for whole, piece in ((responses, ids), (mask, real), (logprobs, chances)):
                    whole[part, : ids.shape[1]] = piece

        if self.gather:
            with engine.unsharded() as model:
                fill(model, bool)
        else:
            fill(engine, anyone)
        length = int(mask.sum(dim=1).max())
        return prompt_ids, prompt_mask, responses[:, :length], mask[:, :length], logprobs[:, :length]
