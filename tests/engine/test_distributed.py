"""Joining the processes of a run."""

from __future__ import annotations

import pytest
import torch

from align.engine.distributed import connect
from align.errors import UserError


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as on a machine with one GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="LOCAL_RANK is 1, and torch sees 1 GPU"):
        connect(deepspeed_files=False)
