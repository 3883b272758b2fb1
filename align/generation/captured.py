"""A decoding step of fixed shapes and addresses, which a GPU runs as one CUDA graph: Python starts it by a single operation.

The graph is the model's forward pass. Choosing tokens, a tenth of the operations or less, stays outside. Between two changes of
the rows, steps attend to all columns of the cache's buffers, of which a mask hides those that are not written yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from transformers import PretrainedConfig

from align.compat.transformers import has_fixed_step
from align.errors import reason
from align.generation.decoder import Cached, Decoder
from align.generation.kv_cache import PreallocatedLayer
from align.terminal import say
from reward_models.heads import hf_model

Step: TypeAlias = Callable[[], Tensor]
TOLERANCE = 0.05  # nats, mean over the vocabulary: bfloat16 rounds otherwise where attention sums over more columns


def cuda_graph(step: Step) -> Step:
    """`step` as a CUDA graph, whose result is overwritten by the next call."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()  # libraries set up what they keep
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class Captured(Cached):
    """`Cached`, whose steps between two changes of its rows are one captured step.

    The first step of a process is also computed as `Cached` does; if the two differ, or the step cannot be captured, all steps
    are `Cached`'s from then on, and one line says so.

    Args:
        capture: makes of a step one that computes the same on what is at the same addresses then.
    """

    works: ClassVar[bool | None] = None  # of this process; None before the first step
    place: Tensor  # [1], the column of the last token
    written: Tensor  # [B, columns] int64, 1 where a row has a token
    columns: int  # of the cache's buffers

    def __init__(
        self, model: Any, cache_name: str, config: PretrainedConfig, length: int, capture: Callable[[Step], Step]
    ):
        super().__init__(model, cache_name, config, length)
        self.capture = capture
        self.replay: Step | None = None

    def admit(self, prompt_ids: Tensor, prompt_mask: Tensor, sizes: Sequence[int]) -> Tensor:
        self._release()
        return super().admit(prompt_ids, prompt_mask, sizes)

    def keep(self, order: Sequence[int], index: Tensor) -> None:
        self._release()
        super().keep(order, index)

    def append(self, tokens: Tensor) -> None:
        if self.replay is None:
            super().append(tokens)
        else:
            self.ids.copy_(tokens[:, None])

    def logits(self) -> Tensor:
        if Captured.works is False:
            return super().logits()
        if self.replay is not None and self.width == self.columns:
            self._release()
        if self.replay is None:
            return self._begin()
        self._advance()
        return self.replay()

    def _advance(self) -> None:
        self.width += 1
        self.sizes = [size + 1 for size in self.sizes]
        self.positions.add_(1)
        self.place.add_(1)

    def _begin(self) -> Tensor:
        """The next step, captured."""
        expected = None
        if Captured.works is None:
            expected = super().logits().float().log_softmax(dim=-1)
            self._retreat()
        layers: list[PreallocatedLayer] = self.cache.layers
        self.place = torch.full((1,), self.width - 1, device=self.ids.device)
        for layer in layers:
            layer.begin_fixed(self.place, self.width)
        self.columns = layers[0].buffers[0].shape[2]
        self.written = torch.zeros(len(self.ids), self.columns, dtype=torch.long, device=self.ids.device)
        self.written[:, : self.width] = self.mask[:, : self.width]
        self.ids, self.positions = self.ids.clone(), self.positions.clone()
        self._advance()
        try:
            self.replay = self.capture(self._step)
            logits = self.replay()
        except Exception as error:
            return self._give_up(reason(error))
        if expected is not None:
            gap = float((logits.float().log_softmax(dim=-1) - expected).abs().mean())
            if not gap <= TOLERANCE:
                return self._give_up(f"its log-probabilities are {gap:.2g} nats off")
            Captured.works = True
        return logits

    def _step(self) -> Tensor:
        self.written.index_fill_(1, self.place, 1)
        return self.run_model(self.cache, self.ids, self.written, self.positions, padded=True)

    def _give_up(self, why: str) -> Tensor:
        """The same step by a growing cache."""
        Captured.works = False
        say(f"note: decoding without CUDA graphs, since a step cannot be one: {why}")
        self._retreat()
        self._release()
        return super().logits()

    def _retreat(self) -> None:
        self.width -= 1
        self.sizes = [size - 1 for size in self.sizes]
        self.positions = self.positions - 1

    def _release(self) -> None:
        """Go back to a cache whose views grow with its tokens."""
        self.replay = None
        for layer in self.cache.layers:
            if layer.place is not None:
                layer.end_fixed(self.width)


def captured(decoding: Decoder, capture: Callable[[Step], Step]) -> Decoder:
    """The same decoder with captured steps, where the architecture is written for steps of fixed shapes."""
    if not isinstance(decoding, Cached) or not decoding.joins or not has_fixed_step(hf_model(decoding.model)):
        return decoding
    return Captured(decoding.model, decoding.cache_name, decoding.config, decoding.length, capture)
