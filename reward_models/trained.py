"""A trained reward model as a source of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reward_models.heads import score_sequences
from reward_models.responses import Responses, Turns, passes, row_error


class ModelReward:
    """Scores of a sequence classifier with one label, as `score_sequences` computes them.

    Args:
        name: for logs and errors.
        model: as for `score_sequences`, bare or wrapped by DeepSpeed, on its device and in evaluation mode.
        batch_size: sequences in one forward pass.
        max_length: longer sequences keep their first token (begin-of-text, or an encoder's [CLS]) and their last ones;
            None for no limit.
        encode: (prompt, response text, tools that the prompt lists or None) to token ids, for a model with another
            tokenizer than the policy's; by default the policy's own prompt and response ids are scored unchanged.
        reads_ids: whether they are scored unchanged even so, except where the text leaves reasoning out.

    Attributes:
        truncated: number of sequences truncated to `max_length` so far.
        on_pass: called after each forward pass with its number of sequences, to show progress.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        *,
        batch_size: int,
        max_length: int | None,
        encode: Callable[[Turns, str, Any], list[int]] | None = None,
        reads_ids: bool = False,
    ) -> None:
        self.name = name
        self.model = model
        self.batch_size = batch_size
        self.max_length = max_length
        self.encode = encode
        self.reads_ids = reads_ids
        self.truncated = 0
        self.on_pass: Callable[[int], None] = lambda count: None

    @torch.no_grad()
    def score(self, batch: Responses) -> Tensor:
        """Scores [B], float32, on the CPU.

        Raises:
            ValueError: a row has no token, or its score is not finite; the message shows the row.
        """
        sequences = [self.token_ids(batch, row) for row in range(len(batch))]
        device = self.model.device
        scores = torch.empty(len(batch))
        for rows in passes([len(ids) for ids in sequences], self.batch_size):
            lengths = torch.tensor([len(sequences[row]) for row in rows])
            mask = torch.arange(int(lengths[0])) < lengths[:, None]  # [m, S], right-padded
            ids = torch.zeros(mask.shape, dtype=torch.int64)
            ids[mask] = torch.tensor([token for row in rows for token in sequences[row]])
            scores[rows] = score_sequences(self.model, ids.to(device), mask.to(device)).cpu()
            self.on_pass(len(rows))
        for row in (~scores.isfinite()).nonzero().flatten().tolist():
            raise row_error(self.name, batch, row, f"the model's score is {scores[row]}; expected a finite number.")
        return scores

    def token_ids(self, batch: Responses, row: int) -> list[int]:
        """The ids of prompt and response that the model scores: those sampled, or its own tokenizer's of the text."""
        shortened = bool(batch.reasoning and batch.reasoning[row])
        if self.encode is None or (self.reads_ids and not shortened):
            ids = batch.prompt_ids[row] + batch.response_ids[row]
        else:
            ids = self.encode(batch.prompts[row], batch.texts[row], batch.columns.get("tools", [None] * (row + 1))[row])
        if not ids:
            raise row_error(self.name, batch, row, "no token to score.")
        if self.max_length is not None and len(ids) > self.max_length:
            self.truncated += 1
            ids = ids[:1] + ids[len(ids) - self.max_length + 1 :]
        return ids
