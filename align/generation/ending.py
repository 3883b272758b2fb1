"""The end of a response: an end token of the model, or a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.end_tokens import end_ids


@dataclass(frozen=True, slots=True)
class Ending:
    """Ends a response after the first of the model's end tokens, or after the token that completes a stop string.

    As in transformers' `StopStringCriteria`, that token stays whole, whatever text follows the string in it.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_strings: Sequence[str] = ()

    def ended(self, responses: Tensor, lengths: Tensor) -> Tensor:
        """Whether the last token of each response ends it, [B] bool.

        Args:
            responses: [B, T] ids, padded on the right.
            lengths: [B], at least 1.
        """
        last = responses.gather(1, lengths[:, None] - 1)
        ended = torch.isin(last[:, 0], last.new_tensor(end_ids(self.tokenizer)))
        if self.stop_strings:
            found = [
                self._stops(row[:length]) for row, length in zip(responses.tolist(), lengths.tolist(), strict=True)
            ]
            ended |= torch.tensor(found, device=ended.device)
        return ended

    def _stops(self, ids: list[int]) -> bool:
        # A token is at least a byte of text, so this tail has the string, and a few tokens as its context.
        size = max(len(stop.encode()) for stop in self.stop_strings) + 4
        text = self.tokenizer.decode(ids[-size:], clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.stop_strings)


def after_end(responses: Tensor, mask: Tensor, ending: Ending) -> Tensor:
    """Which tokens follow one that ends their response, [B, T] bool; what samples responses may know of fewer ends.

    Args:
        responses: [B, T] ids, padded on the right.
        mask: [B, T], True on real tokens.
    """
    after = torch.zeros_like(mask)
    for length in range(1, mask.shape[1]):
        rows = mask[:, length].nonzero()[:, 0]  # with another token
        if not len(rows):
            break
        ended = ending.ended(responses[rows], torch.full_like(rows, length))
        after[rows, length] = after[rows, length - 1] | ended
    return after
