"""The outputs of a PPO run: Hugging Face folders of its models, the model card and the manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from align.config.judge import best_metric
from align.engine.distributed import World
from align.engine.ema import EMA
from align.engine.engine import TrainEngine
from align.engine.faults import during
from align.errors import BadFile, UserError
from align.models.saved_dtype import set_saved_dtype
from align.ppo.frontier import CHART
from align.ppo.ppo_run import PPORun
from align.runs.files import difference, fingerprints, write_json, write_text
from align.runs.markdown import markdown_line, markdown_text, python_text
from align.runs.own_files import new_files, new_folder, own, put_back
from align.runs.records import read_record
from align.runs.schemas import BEST, SUMS, SUMS_RECORD
from align.runs.stage import finish
from align.runs.tracker import Tracker
from align.terminal import say

CARD = """# Language model, trained by {objective}

From the SFT model {base}, with a KL penalty of {kl_coef} per nat against it. This folder holds the last policy{others}.

{verdict}{chart}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
```
"""


def save_model(run: PPORun, engine: TrainEngine | EMA, folder: Path) -> None:
    """Write a model and the tokenizer as a Hugging Face folder, atomically."""
    with during("model", folder), new_folder(folder) if run.world.is_main else nullcontext(folder) as target:
        _write(run, engine, target)
    run.world.barrier()


def save_best(run: PPORun) -> None:
    """Write the policy into `best/`, with the checksums of its files, which a resumed run verifies."""
    folder = Path(run.recipe.output_dir) / BEST
    with during("model", folder), new_folder(folder) if run.world.is_main else nullcontext(folder) as target:
        _write(run, run.models.policy, target)
        if run.world.is_main:
            write_json(target / SUMS, {"files": fingerprints(target)})
    run.world.barrier()


def check_best(run: PPORun) -> None:
    """Check that the files of `best/` are unchanged when a run resumes. Each rank reads a share of them.

    With `accept_changes: [best]` a changed folder is ignored; the best is then chosen among later evaluations.

    Raises:
        UserError: a file is missing or changed; raised on every rank.
    """
    folder, world = Path(run.recipe.output_dir) / BEST, run.world
    if run.progress.best is None:
        return
    if world.is_main:
        put_back(folder)
    world.barrier()
    if not (found := next(filter(None, world.gather_text(_find_damage(folder, world))), None)):
        return
    if BEST not in run.recipe.accept_changes:
        raise UserError(
            f"{folder}: {found}; put it back from a copy, or add `accept_changes: [{BEST}]` to choose the best among later "
            f"evaluations only, or delete {folder.parent} to start over."
        )
    run.progress.best, run.progress.best_worth, run.progress.falls = None, [], 0


def _find_damage(folder: Path, world: World) -> str:
    """What is missing or changed in this rank's share of the files; empty if nothing is."""
    if not os.path.lexists(folder / SUMS):  # of an earlier version
        return "" if (folder / "config.json").is_file() else "is missing"
    try:
        sums = read_record(folder / SUMS, SUMS_RECORD)["files"]
        return difference(folder, dict(list(sums.items())[world.rank :: world.size])) or ""
    except (BadFile, OSError) as error:
        return str(error)


def save_outputs(
    run: PPORun, tracker: Tracker, data: Mapping[str, Any], results: Mapping[str, Any], frontier: str | None
) -> None:
    """Print the verdict, save policy, value model and moving average, and write model card and manifest.

    Args:
        data: counts and fingerprints of the rows.
        results: closing numbers.
        frontier: an SVG for the card.
    """
    best = [] if run.progress.best is None else [f"best/ holds {describe_best(run)}"]
    tracker.say(*results.get("verdict", []), *best)
    recipe, folder = run.recipe, Path(run.recipe.output_dir)
    with during("model", folder), new_files(folder) if run.world.is_main else nullcontext(folder) as target:
        dtype = _write(run, run.models.policy, target)
    run.world.barrier()
    if run.models.value is not None:
        save_model(run, run.models.value, folder / "value")
    if run.ema is not None:
        save_model(run, run.ema, folder / "ema")
    if run.world.is_main:
        say(f"{folder}: weights in {dtype} (save_dtype: {recipe.save_dtype})")
        others = {
            f", `best/` {describe_best(run)}": run.progress.best is not None,
            ", `value/` the value model": run.models.value is not None,
            ", `ema/` the moving average of its weights": run.ema is not None,
        }
        if frontier is not None:
            write_text(own(folder / CHART), frontier)
        card = CARD.format(
            folder=python_text(recipe.output_dir),
            objective={"ppo": "PPO"}.get(recipe.objective, recipe.objective.replace("_", " ")),
            base=markdown_text(recipe.sft_model_path),
            kl_coef=recipe.kl_coef,
            others="".join(text for text, is_there in others.items() if is_there),
            verdict="".join(f"- {markdown_line(line)}\n" for line in results.get("verdict", [])),
            chart="" if frontier is None else f"\n![Gain over the square root of the KL from SFT]({CHART})\n",
        )
        finish(recipe, run.sampler.tokenizer, data, results, card)
    run.world.barrier()


def describe_best(run: PPORun) -> str:
    """A description of the policy in `best/`."""
    if (best := run.progress.best) is None:
        return "nothing"
    metric = best_metric(run.recipe)
    within = f" within {run.recipe.max_kl:g} nats of KL (max_kl)" if run.recipe.max_kl is not None else ""
    if best["update"] == 0:
        return f"the SFT model: no evaluation had a higher {metric} than its {best[metric]:.4g}{within}"
    return f"that of update {best['update']}, with the highest {metric}{within}"


def _write(run: PPORun, engine: TrainEngine | EMA, folder: Path) -> str | None:
    """Save a model and the tokenizer; returns the data type of the weights, on the first rank."""
    engine.save_pretrained(folder)
    if not run.world.is_main:
        return None
    run.sampler.tokenizer.save_pretrained(folder)
    return set_saved_dtype(folder, run.recipe.sft_model_path, run.recipe.save_dtype)
