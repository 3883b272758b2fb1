"""Text infilling (BART, arXiv 1910.13461, section 2.2): spans of a text are hidden, and the decoder writes the whole text.

Each span becomes one mask token, so that the model has to find out how much is missing. Lengths are drawn from a Poisson
distribution; a span of no tokens is a mask token that stands for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from align.encoders.span_corruption import SpanCorruption, span_counts


class TextInfilling(SpanCorruption):
    """Collator as `SpanCorruption`; arguments as there."""

    objective = "text infilling"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, density: float, mean_span_length: float, seed: int, start: int
    ):
        super().__init__(tokenizer, density, mean_span_length, seed, start)
        self.mask_id = int(tokenizer.mask_token_id)

    def corrupt(self, ids: Sequence[int], piece: int, draw: int | str) -> tuple[list[int], list[int]]:
        text = ids[len(self.before) : len(ids) - len(self.after)]
        if len(text) < 2:
            return list(ids), []
        source, end = [*self.before], 0
        for first, last in poisson_spans(len(text), self.density, self.mean_span_length, self.generator(piece, draw)):
            source += [*text[end:first], self.mask_id]
            end = last
        return [*source, *text[end:], *self.after], list(ids)


def poisson_spans(
    length: int, density: float, mean_span_length: float, generator: np.random.Generator
) -> list[tuple[int, int]]:
    """Where each span begins and ends, in order, of together round(length x density) tokens.

    All places are equally likely; the last span is cut to the number. No span is empty while there would be more spans than
    hidden tokens, so that the corrupted text is never longer than the text.
    """
    noise, _ = span_counts(length, density, mean_span_length)
    sizes: list[int] = []
    while (hidden := sum(sizes)) < noise:
        size = int(generator.poisson(mean_span_length))
        sizes.append(min(max(size, int(len(sizes) >= hidden)), noise - hidden))
    slots = np.sort(generator.permutation(length - noise + len(sizes))[: len(sizes)])
    ends = np.cumsum(sizes)
    return [
        (int(slot - number + end - size), int(slot - number + end))
        for number, (slot, size, end) in enumerate(zip(slots, sizes, ends, strict=True))
    ]
