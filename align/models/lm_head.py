"""The language-model head, computed on response tokens only, a chunk at a time.

Logits are by far the largest tensors of a step: [tokens, vocabulary]. A model's own forward pass computes them at every
position and keeps them for the backward pass. Here the head is replaced during a forward pass: it computes the
positions that predict response tokens, and no more than CHUNK logits exist at once, in training too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align.maths.losses import token_entropy, token_logprobs
from align.models.in_place_gradients import accumulate_product, accumulator_of
from reward_models.heads import hf_model

CHUNK = 2**22  # logits at once: 16 MiB in float32, which fit a CPU's cache ...
GPU_CHUNK = 2**26  # ... and 256 MiB, which keep a GPU busy
PRODUCT = 2**24  # bfloat16 logits whose product is added to the float32 gradient of the weight at once: adding is slow
Objective = Callable[[Tensor, Tensor, slice], Tensor]
HeadFunction = Callable[[Tensor, nn.Linear], Tensor]


def output_head(model: Any) -> nn.Linear:
    """The layer that maps hidden states to logits, of a model or an engine."""
    head: nn.Linear = hf_model(getattr(model, "module", model)).get_output_embeddings()
    return head


@contextlib.contextmanager
def replaced_head(head: nn.Linear, function: HeadFunction) -> Iterator[None]:
    """Inside the block, the head returns `function(states [B, S, H], head)`.

    Only its `forward` is replaced; its hooks, by which ZeRO-3 gathers the weight, still run.
    """
    head.forward = lambda states: function(states, head)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def head_is_last(model: Callable[..., Any]) -> bool:
    """Whether the model returns its head's output unscaled and uncapped; tested once, by a forward pass."""
    head = output_head(model)
    if not hasattr(head, "head_is_last"):
        marks = torch.tensor([[[0.75, -1.5, 24.0]]])  # exact in any float type
        with replaced_head(head, lambda states, _: marks.to(states)):
            output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device), use_cache=False)
        head.head_is_last = torch.equal(output.logits.float().cpu(), marks)  # type: ignore[assignment]
    return bool(head.head_is_last)


def chunk_slices(first: int, last: int, vocabulary: int, logits: int) -> list[slice]:
    """Slices of tokens `first` to `last` (exclusive), each of at most `logits` logits but at least one token."""
    size = max(1, logits // vocabulary)
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]


def _chunk(states: Tensor) -> int:
    return GPU_CHUNK if states.is_cuda else CHUNK


def logprobs_head(indices: Tensor, tokens: Tensor, temperature: float) -> HeadFunction:
    """A head that returns log-probabilities [N] of `tokens` [N], given the index of the state that predicts each."""

    def function(states: Tensor, head: nn.Linear) -> Tensor:
        chosen = states.flatten(0, 1)[indices]
        parts = [
            _logprobs(F.linear(chosen[part], head.weight, head.bias), tokens[part], temperature)
            for part in chunk_slices(0, len(tokens), head.weight.shape[0], _chunk(states))
        ]
        return torch.cat(parts)

    return function


def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """`token_logprobs` of logits [n, V]; without gradients it is computed in place, so the logits are lost."""
    if logits.requires_grad:
        return token_logprobs(logits, tokens, temperature)
    shifted = _shift(logits, temperature)
    chosen = shifted.gather(-1, tokens[:, None]).squeeze(1)
    return chosen - shifted.exp_().sum(dim=-1).log()


