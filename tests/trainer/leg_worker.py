"""One rank of a run of test_checkpoint.py."""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState

from align.runs.launch import run_stage_cli
from align.trainer.callback import StageCallback


def leg(stage: str, recipe: str, last: int | None) -> None:
    """Run a stage as this rank; all ranks end without a word once the checkpoint of step `last` is complete."""
    save = StageCallback.on_save

    def save_and_stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save(self, args, state, control, **kwargs)
        if state.global_step == last:
            PartialState().wait_for_everyone()
            os._exit(0)

    StageCallback.on_save = save_and_stop  # type: ignore[method-assign]
    run_stage_cli(stage, [recipe])
