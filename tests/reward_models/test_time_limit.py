"""A function that hangs: in Python, in a regular expression, in C, with and without the interpreter's lock."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reward_models.time_limit
from reward_models.functions import FunctionReward
from reward_models.responses import Responses
from reward_models.time_limit import TimedOut, time_limit
from tests.ranks import start

BATCH = Responses(["p", "q"], ["a", "b"], ["a", "b"], [[1], [1]], [[2], [2]])


def catastrophic(**kwargs: Any) -> list[float]:
    return [1.0 if re.match(r"(a+)+$", "a" * 60 + "b") else 0.0] * 2


def tries_again(**kwargs: Any) -> list[float]:
    while True:
        try:
            time.sleep(30)
        except Exception:
            continue


async def waits(**kwargs: Any) -> list[float]:
    await asyncio.sleep(30)
    return [1.0, 1.0]


def endless(**kwargs: Any) -> Any:
    yield from iter(lambda: time.sleep(30), 1)


@pytest.mark.parametrize("function", [catastrophic, tries_again, waits, endless])
def test_it_is_interrupted_and_named_with_its_line(function: Callable[..., Any]) -> None:
    began, handler = time.monotonic(), signal.getsignal(signal.SIGALRM)
    words = rf"reward 'judge': no scores of 2 responses after 0\.05 s \(reward_timeout\), in [\w<>]+ \({__file__}, line \d+\)"
    if function is waits:  # which is suspended: the line is asyncio's
        words = r"reward 'judge': no scores of 2 responses after 0\.05 s"
    with pytest.raises(ValueError, match=words):
        FunctionReward("judge", function, timeout=0.05).score(BATCH)
    assert time.monotonic() - began < 5
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0.0  # not ours, which repeats


def test_a_function_that_never_stops_giving() -> None:
    with pytest.raises(ValueError, match="returned more than 2 scores for 2 responses"):
        FunctionReward("judge", lambda **kwargs: itertools.count()).score(BATCH)


def test_a_function_may_set_an_alarm_of_its_own() -> None:
    def rings(**kwargs: Any) -> list[float]:
        rung: list[int] = []
        before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.05)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        return [float(len(rung)), 2.0]

    assert FunctionReward("judge", rings, timeout=60).score(BATCH).tolist() == [1.0, 2.0]


def test_an_error_is_located_within_the_limit_too() -> None:
    def slow_to_fail(completions: list[str], **kwargs: Any) -> list[float]:
        if len(completions) > 1:
            raise ConnectionError("no judge there")
        time.sleep(30)
        return [1.0]

    with pytest.raises(ValueError, match="reward 'judge': ConnectionError: no judge there"):
        FunctionReward("judge", slow_to_fail, timeout=0.05).score(BATCH)


def locked(library: type[ctypes.CDLL]) -> Callable[..., None]:
    """A function that waits for ever for a lock, in C, whatever signals come."""
    c, mutex = library(None), ctypes.create_string_buffer(128)

    def function(**kwargs: Any) -> None:
        c.pthread_mutex_lock(mutex)
        c.pthread_mutex_lock(mutex)

    return function


def score_locked(holds_the_interpreter: bool) -> None:
    reward_models.time_limit.GRACE = 0.2
    FunctionReward("judge", locked(ctypes.PyDLL if holds_the_interpreter else ctypes.CDLL), timeout=0.1).score(BATCH)


def test_c_code_that_heeds_no_signal_ends_the_process_by_one_error(tmp_path: Path) -> None:
    process = start(score_locked, False, log=tmp_path / "log")
    assert process.wait(30) == [2]
    assert process.stderr == "error: reward 'judge': no scores of 2 responses after 0.1 s (reward_timeout)\n"


def test_c_code_that_holds_the_interpreter_ends_the_process_by_its_stack(tmp_path: Path) -> None:
    process = start(score_locked, True, log=tmp_path / "log")
    assert process.wait(30) == [1]
    assert f'"{Path(sys.modules[__name__].__file__ or "")}"' in process.stderr


def test_an_alarm_that_was_set_before_rings_at_its_time() -> None:
    def after_a_shorter_block() -> None:
        with time_limit(60, "inner"):
            pass
        time.sleep(5)

    with pytest.raises(TimedOut, match="outer"), time_limit(0.1, "outer"):
        after_a_shorter_block()
