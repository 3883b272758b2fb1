"""The language-model head, run on the tokens that count, a chunk at a time.

Logits are the largest tensors of a step by far: [tokens, vocabulary]. A model's own forward pass makes them for every
position and keeps them for the backward pass. Here the head's work is replaced while a forward pass runs: it sees the
positions that predict response tokens, and no more than CHUNK logits exist at once, also in training.
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

CHUNK = 2**22  # logits at once: 16 MiB in float32, which a processor's cache holds ...
GPU_CHUNK = 2**26  # ... and 256 MiB, which keep a GPU busy
SUMMED = 2**24  # in bfloat16, before a product is added to the float32 sum of the weight's gradient: adding is slow
Objective = Callable[[Tensor, Tensor, slice], Tensor]
HeadFunction = Callable[[Tensor, nn.Linear], Tensor]


def output_head(model: Any) -> nn.Linear:
    """The layer that makes logits of states, in a model or an engine of one."""
    head: nn.Linear = hf_model(getattr(model, "module", model)).get_output_embeddings()
    return head


@contextlib.contextmanager
def replaced_head(head: nn.Linear, job: HeadFunction) -> Iterator[None]:
    """While inside, the head returns what `job` makes of the states [B, S, H] and itself.

    Only its arithmetic is replaced: hooks stay, by which ZeRO-3 gathers its weight.
    """
    head.forward = lambda states: job(states, head)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


@torch.no_grad()
def head_is_last(model: Callable[..., Any]) -> bool:
    """Whether the model returns what its head does: it neither scales nor caps logits afterwards. Found once, by trial."""
    head = output_head(model)
    if not hasattr(head, "head_is_last"):
        marks = torch.tensor([[[0.75, -1.5, 24.0]]])  # exact in any float type
        with replaced_head(head, lambda states, _: marks.to(states)):
            output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=head.weight.device), use_cache=False)
        head.head_is_last = torch.equal(output.logits.float().cpu(), marks)  # type: ignore[assignment]
    return bool(head.head_is_last)


def chunk_slices(first: int, last: int, vocabulary: int, logits: int) -> list[slice]:
    """Tokens from `first` to before `last` in pieces of no more than `logits` logits, though of a token at least."""
    size = max(1, logits // vocabulary)
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]


def _chunk(states: Tensor) -> int:
    return GPU_CHUNK if states.is_cuda else CHUNK


def logprobs_head(places: Tensor, tokens: Tensor, temperature: float) -> HeadFunction:
    """Log-probabilities of `tokens` [N], each predicted from the state at its place [N] in the flattened batch."""

    def job(states: Tensor, head: nn.Linear) -> Tensor:
        chosen = states.flatten(0, 1)[places]
        parts = [
            _logprobs(F.linear(chosen[part], head.weight, head.bias), tokens[part], temperature)
            for part in chunk_slices(0, len(tokens), head.weight.shape[0], _chunk(states))
        ]
        return torch.cat(parts)

    return job


def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """`token_logprobs` of logits [n, V] that nobody else needs: without gradients, in their memory."""
    if logits.requires_grad:
        return token_logprobs(logits, tokens, temperature)
    shifted = _shift(logits, temperature)
    chosen = shifted.gather(-1, tokens[:, None]).squeeze(1)
    return chosen - shifted.exp_().sum(dim=-1).log()


def _shift(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature less the largest of each row, float32, in the memory of `logits` if they are."""
    shifted = logits.float()
    if temperature != 1.0:
        shifted /= temperature
    shifted -= shifted.amax(dim=-1, keepdim=True)
    return shifted


def loss_head(places: Tensor, tokens: Tensor, temperature: float, objective: Objective, found: Tensor) -> HeadFunction:
    """A loss over tokens, with its gradient: a scalar.

    Args:
        objective: given log-probabilities and entropies [n] (float32, nats) of a piece of the tokens, and which, its share
            of the loss.
        found: [2, N] float32, filled with all log-probabilities and entropies.
    """

    def job(states: Tensor, head: nn.Linear) -> Tensor:
        chosen = states.flatten(0, 1)[places]
        weight = head.weight if torch.is_grad_enabled() else head.weight.detach()
        apply: Any = _ChunkedLoss.apply
        loss: Tensor = apply(chosen, weight, head.bias, tokens, temperature, objective, found)
        return loss

    return job


