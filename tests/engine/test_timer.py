"""Seconds by phase, on a clock that stands still between the steps of a test."""

import psutil
import pytest

from align.engine import timer as clock
from align.engine.timer import Clock


@pytest.fixture
def now(monkeypatch):
    hand = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: hand[0])
    return hand


def test_phases_sum_to_the_whole(now):
    """A phase inside another is not counted twice, and what is in no phase is not counted."""
    counted = Clock()
    now[0] += 100
    with counted.phase("outer"):
        now[0] += 1
        with counted.phase("inner"):
            now[0] += 10
        now[0] += 2
        with counted.phase("inner"):
            now[0] += 20
    now[0] += 100
    with counted.phase("outer"):
        now[0] += 4
    assert counted.take() == {"outer": 7, "inner": 30}
    most = counted.take_bytes()
    assert most.keys() == {"outer", "inner"}
    assert all(2**24 < size <= psutil.virtual_memory().total for size in most.values()), "this process has torch in it"
    assert counted.take_bytes() == {}
    assert counted.take() == {}
    with counted.phase("outer"):
        assert counted.take_bytes().keys() == {"outer"}, "of a phase that still runs"


def test_a_phase_ends_with_an_error(now):
    counted = Clock()

    def fail():
        with counted.phase("a"):
            now[0] += 1
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    now[0] += 5
    with counted.phase("b"):
        now[0] += 2
    assert counted.take() == {"a": 1, "b": 2}
