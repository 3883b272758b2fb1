"""One rank of a run of test_checkpoint.py."""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState

from align.engine import stopping
from align.runs.launch import run_stage_cli
from align.trainer.callback import StageCallback


def leg(stage: str, recipe: str, last: int | None, stop: int | None) -> None:
    """Run a stage as this rank; all ranks end without a word once the checkpoint of step `last` is complete.

    Args:
        stop: the step during which a SIGTERM comes.
    """
    save, begin = StageCallback.on_save, StageCallback.on_step_begin

    def save_and_stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save(self, args, state, control, **kwargs)
        if state.global_step == last:
            PartialState().wait_for_everyone()
            os._exit(0)

    def ask_and_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == stop:
            stopping.ask_to_stop()
        begin(self, args, state, control, **kwargs)

    StageCallback.on_save = save_and_stop  # type: ignore[method-assign]
    StageCallback.on_step_begin = ask_and_begin  # type: ignore[method-assign]
    run_stage_cli(stage, [recipe])
