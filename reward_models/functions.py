"""Python functions as a source of scores, with the signature of TRL's `reward_funcs`."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Real
from typing import Any

import torch

from reward_models.responses import Responses, row_error
from reward_models.time_limit import TimedOut, end_process, time_limit

TIMEOUT = 1800.0  # seconds
LARGEST = torch.finfo(torch.float32).max
FAILURES = (Exception, SystemExit, asyncio.CancelledError)  # of a function, which ends no run without a word


class FunctionReward:
    """Scores of `function(prompts=..., completions=..., completion_ids=..., **columns)`.

    As in TRL, `prompts` and `completions` are lists of texts or of message lists, `completion_ids` is a list of token id
    lists, and every other column of the data is a list under its own name, so the function should accept `**kwargs`. It
    returns one number per row (list, tuple, tensor or array), or for every row a list with one number per token of the
    response, end-of-text included, which rewards each token. It may be `async`. None means that the function does not
    apply to the row: its score is then NaN, and `RewardSum` leaves it out. Unlike in TRL, a NaN from the function itself
    is an error, and `trainer_state`, `log_extra` and `log_metric` are not passed. The function gets copies, which it may
    change.

    Args:
        timeout: seconds that a call may take.
        give_up: called in a thread with the error when a call that takes longer cannot be interrupted; ends the process.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        timeout: float = TIMEOUT,
        give_up: Callable[[str], None] = end_process,
    ) -> None:
        self.name, self.function = name, function
        self.timeout, self.give_up = timeout, give_up

    def score(self, batch: Responses) -> torch.Tensor:
        """Scores [B], or [B, T] of single tokens, float32, on the CPU; NaN where the function returned None.

        T is the length of the longest response; shorter ones are padded with 0.

        Raises:
            ValueError: the function raised, took too long, or did not return a finite number, one per token, or None for
                each row.
        """
        late = f"reward {self.name!r}: no scores of {len(batch)} responses after {self.timeout:g} s (reward_timeout)"
        try:
            with time_limit(self.timeout, late, self.give_up):
                values = self._call(batch)
        except TimedOut as error:
            raise ValueError(str(error)) from None
        except FAILURES as error:
            raise self._locate(batch, error) from error
        if len(values) != len(batch):
            count = f"more than {len(batch)}" if len(values) > len(batch) else len(values)
            raise ValueError(
                f"reward {self.name!r}: returned {count} scores for {len(batch)} responses; expected one each."
            )
        applicable = [value for value in values if value is not None]
        if applicable and all(_is_sequence(value) for value in applicable):
            return torch.stack([self._token_scores(batch, row, value) for row, value in enumerate(values)])
        return torch.tensor([self._number(batch, row, value) for row, value in enumerate(values)], dtype=torch.float32)

    def _call(self, batch: Responses) -> list[Any]:
        given = {"prompts": batch.prompts, "completions": batch.completions, "completion_ids": batch.response_ids}
        returned = self.function(**_copy(given | batch.columns))
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | Mapping | Set):
            raise TypeError(f"it returned {_shown(returned)}; expected a list with one number per response")
        return list(itertools.islice(returned, len(batch) + 1))

    def _locate(self, batch: Responses, error: BaseException) -> ValueError:
        """The error with the row on which the function raises, found by calling it on each row alone."""
        problem = f"{type(error).__name__}: {error}"
        with contextlib.suppress(TimedOut), time_limit(self.timeout, f"reward {self.name!r}: {problem}", self.give_up):
            for row in range(len(batch)):
                try:
                    self._call(batch.row(row))
                except FAILURES as alone:
                    if type(alone) is type(error):
                        return row_error(self.name, batch, row, f"{type(alone).__name__}: {alone}")
        return ValueError(f"reward {self.name!r}: {problem} (on {len(batch)} rows together, but on none of them alone)")

    def _token_scores(self, batch: Responses, row: int, value: Any) -> torch.Tensor:
        """The scores of the tokens of one response, [T], padded with 0."""
        width = max(map(len, batch.response_ids))
        if value is None:
            return torch.full((width,), float("nan"))
        count = len(batch.response_ids[row])
        if len(value) != count:
            problem = f"returned {len(value)} numbers; expected one for each of its {count} tokens."
            raise row_error(self.name, batch, row, problem)
        numbers = [self._number(batch, row, each) for each in value]
        if any(number != number for number in numbers):
            raise row_error(self.name, batch, row, "returned None for a token; expected a finite number.")
        return torch.tensor(numbers + [0.0] * (width - count))

    def _number(self, batch: Responses, row: int, value: Any) -> float:
        if value is None:
            return float("nan")
        if getattr(value, "size", None) == 1 or (isinstance(value, torch.Tensor) and value.numel() == 1):
            value = value.item()  # of an array or a tensor, on any device
        if not isinstance(value, Real) or not abs(value) <= LARGEST:  # type: ignore[operator]
            raise row_error(self.name, batch, row, f"returned {_shown(value)}; expected a finite number, or None.")
        return float(value)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple) or (getattr(value, "ndim", 0) == 1 and len(value) > 1)


def _copy(value: Any) -> Any:
    """A copy of lists and mappings, and of what they hold where that can be copied."""
    if isinstance(value, list):
        return [_copy(each) for each in value]
    if isinstance(value, dict):
        return {name: _copy(each) for name, each in value.items()}
    with contextlib.suppress(Exception):  # a decoder, an open file
        return copy.deepcopy(value)
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
