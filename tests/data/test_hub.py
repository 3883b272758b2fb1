"""A hub that cannot be reached: an error in seconds, and what is in the cache is still found."""

from __future__ import annotations

import socket
import time

import pytest

from align.compat.others import hub_is_off, set_hub_off
from align.config.data_source import DataSource
from align.data import hub
from align.data.hub import go_offline_if_unreachable
from align.data.sources import read_source
from align.errors import UserError
from align.evaluate.metrics import load_metric
from align.models.load import load_config


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def at(monkeypatch):
    """Say where the hub is; none is asked before."""
    monkeypatch.setattr(hub, "_last_check", None)
    monkeypatch.setattr(hub, "TRIES", (0.0, 0.01))
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    set_hub_off(False)
    yield lambda port: monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    set_hub_off(True)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize(
    ("fetch", "error"),
    [
        (
            lambda: load_config("nobody/nothing", "model_name_or_path"),
            "model_name_or_path: no model at nobody/nothing; check the path or hub id",
        ),
        (
            lambda: list(read_source(DataSource(path="nobody/rows"), "train_dataset")),
            "train_dataset: nobody/rows: neither a file nor a data set that could be fetched",
        ),
        (lambda: load_metric("nobody/metric"), "metrics: no metric 'nobody/metric'"),
    ],
    ids=["model", "data", "metric"],
)
def test_what_is_on_a_hub_that_is_not_there_is_one_error_at_once(at, fetch, error, capsys, monkeypatch):
    at(port := closed_port())
    began = time.monotonic()
    with pytest.raises(UserError, match=error):
        fetch()
    monkeypatch.setattr(hub, "_reached", None)  # it is not asked again
    with pytest.raises(UserError, match=error):
        fetch()
    assert time.monotonic() < began + 10, "of which one download alone would take 23"
    said = capsys.readouterr().err
    assert said.count(f"http://127.0.0.1:{port} cannot be reached: only models and data in its cache are found") == 1


def test_it_is_asked_again_after_a_while(at, listening, monkeypatch):
    at(closed_port())
    go_offline_if_unreachable()
    assert hub_is_off()
    at(listening.getsockname()[1])
    go_offline_if_unreachable()
    assert hub_is_off()
    monkeypatch.setattr(hub, "RECHECK_SECONDS", 0.0)
    go_offline_if_unreachable()
    assert not hub_is_off()


def test_a_proxy_is_on_the_way(at, listening, monkeypatch):
    at(closed_port())
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listening.getsockname()[1]}")
    go_offline_if_unreachable()
    assert not hub_is_off()


def test_a_network_that_does_not_answer_is_given_up(at, monkeypatch):
    at(80)
    monkeypatch.setattr(hub, "CONNECT_TIMEOUT", 0.05)
    monkeypatch.setattr(socket, "create_connection", lambda *_: time.sleep(1.0))  # as a name that is looked up
    began = time.monotonic()
    go_offline_if_unreachable()
    assert hub_is_off()
    assert time.monotonic() < began + 0.9


def test_whoever_is_offline_on_purpose_waits_for_nothing(at, monkeypatch):
    set_hub_off(True)
    monkeypatch.setattr(hub, "_reached", None)
    go_offline_if_unreachable()
