"""Which SIGTERM is left to a loop of training steps, and what a rank's stop is to all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.engine import rank_errors, stopping
from align.engine.distributed import World
from align.engine.stopping import ONE_SIGNAL, Stopped, ask_to_stop, stop, stop_asked, stops_between_steps

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def not_asked():
    yield
    stopping._loop_runs, stopping._asked_at = False, None


def test_the_first_is_left_to_a_loop_and_a_second_is_not(capsys):
    assert not ask_to_stop(), "no loop looks at it"
    assert not stop_asked(ALONE)
    with stops_between_steps():
        assert not stop_asked(ALONE)
        assert ask_to_stop()
        assert stop_asked(ALONE)
        assert ask_to_stop(), "the same signal, passed on by a launcher"
        assert capsys.readouterr().err.count("ends after this step, with a checkpoint") == 1
        stopping._asked_at -= 2 * ONE_SIGNAL
        assert not ask_to_stop(), "a second signal"
    assert not ask_to_stop(), "the loop has ended"


def test_the_signal_of_another_rank_stops_this_one(monkeypatch):
    monkeypatch.setattr(World, "max", lambda self, mine: torch.ones_like(mine))  # over ranks, one of which has got it
    assert stop_asked(World(0, 2, torch.device("cpu")))


def test_only_the_first_rank_says_so(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with stops_between_steps():
        assert ask_to_stop()
    assert capsys.readouterr().err == ""


def test_a_loop_that_fails_looks_no_more():
    with pytest.raises(ValueError, match="x"), stops_between_steps():
        raise ValueError("x")
    assert not ask_to_stop()


def test_a_stage_that_is_stopped(capsys, monkeypatch):
    """The code of a SIGTERM, one line, no rank that waits for another, and nothing is asked of the next stage of the process."""
    done = []
    monkeypatch.setattr(rank_errors, "stop_watching", lambda: done.append("watching"))
    with stops_between_steps():
        assert ask_to_stop()
        capsys.readouterr()
        with pytest.raises(Stopped) as ended:
            stop(Path("out/checkpoint-2"), ALONE)
    assert ended.value.code == 143
    assert done == ["watching"]
    said = capsys.readouterr().err
    assert said == "out/checkpoint-2: saved at SIGTERM; the same command continues from there\n"
    assert not stop_asked(ALONE)
