"""An error on one rank ends all ranks: it is put into a store that every rank watches.

Without this the other ranks would wait for the failed one in their next collective until that times out, after ten
minutes or more, and end with errors that hide the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

from align.errors import UserError
from align.terminal import say

FIRST, COUNT, SEEN = "first", "count", "seen"  # keys of the store: the first error, how many errors, who has read it
POLL = 0.5  # seconds between two looks into the store
CONNECT = 600.0  # seconds that a rank waits for rank 0 at the start, as `torch.distributed` does
RANK_0_FIRST = 1.0  # seconds: most errors occur on all ranks alike, and rank 0 is to report those
SEEN_TIMEOUT = 5.0  # seconds that the failed rank, which may host the store, waits for the others to read its error
LOST = re.compile(r"Connection (closed|reset) by peer|\bgloo\b|\bNCCL\b|Socket closed|Broken pipe", re.I)
TERMINATED = 128 + signal.SIGTERM  # the exit code
EXIT_GRACE = 3.0  # seconds that a rank has to end by itself once another has failed


class OtherRankFailed(UserError):
    """Another rank failed first, has printed its error, which this one repeats, and ends with the exit code `code`."""

    def __init__(self, first: dict[str, Any]):
        super().__init__(f"rank {first['rank']}: {first['message']}")
        self.code = int(first["code"])


class Watch:
    """One rank's connection to the store of errors, and the thread that ends this rank after another one has failed.

    Args:
        rank, size: of this process among those of the run.
        patience: seconds to wait for the store.
    """

    def __init__(self, rank: int, size: int, patience: float = CONNECT):
        self.rank, self.size = rank, size
        self.store = connect_store(rank, size, patience)
        self.first: dict[str, Any] | None = None  # the report of another rank, once it is read
        self.leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="rank-errors")
        self._thread.start()

    def report(self, message: str, code: int) -> dict[str, Any] | None:
        """Report to the other ranks why this one ends; returns the report of the first rank, None if this is the first."""
        self.leaving.set()
        self._thread.join()  # one user of the connection at a time
        if self.first is not None:
            return self.first
        until = time.monotonic() + (RANK_0_FIRST if self.rank else 0.0)
        while time.monotonic() < until and not self.store.check([FIRST]):
            time.sleep(0.05)
        if self.store.add(COUNT, 1) > 1:
            return self._first()
        where = {"rank": self.rank, "host": socket.gethostname()}
        self.store.set(FIRST, json.dumps({**where, "message": message, "code": code}))
        until = time.monotonic() + SEEN_TIMEOUT
        while time.monotonic() < until and self.store.add(SEEN, 0) < self.size - 1:
            time.sleep(0.05)
        return None

    def _first(self) -> dict[str, Any]:
        first: dict[str, Any] = json.loads(self.store.get(FIRST))
        self.first = first
        self.store.add(SEEN, 1)
        return first

    def _watch(self) -> None:
        while not self.leaving.wait(POLL):
            try:
                if not self.store.check([FIRST]):
                    continue
                first = self._first()
            except RuntimeError:  # its host, rank 0, is gone, and was not able to say why
                first = {"rank": 0, "host": "", "message": "it was killed, or its machine failed", "code": 1}
            # This rank may fail alike, or just have come to its end. Rank 0 ends last: it may host the store.
            if not self.leaving.wait(EXIT_GRACE + (self.rank == 0)):
                end_process(first)


def connect_store(rank: int, size: int, patience: float) -> Any:
    """A connection to the store of the launch at MASTER_ADDR and MASTER_PORT, which rank 0 hosts unless its launcher does.

    `torch.distributed` makes the same store, on the same port, for its process group.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=patience)
    store = TCPStore(address, port, size, hosts, wait, wait_for_workers=False, multi_tenant=True)
    store.set_timeout(timedelta(seconds=10))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store of a `torchrun` outlives its attempts
    return PrefixStore(f"align/{attempt}/{_runs}", store)


_watch: Watch | None = None
_runs = 0  # of this process so far; one store may serve several


def watch(rank: int, size: int, patience: float = CONNECT) -> None:
    """From now on end this process when another rank has failed."""
    global _watch, _runs
    _runs += 1
    _watch = Watch(rank, size, patience)


def stop_watching() -> None:
    """Stop watching: from now on other ranks may exit."""
    global _watch
    if _watch is not None:
        _watch.leaving.set()
    _watch = None


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Report an error that ends the block, and thereby this rank, to the other ranks.

    Raises:
        OtherRankFailed: another rank was first; what this one met may be a consequence.
        UserError: another rank ended without reporting an error.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or (isinstance(error, SystemExit) and error.code == TERMINATED):
            raise  # of `align.engine.stopping`: all ranks have ended
        reported_error: BaseException = error
        if not isinstance(error, UserError) and LOST.search(str(error)):
            reported_error = UserError(
                f"lost the connection to another process of this run, which was killed or whose machine failed ({error}). "
                "The same command continues from the last checkpoint."
            )
        first = None
        with contextlib.suppress(RuntimeError):  # the store cannot be reached
            if _watch is None:  # this rank fails before it has met the others
                watch(int(os.environ["RANK"]), size, patience=SEEN_TIMEOUT)
            assert _watch is not None
            user = isinstance(reported_error, UserError)
            first = _watch.report(
                str(reported_error) if user else f"{type(reported_error).__name__}: {reported_error}", 2 if user else 1
            )
            reported_error.reported = True  # type: ignore[attr-defined]
        stop_watching()
        if first is not None:
            raise OtherRankFailed(first) from error
        if reported_error is error:
            raise
        raise reported_error from error


def give_up(message: str) -> NoReturn:
    """End this process, from a thread, and the other ranks by an error: the main thread cannot be interrupted."""
    try:
        with reported():
            raise UserError(message)
    except OtherRankFailed:
        pass  # that rank has printed its error
    except UserError as error:
        say(f"error: {error}")
    os._exit(2)


def end_process(first: dict[str, Any]) -> NoReturn:
    """End this process, whatever its main thread is doing. Print the failed rank's error if that rank could not."""
    if first["host"] != socket.gethostname() and os.environ.get("LOCAL_RANK", "0") == "0":
        message = " ".join(str(first["message"]).split())
        say(f"error: rank {first['rank']} on {first['host']}: {message}")
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor, which a progress bar hides
        sys.stderr.flush()
    os._exit(int(first["code"]))
