"""Minibatches whose loss is NaN or infinite: they are skipped and saved, and too many in a row stop the run."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from align.engine.faults import during
from align.errors import UserError
from align.ppo.ppo_run import PPORun
from align.ppo.rollout import Rollout
from align.runs.files import follow_umask
from align.runs.own_files import own

MAX_SKIPPED = 3  # in a row, before the run stops
SAVED = ("prompt_ids", "prompt_mask", "response_ids", "mask", "old_logprobs", "ref_logprobs", "values", "scores")


def skip_minibatch(run: PPORun, minibatch: Rollout, name: str, sums: dict[str, float]) -> None:
    """Drop the gradients of a minibatch, and save it in `bad_batches/`.

    Args:
        name: of the file.
        sums: sums of the losses, for the error.

    Raises:
        UserError: `MAX_SKIPPED` minibatches in a row were skipped.
    """
    run.models.discard()
    run.skipped_in_a_row += 1
    file = Path(run.recipe.output_dir) / "bad_batches" / f"{name}.safetensors"
    if run.world.is_main:
        names = [*SAVED, "advantages", "returns"]
        with during("records", file):
            own(file.parent).mkdir(exist_ok=True)
            save_file({name: getattr(minibatch, name).contiguous() for name in names}, file)
            follow_umask([file])
    if run.skipped_in_a_row >= MAX_SKIPPED:
        losses = ", ".join(f"{n} {sums[n]}" for n in ("policy/loss", "value/loss", "ptx/loss") if n in sums)
        raise UserError(
            f"minibatch {name.rpartition('-')[2]}: the loss is not finite ({losses}), for {run.skipped_in_a_row} minibatches in a row; "
            f"they are saved in {file.parent}. Lower learning_rate, check that scores are of order 1, and run again to "
            "continue from the last checkpoint."
        )
