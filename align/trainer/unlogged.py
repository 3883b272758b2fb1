"""The sums that a Trainer has accumulated since its last log, which checkpoints keep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.compat.transformers import set_unlogged_loss, unlogged_loss
from align.compat.trl import pending_metrics, raise_token_count
from align.config.json_file import read_json
from align.errors import BadFile


def unlogged(trainer: Any) -> dict[str, Any]:
    """The sums of this rank, as JSON.

    Args:
        trainer: a Trainer with `train_sums`, its own sums beside the metrics of TRL.
    """
    steps, loss = unlogged_loss(trainer)
    metrics = {name: list(values) for name, values in pending_metrics(trainer, "train").items()}
    return {"steps": steps, "loss": loss, "metrics": metrics, "sums": trainer.train_sums.tolist()}


def restore_unlogged(trainer: Any, files: Sequence[Path]) -> None:
    """Restore the sums from the entry `unlogged` of these files.

    Args:
        files: this rank's; those of all ranks if their number has changed: then each gets an equal part.

    Raises:
        UserError: a file holds something else.
    """
    found = [(file, read_json(file, follow_links=False).get("unlogged")) for file in files]
    ranks = [each for _, each in found if each is not None]
    if not ranks or not ranks[0]["steps"]:
        return  # what is saved every `save_steps` has been logged
    try:
        set_unlogged_loss(trainer, ranks[0]["steps"], statistics.fmean(each["loss"] for each in ranks))
        pending_metrics(trainer, "train").update(ranks[0]["metrics"])  # which are those of all ranks
        raise_token_count(trainer, max(ranks[0]["metrics"].get("num_tokens", [0])))
        share = 1.0 if len(files) == 1 else 1 / trainer.args.world_size
        trainer.train_sums.copy_(torch.tensor([each["sums"] for each in ranks], dtype=torch.float64).sum(dim=0) * share)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadFile(f"{found[0][0]}: expected sums since the last log ({type(error).__name__}: {error})") from error
