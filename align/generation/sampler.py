"""Responses of a model to this rank's prompts, with the settings that training and evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.collate import pad_left
from align.data.end_tokens import end_ids
from align.data.rows import Prompt
from align.engine.distributed import World
from align.engine.engine import Engine
from align.engine.faults import during
from align.generation.captured import cuda_graph
from align.generation.ending import Ending, after_end
from align.generation.generate import generate
from align.generation.responses import gather_responses
from align.generation.sampling import seed_of, uniforms
from align.generation.vllm import VLLM, Asked, Sampled, Saved


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """b prompts of this rank with their token ids. `purpose` and a row's index seed the sampling noise of its response."""

    prompts: Sequence[Prompt]
    ids: Sequence[Sequence[int]]
    purpose: str
    indexes: Sequence[int]


@dataclass(slots=True)
class Samples:
    """Sampled responses to b prompts: prompts are padded on the left to Q, responses on the right to T. Masks: True = real."""

    prompts: Sequence[Prompt]
    prompt_ids: Tensor  # [b, Q] int64
    prompt_mask: Tensor  # [b, Q] bool
    response_ids: Tensor  # [b, T] int64, up to and including end-of-text
    mask: Tensor  # [b, T] bool
    ended: Tensor  # [b] bool, whether the response ends by itself: with end-of-text, or with a stop string
    logprobs: Tensor  # [b, T] float32, nats, as the decoding loop computed them


@dataclass(frozen=True, slots=True)
class Sampler:
    """How responses are sampled; every log-probability of the run is taken at the same temperature.

    Attributes:
        response_length: tokens of a response at most.
        batch_size: rows of one decoding batch per device.
        gather: under ZeRO-3, decode with a gathered copy of the model instead of the sharded one.
        cuda_graphs: run decoding steps as CUDA graphs.
        stop_strings: end a response too, see `Ending`.
        vllm: servers that sample instead of the decoding loop.
    """

    tokenizer: PreTrainedTokenizerBase
    temperature: float
    response_length: int
    batch_size: int
    seed: int
    gather: bool = True
    cuda_graphs: bool = False
    stop_strings: Sequence[str] = ()
    vllm: VLLM | None = None

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @during("generate")
    def sample(self, engine: Engine, world: World, batch: PromptBatch) -> Samples:
        """Responses of `engine`. With `gather` false all ranks must call this together, with as many prompts each."""
        if self.vllm is not None:
            return self.receive(self.ask(engine, world, batch), batch)
        prompts = self._prompts(world, batch)
        ending = Ending(self.tokenizer, self.stop_strings)
        return self._samples(batch, prompts, self._decode(engine, world, batch, *prompts, ending), ending)

    def ask(self, engine: Engine, world: World, batch: PromptBatch) -> Asked:
        """Send the weights of `engine` to the vLLM servers, which begin to sample for the prompts of all ranks."""
        assert self.vllm is not None
        with world.clock.phase("send_weights"):
            self.vllm.send_weights(cast("Saved", engine))
        longest = int(world.max(torch.tensor(max(map(len, batch.ids)), device=world.device)))
        prompts = gather_responses(world, batch.ids, longest)
        indexes = world.gather(torch.tensor(batch.indexes, device=world.device)).tolist()
        asked = Asked(world, (len(prompts), self.response_length))
        if world.is_main:
            seeds = [seed_of(self.seed, batch.purpose, index) for index in indexes]
            ends = end_ids(self.tokenizer)
            asked.future = self.vllm.start(prompts, seeds, self.temperature, self.response_length, ends)
        return asked

    def receive(self, asked: Asked, batch: PromptBatch) -> Samples:
        """The responses to this rank's share of the prompts, with `batch` as it was asked for."""
        world = asked.world
        mine = slice(world.rank * len(batch.ids), (world.rank + 1) * len(batch.ids))
        ids, mask, logprobs = (tensor[mine] for tensor in asked.receive())
        ending = Ending(self.tokenizer, self.stop_strings)
        if self.stop_strings:
            mask = mask & ~after_end(ids, mask, ending)
        rows = ids.masked_fill(~mask, self.pad_token_id), mask, logprobs.masked_fill(~mask, 0.0)
        return self._samples(batch, self._prompts(world, batch), rows, ending)

    def _prompts(self, world: World, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        ids, mask = pad_left(batch.ids, self.pad_token_id)
        return ids.to(world.device), mask.to(world.device)

    def _samples(
        self, batch: PromptBatch, prompts: tuple[Tensor, Tensor], responses: Sampled, ending: Ending
    ) -> Samples:
        prompt_ids, prompt_mask = prompts
        response_ids, mask, logprobs = responses
        lengths = mask.sum(dim=1)
        length = int(lengths.max())
        return Samples(
            prompts=batch.prompts,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids[:, :length],
            mask=mask[:, :length],
            ended=ending.ended(response_ids, lengths),
            logprobs=logprobs[:, :length],
        )

    def _decode(
        self,
        engine: Engine,
        world: World,
        batch: PromptBatch,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        ending: Ending,
    ) -> Sampled:
        """Response ids, mask and log-probabilities [b, T], by the decoding loop."""
        noise = uniforms(self.seed, batch.purpose, batch.indexes, self.response_length).to(world.device)

        settings = prompt_ids, prompt_mask, noise, self.temperature, ending
        if not self.gather:
            return generate(engine, *settings, world.any_rank, self.batch_size)
        with engine.unsharded() as model:
            capture = cuda_graph if self.cuda_graphs else None
            return generate(model, *settings, batch_size=self.batch_size, capture=capture)
