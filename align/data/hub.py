"""Check for a few seconds whether the Hugging Face hub can be reached, since each download would retry for a minute."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request
from urllib.parse import urlsplit

from align.compat.others import hub_address, hub_is_off, set_hub_off
from align.terminal import say

CONNECT_TIMEOUT = 5.0  # seconds for each try
TRIES = (0.0, 1.0, 2.0)  # seconds before each try, for a network that fails at once
RECHECK_SECONDS = 60.0

_last_check: tuple[float, bool] | None = None  # when, and whether it was off


def go_offline_if_unreachable() -> None:
    """Before a download: if the hub cannot be reached, print that and use its cache only.

    The result is kept for a minute. With `HF_HUB_OFFLINE=1` nothing is checked.
    """
    global _last_check
    if _last_check is not None and time.monotonic() < _last_check[0] + RECHECK_SECONDS:
        return
    if _last_check is not None and _last_check[1]:
        set_hub_off(False)
    if hub_is_off():
        return
    off = not any(map(_reached, TRIES))
    _last_check = time.monotonic(), off
    if off:
        set_hub_off(True)
        say(f"{hub_address()} cannot be reached: only models and data in its cache are found")


def _reached(wait: float) -> bool:
    time.sleep(wait)
    found = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection(_place(), CONNECT_TIMEOUT):
            found.set()

    thread = threading.Thread(target=connect, daemon=True)  # names are looked up without a limit of time
    thread.start()
    thread.join(CONNECT_TIMEOUT)
    return found.is_set()


def _place() -> tuple[str, int]:
    """Host and port of the hub, or of the proxy on the way to it."""
    address = urlsplit(hub_address())
    host, proxies = address.hostname or "", urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        address = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    return address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
