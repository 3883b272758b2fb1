"""The rollout of an update: responses with their log-probabilities, values and scores, and how its fields are padded."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from align.engine.distributed import World

ROW, PROMPT_TOKEN, RESPONSE_TOKEN = "row", "prompt token", "response token"
AnyRollout = TypeVar("AnyRollout", bound="Rollout")


def per(axis: str, ids: bool = False) -> Any:
    """Declare a field with entries for each row, prompt token or response token; `ids` are padded with the pad token."""
    return field(metadata={"axis": axis, "ids": ids})


@dataclass(slots=True)
class Rollout:
    """B responses with their log-probabilities, values and scores at the time of sampling. Masks are True on real tokens.

    Prompts are padded on the left to Q, responses on the right to T. Log-probabilities are in nats at the sampling
    temperature. `values[:, t]` is the value of the state before response token t. The declaration of a field by `per`
    decides how it is cut, padded and gathered.

    Raises:
        ValueError: the shape of a field is not the declared one.
    """

    prompt_ids: Tensor = per(PROMPT_TOKEN, ids=True)  # [B, Q] int64
    prompt_mask: Tensor = per(PROMPT_TOKEN)  # [B, Q] bool
    response_ids: Tensor = per(RESPONSE_TOKEN, ids=True)  # [B, T] int64, end-of-text included
    mask: Tensor = per(RESPONSE_TOKEN)  # [B, T] bool
    ended: Tensor = per(ROW)  # [B] bool, whether the response ends by itself: with end-of-text, or with a stop string
    sampled_logprobs: Tensor = per(RESPONSE_TOKEN)  # [B, T] float32, from the decoding loop
    old_logprobs: Tensor = per(RESPONSE_TOKEN)  # [B, T] float32, from the forward pass that training uses
    ref_logprobs: Tensor = per(RESPONSE_TOKEN)  # [B, T] float32
    values: Tensor = per(RESPONSE_TOKEN)  # [B, T] float32, 0 without a value model
    scores: Tensor = per(ROW)  # [B] float32, weighted sum over the reward sources
    token_scores: Tensor = per(RESPONSE_TOKEN)  # [B, T] float32, the part of `scores` that was given to single tokens
    source_scores: Tensor = per(ROW)  # [B, number of reward sources and members of ensembles] float32
    repetition: Tensor = per(ROW)  # [B] float32, share of repeated 3-grams

    def __post_init__(self) -> None:
        widths = {PROMPT_TOKEN: self.prompt_mask.shape, RESPONSE_TOKEN: self.mask.shape}
        for name, axis in self.axes().items():
            shape = getattr(self, name).shape
            if shape[:1] != self.mask.shape[:1] or (axis != ROW and shape != widths[axis]):
                raise ValueError(f"{name}: expected an entry for each {axis}, got the shape {list(shape)}")

    @classmethod
    def axes(cls) -> dict[str, str]:
        """The declared axis of each field, by name."""
        return {field.name: field.metadata["axis"] for field in fields(cls)}

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Response tokens, [B] int64."""
        return self.mask.sum(dim=1)

    @property
    def sizes(self) -> Tensor:
        """Tokens of prompt and response together, [B] int64."""
        return self.prompt_mask.sum(dim=1) + self.lengths

    def sequences(self, first: int | None = None) -> tuple[Tensor, Tensor]:
        """Prompts with their responses, or the `first` tokens of them: ids and mask, [B, S] with S = Q + T."""
        ids, mask = self.response_ids[:, :first], self.mask[:, :first]
        return torch.cat([self.prompt_ids, ids], 1), torch.cat([self.prompt_mask, mask], 1)

    def rows(self: AnyRollout, index: Tensor) -> AnyRollout:
        """The rows at `index` [n], without columns that are padding in all of them."""
        first, last = torch.stack(
            [self.prompt_mask[index].float().argmax(dim=1).min(), self.lengths[index].max()]
        ).tolist()
        columns = {
            ROW: ...,
            PROMPT_TOKEN: (slice(None), slice(first, None)),
            RESPONSE_TOKEN: (slice(None), slice(last)),
        }
        return type(self)(**{name: getattr(self, name)[index][columns[axis]] for name, axis in self.axes().items()})


def gather_rollout(rollout: AnyRollout, world: World, pad_token_id: int) -> AnyRollout:
    """All ranks' rows in rank order, on every rank: [b, ...] each -> [B, ...].

    The rest of the update is then computed on the whole batch by every rank, and global statistics need no further
    reduction. Ids, masks and per-token numbers are small beside the models.
    """
    if world.size == 1:
        return rollout
    widest = world.max(torch.tensor([rollout.prompt_ids.shape[1], rollout.mask.shape[1]], device=world.device))
    prompt_width, response_width = widest.tolist()
    wide = pad_rollout(rollout, prompt_width, response_width, pad_token_id)
    return type(rollout)(**{name: world.gather(getattr(wide, name)) for name in rollout.axes()})


def pad_rollout(rollout: AnyRollout, prompt_width: int, response_width: int, pad_token_id: int) -> AnyRollout:
    """A rollout padded to `prompt_width` on the left and `response_width` on the right."""
    padded = {}
    for part in fields(rollout):
        tensor, axis = getattr(rollout, part.name), part.metadata["axis"]
        if axis != ROW:
            left = prompt_width - tensor.shape[1] if axis == PROMPT_TOKEN else 0
            right = response_width - tensor.shape[1] if axis == RESPONSE_TOKEN else 0
            tensor = F.pad(tensor, (left, right), value=pad_token_id if part.metadata["ids"] else 0)
        padded[part.name] = tensor
    return type(rollout)(**padded)
