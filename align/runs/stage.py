"""The start and the end of every stage: find the checkpoint to resume from, write manifest and card."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.config.base import StageRecipe, TrainerRecipe
from align.config.stages import stage_of
from align.engine.deepspeed_config import uses_deepspeed, zero_stage
from align.engine.distributed import World
from align.engine.faults import during
from align.errors import UserError
from align.models.inspect_folder import UNTRAINED
from align.runs import lock_record
from align.runs.adapter_card import card_of_adapter
from align.runs.checkpoint import (
    VERSION,
    clear_partial,
    complete_checkpoints,
    cut_records,
    find_corruption,
    lost_records,
    read_state,
    rotate,
    set_aside,
)
from align.runs.files import write_text
from align.runs.manifest import read_manifest, write_manifest
from align.runs.markdown import markdown_text
from align.runs.output_folder import share
from align.runs.own_files import delete, new_folder, own
from align.runs.results import report_cards
from align.runs.run_record import check_rows, record_run
from align.runs.tables import cell, markdown_table
from align.terminal import say

SEEN_WITHIN = 10.0  # seconds until a file is seen on all nodes; network file systems cache names


def last_checkpoint(recipe: StageRecipe, world: World, report: Mapping[str, Any]) -> Path | None:
    """The newest complete and intact checkpoint, the same on every rank; None to start from the beginning.

    Each rank reads a share of the files. Rank 0 deletes partial checkpoints, renames damaged ones and prints a message,
    truncates the run's records to the checkpoint, and records what the run starts from.

    Args:
        report: of the rows, from `align.data.load`.

    Raises:
        UserError: the checkpoint was written by an earlier version, a rank does not see the folder of rank 0, or rows or
            records are other than they were.
    """
    check_shared_folder(recipe.output_dir, world)
    check_rows(recipe, report)
    checkpoint = _newest_intact(recipe.output_dir, world)
    if not world.is_main:
        share(recipe.output_dir)
    check_layout(recipe, world, checkpoint)
    if checkpoint is not None:
        check_records(recipe, checkpoint)
    if world.is_main:
        if checkpoint is not None:
            cut_records(checkpoint)
            rotate(recipe.output_dir, recipe.save_total_limit)
        record_run(recipe, report, checkpoint)
    return checkpoint


def check_shared_folder(output_dir: str, world: World) -> None:
    """Check that the ranks on all nodes see the folder that rank 0 writes to, by the lock that rank 0 has put there.

    Raises:
        UserError: on every rank, if one does not see it.
    """
    folder, host = Path(output_dir), socket.gethostname()
    if world.size == 1:
        return
    # Host, process, its start and the boot of its machine: no other lock is the same.
    expected = json.loads(world.gather_text(json.dumps(lock_record.read(folder)) if world.is_main else "")[0])
    deadline = time.monotonic() + SEEN_WITHIN
    while not (seen := lock_record.read(folder) == expected) and time.monotonic() < deadline:
        time.sleep(0.2)
    if blind := sorted({name for name in world.gather_text("" if seen else host) if name}):
        raise UserError(
            f"output_dir: {output_dir} on {expected['host']}, where rank 0 writes it, is not the folder of this name on "
            f"{', '.join(blind)}; give a path on a file system that all nodes share."
        )


def check_records(recipe: StageRecipe, checkpoint: Path) -> None:
    """Check that `metrics.jsonl` and `samples.jsonl` are as they were at a checkpoint, from which a run goes on.

    Raises:
        UserError: one is not, and `accept_changes` does not name it.
    """
    for name, what in lost_records(checkpoint).items():
        if name not in recipe.accept_changes:
            raise UserError(
                f"{checkpoint.parent / name}: {what}; put it back, or add `accept_changes: [{name}]` to resume without its "
                f"earlier lines, or delete {checkpoint.parent} to start over."
            )


def _newest_intact(output_dir: str, world: World) -> Path | None:
    if world.is_main:
        clear_partial(output_dir)
    damaged = []
    while name := world.gather_text(_newest(output_dir) if world.is_main else "")[0]:  # one decision for all ranks
        checkpoint = Path(output_dir) / name
        found = world.gather_text(find_corruption(checkpoint, world.rank, world.size) or "")
        if not any(found):
            break
        if world.is_main:
            wrong = next(filter(None, found))
            damaged.append(f"{checkpoint}: damaged, {wrong}; set aside as {set_aside(checkpoint).name}")
    for message in damaged:
        say(f"{message}, {f'going on from {name}' if name else 'starting from the beginning'}")
    return Path(output_dir) / name if name else None


def _newest(output_dir: str) -> str:
    found = complete_checkpoints(output_dir)
    return found[-1].name if found else ""


def layout(recipe: StageRecipe, processes: int) -> str:
    """The number of processes and the kind of sharding that a checkpoint is written with, in words."""
    policy, value = zero_stage(recipe), zero_stage(recipe, "value")
    how = f"ZeRO {policy}" + (f" (value model {value})" if value != policy else "")
    how += " with a DeepSpeed file" * (uses_deepspeed(recipe) and not policy)
    return f"{processes} process{'es' * (processes > 1)} at {how}"


def check_layout(recipe: StageRecipe, world: World, checkpoint: Path | None) -> None:
    """Check that the checkpoint can be loaded, and say on rank 0 if it was saved in another layout.

    Raises:
        UserError: it was written by an earlier version, whose checkpoints are pickles, which can run code.
    """
    if checkpoint is None:
        return
    state, mine = read_state(checkpoint), layout(recipe, world.size)
    if state.get("version") != VERSION:
        raise UserError(
            f"{checkpoint}: was saved by another version of align, with files that this one does not load; finish the "
            f"run with that version, or delete {checkpoint.parent} to start over."
        )
    if state["layout"] != mine and world.is_main:
        other_ranks = state["layout"].split(" at ")[0] != mine.split(" at ")[0]
        noise = isinstance(recipe, TrainerRecipe) and other_ranks  # PPO draws by response, not by rank
        say(
            f"{checkpoint}: was saved by {state['layout']}, and this run has {mine}: it continues, and equals a run "
            f"without the change up to rounding{' and the noise of dropout and NEFTune' * noise}."
        )


def finished_results(output_dir: str) -> dict[str, Any]:
    """Print that nothing is left to do; returns the results that the manifest holds."""
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{output_dir}: this stage is finished already")
    return dict((read_manifest(output_dir) or {})["results"])


def write_untrained(output_dir: str, seed: int, world: World, resuming: bool, write: Callable[[Path], None]) -> str:
    """Write the stage's starting model on rank 0, so that all ranks, and a resumed run, start from the same one.

    Args:
        seed: of the weights that are random.
        write: fills the folder that it is given.

    Returns:
        The folder, for all ranks to load from.
    """
    folder = Path(output_dir) / UNTRAINED
    if world.is_main and not (resuming and folder.is_dir()):
        torch.manual_seed(seed)
        with during("start", folder), new_folder(folder) as fresh:
            write(fresh)
    world.barrier()
    return str(folder)


def finish(
    recipe: StageRecipe,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Any],
    results: Mapping[str, Any],
    card: str,
    **more: Any,
) -> None:
    """Write the README.md and then the manifest, on rank 0.

    Args:
        tokenizer, data, results, more: as for `align.runs.manifest.write_manifest`.
        card: Markdown that says what the model is and how to load it.
    """
    skipped = {reason: each["count"] for reason, each in data.get("skipped", {}).get("train", {}).items()}
    used = data["train_rows"] - sum(skipped.values())
    left_out = "".join(f"; {count} were skipped: {markdown_text(reason)}" for reason, count in skipped.items())
    sources = [[source["source"], source["rows"], source["fingerprint"][:16]] for source in data["sources"]]
    table = markdown_table(["measure", "before", "after"], results["table"]) if results["table"] else "Not evaluated.\n"
    text = (
        f"---\nlibrary_name: transformers\ntags: [align, {stage_of(recipe).name}]\n---\n\n{card}\n"
        f"## Results\n\n{table}\n## Data\n\n{markdown_table(['source', 'rows', 'fingerprint'], sources)}\n"
        f"{used} rows were trained on{left_out}. The recipe, seed and package versions are in `stage.json`, the "
        "metrics of the run in `metrics.jsonl`.\n"
    )
    folder = Path(recipe.output_dir)
    if recipe.method == "bottleneck":
        text = card_of_adapter(text, recipe.output_dir)
    with during("records", folder):
        write_text(own(folder / "README.md"), text)
        delete(folder / UNTRAINED)
        write_manifest(recipe, tokenizer, {**data, "trained_rows": used}, results, **more)
    for line in closing_lines(results):
        say(f"{folder}: {line}")


def closing_lines(results: Mapping[str, Any]) -> list[str]:
    """The lines that a stage prints at its end: before and after, the report card's verdict, and where the results are."""
    lines = [
        f"{measure}: {f'{cell(before)} before, ' if before is not None else ''}{cell(after) or 'undefined'} after training"
        for measure, before, after in results["table"]
    ]
    lines += [f"report card: {card.get('summary')}, in {path}" for path, card in report_cards(results).items()]
    evaluated = "" if results["table"] else "; nothing was evaluated"
    return [*lines, f"finished, with its results in README.md{evaluated}"]