def _shift(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, minus the maximum of each row; float32, in place if the logits are float32."""
    shifted = logits.float()
    if temperature != 1.0:
        shifted /= temperature
    shifted -= shifted.amax(dim=-1, keepdim=True)
    return shifted


def loss_head(
    indices: Tensor, tokens: Tensor, temperature: float, objective: Objective, outputs: Tensor
) -> HeadFunction:
    """A head that returns a loss over `tokens` [N], a scalar with its gradient.

    Args:
        objective: maps log-probabilities and entropies [n] (float32, nats) of a slice of the tokens, and that slice,
            to its share of the loss.
        outputs: [2, N] float32, filled with all log-probabilities and entropies.
    """

    def function(states: Tensor, head: nn.Linear) -> Tensor:
        chosen = states.flatten(0, 1)[indices]
        weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
        apply: Any = _ChunkedLoss.apply
        loss: Tensor = apply(chosen, weight, head.bias, tokens, temperature, objective, outputs)
        return loss

    return function


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk, while the logits exist.

    Where the weight's gradients are accumulated in place, that happens in the forward pass too; backward must then
    follow, called on this loss itself.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float,
        objective: Objective, outputs: Tensor,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), device=states.device)
        d_states = torch.empty_like(states)
        accumulator = accumulator_of(weight)
        d_weight = accumulator.grad if accumulator is not None else None
        d_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        vocabulary, chunk = weight.shape[0], _chunk(states)
        summed = chunk if states.dtype == torch.float32 else max(chunk, PRODUCT)
        for group in chunk_slices(0, len(tokens), vocabulary, summed):
            gradients = []
            for part in chunk_slices(group.start, group.stop, vocabulary, chunk):
                logits = F.linear(states[part], weight, bias)
                loss, gradient = _piece(logits, tokens[part], temperature, part, objective, outputs)
                total += loss
                gradients.append(gradient.to(states.dtype))
            d_logits = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
            d_states[group] = d_logits @ weight
            if weight.requires_grad:
                d_weight = accumulate_product(d_weight, d_logits.T, states[group])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
            del logits, gradient, gradients, d_logits  # their memory is for the next chunk
        if accumulator is not None and d_weight is not None:
            accumulator.grad, d_weight = d_weight.float(), None
        ctx.in_place = accumulator is not None
        ctx.gradients = (d_states, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.in_place and upstream != 1.0:
            raise RuntimeError("the head's gradient has been accumulated already: call backward on the loss itself")
        gradients = [None if gradient is None else gradient.mul_(upstream) for gradient in ctx.gradients]
        del ctx.gradients
        return (*gradients, None, None, None, None)


def _piece(
    logits: Tensor, tokens: Tensor, temperature: float, part: slice, objective: Objective, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of a slice of the tokens and its gradient w.r.t. the logits, [n, V] float32; `logits` may be overwritten.

    With p = softmax(z), z = logits / temperature: d log p_y / dz = 1_y - p and dH / dz = -p (log p + H).
    """
    shifted = _shift(logits, temperature)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    logprobs = shifted.gather(-1, tokens[:, None]).squeeze(1) - total.log()
    products = shifted.mul_(weights)
    entropy = total.log() - products.sum(dim=-1) / total
    outputs[0, part], outputs[1, part] = logprobs, entropy
    with torch.enable_grad():
        logprobs.requires_grad_()
        entropy.requires_grad_()
        loss = objective(logprobs, entropy, part)
        by_logprob, by_entropy = torch.autograd.grad(loss, [logprobs, entropy], allow_unused=True)
    by_logprob = torch.zeros_like(total) if by_logprob is None else by_logprob
    factor = -by_logprob
    if by_entropy is not None:
        factor = factor - by_entropy * (entropy.detach() - total.log())
    gradient = weights.mul_((factor / total)[:, None])
    if by_entropy is not None:
        gradient.addcmul_(products, (-by_entropy / total)[:, None])
    gradient.scatter_add_(1, tokens[:, None], by_logprob[:, None])
    return loss.detach(), gradient.div_(temperature) if temperature != 1.0 else gradient


def full_logits_loss(
    logits: Tensor, tokens: Tensor, temperature: float, objective: Objective, outputs: Tensor
) -> Tensor:
    """The same loss from all logits [N, V], for a model that changes them after its head."""
    logprobs = token_logprobs(logits, tokens, temperature)
    entropy = token_entropy(logits, temperature)
    outputs[0], outputs[1] = logprobs.detach(), entropy.detach()
    return objective(logprobs, entropy, slice(0, len(tokens)))