class _ChunkedLoss(torch.autograd.Function):
    """Finds the gradient in the forward pass, chunk by chunk, while the logits are there.

    Where the weight's gradients are summed in place it is added then, so that backward must follow, from this loss.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float,
        objective: Objective, found: Tensor,
    ) -> Tensor:  # fmt: skip
        total = torch.zeros((), device=states.device)
        d_states = torch.empty_like(states)
        summed_in = accumulator_of(weight)
        d_weight = summed_in.grad if summed_in is not None else None
        d_bias = torch.zeros_like(bias) if bias is not None and bias.requires_grad else None
        vocabulary, chunk = weight.shape[0], _chunk(states)
        summed = chunk if states.dtype == torch.float32 else max(chunk, SUMMED)
        for group in chunk_slices(0, len(tokens), vocabulary, summed):
            gradients = []
            for part in chunk_slices(group.start, group.stop, vocabulary, chunk):
                logits = F.linear(states[part], weight, bias)
                loss, gradient = _piece(logits, tokens[part], temperature, part, objective, found)
                total += loss
                gradients.append(gradient.to(states.dtype))
            d_logits = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
            d_states[group] = d_logits @ weight
            if weight.requires_grad:
                d_weight = accumulate_product(d_weight, d_logits.T, states[group])
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
            del logits, gradient, gradients, d_logits  # the next chunk takes their memory
        if summed_in is not None and d_weight is not None:
            summed_in.grad, d_weight = d_weight.float(), None
        ctx.in_place = summed_in is not None
        ctx.gradients = (d_states, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.in_place and upstream != 1.0:
            raise RuntimeError("the head's gradient has been summed already: call backward on the loss itself")
        gradients = [None if gradient is None else gradient.mul_(upstream) for gradient in ctx.gradients]
        del ctx.gradients
        return (*gradients, None, None, None, None)


def _piece(
    logits: Tensor, tokens: Tensor, temperature: float, part: slice, objective: Objective, found: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of a piece and its gradient by the logits, [n, V] float32; `logits` may be overwritten.

    With p = softmax(z), z = logits / temperature: d log p_y / dz = 1_y - p and dH / dz = -p (log p + H).
    """
    shifted = _shift(logits, temperature)
    weights = shifted.exp()
    total = weights.sum(dim=-1)
    logprobs = shifted.gather(-1, tokens[:, None]).squeeze(1) - total.log()
    products = shifted.mul_(weights)
    entropy = total.log() - products.sum(dim=-1) / total
    found[0, part], found[1, part] = logprobs, entropy
    with torch.enable_grad():
        logprobs.requires_grad_()
        entropy.requires_grad_()
        loss = objective(logprobs, entropy, part)
        by_logprob, by_entropy = torch.autograd.grad(loss, [logprobs, entropy], materialize_grads=True)
    factor = -by_logprob - by_entropy * (entropy.detach() - total.log())
    gradient = weights.mul_((factor / total)[:, None])
    if by_entropy.any():
        gradient.addcmul_(products, (-by_entropy / total)[:, None])
    gradient.scatter_add_(1, tokens[:, None], by_logprob[:, None])
    return loss.detach(), gradient.div_(temperature) if temperature != 1.0 else gradient


def full_logits_loss(logits: Tensor, tokens: Tensor, temperature: float, objective: Objective, found: Tensor) -> Tensor:
    """The same loss from logits [N, V] as a model gave them, for one that does something to them after its head."""
    logprobs = token_logprobs(logits, tokens, temperature)
    entropy = token_entropy(logits, temperature)
    found[0], found[1] = logprobs.detach(), entropy.detach()
    return objective(logprobs, entropy, slice(0, len(tokens)))
