"""`align check RECIPE|DIR`: whether it would run, said in seconds and without loading weights.

A model that an earlier recipe of the folder has yet to make is stood in for by a folder with its configuration,
tokenizer and manifest, so that the stages' own checks run on it as they will on the real one.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from align.cli.check.evaluation import check_evaluation
from align.cli.check.findings import Report, describe, writable
from align.cli.check.memory import activations, memory_table, skeleton
from align.cli.check.sample_rows import Start, sample
from align.cli.steps import known_overrides, numbered_recipes, processes
from align.config.base import StageRecipe, TrainerRecipe
from align.config.encoders import ClassifyRecipe, MLMRecipe
from align.config.evaluate import EvaluateRecipe
from align.config.load import load_any, resolve_function
from align.config.ppo import PPORecipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.config.stages import read_stage, stage_inputs
from align.data.duplicates import describe_duplicates
from align.data.load import DataSettings, Rows, load_rows
from align.data.mixture import describe_task_shares
from align.data.rows import Demonstration, Labelled, Passage, Preference, Prompt, render_text
from align.encoders.labels import find_labels
from align.engine.batch_plan import BatchPlan, batch_plan
from align.errors import UserError
from align.models.load import is_encoder, load_config
from align.models.tokenizer import load_tokenizer
from align.runs.files import write_json
from align.runs.manifest import MANIFEST, RUN, check_tokenizer, is_finished, tokenizer_digest
from align.runs.quiet import quiet
from align.runs.tables import make_console
from align.sft.report import retention_lines
from align.sft.retention import Retention, load_with_retention, replay_count

FORMS = {"sft": Demonstration, "reward": Preference, "ppo": Prompt, "classify": Labelled, "mlm": Passage}


def run(path: str, num_gpus: int | None = None, overrides: Sequence[str] = ()) -> int:
    """Check a recipe, or a folder's numbered recipes; returns 0, or 2 when something would not run.

    Raises:
        UserError: there is no recipe to check, or an override that no stage has.
    """
    quiet()
    report = Report(make_console())
    paths = numbered_recipes(path) if Path(path).is_dir() else [path]
    stages = {each: read_stage(each) for each in paths}
    made: dict[Path, Path] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, (each, stage) in enumerate(stages.items()):
            report.console.print(Text(f"{each} ({stage})", style="bold"))
            with report.part():
                words = known_overrides(stage, overrides, set(stages.values())) if Path(path).is_dir() else overrides
                recipe = load_any(stage, each, words)
                report.say("keys and values")
                if isinstance(recipe, EvaluateRecipe):
                    check_evaluation(recipe, report, made)
                    continue
                _check_stage(recipe, num_gpus, report, made, Path(temporary) / str(number), Path(each).name)
    if report.mistakes:
        report.console.print(Text(f"{report.mistakes} mistake{'s' * (report.mistakes > 1)} to mend", style="bold red"))
        return 2
    report.console.print(Text("it would run", style="bold green"))
    return 0


def _check_stage(
    recipe: StageRecipe, num_gpus: int | None, report: Report, made: dict[Path, Path], stand_in: Path, name: str
) -> None:
    """All that can be said of one recipe. `made` maps outputs of earlier recipes to their stand-ins, and is added to."""
    stage = str(recipe.stage)
    world_size = num_gpus or processes(recipe, None)
    plan = rows = start = None
    with report.part():
        report.say(f"output_dir: {_output_state(recipe, stage)}")
    with report.part():
        plan = batch_plan(recipe, world_size)
        report.say(f"batch plan: {plan.describe()}")
    with report.part():
        for key in ("reward_funcs", "eval_reward_funcs"):
            for spec in getattr(recipe, key, []):
                resolve_function(spec, key)
                report.say(f"{key}: {spec}")
        if isinstance(recipe, SFTRecipe) and recipe.eval_metrics:
            from align.sft.responses import load_metrics

            report.say(f"eval_metrics: {', '.join(load_metrics(recipe))}")
    with report.part():
        lines: list[str] = []
        if isinstance(recipe, SFTRecipe):
            rows, retention = load_with_retention(recipe)
            lines = described_retention(recipe, rows, retention)
        else:
            rows = load_rows(DataSettings.from_recipe(recipe), FORMS[stage])
        for line in (f"rows: {_counts(rows, recipe, plan)}", *lines):
            report.say(line)
        if shares := describe_task_shares(rows.report):
            report.say(f"tasks: {shares}")
        if repeated := describe_duplicates(rows.report):
            report.say(repeated)
    with report.part():
        recipe = _with_stand_ins(recipe, made, report)
        start = _start(recipe, rows, stand_in)
        if start is not None:
            report.say(f"model: {start.config.model_type}, {describe(start.tokenizer)}; all inputs fit together")
    if start is None:
        report.say("not checked: tokens and memory, for want of the above", good=False)
        return
    if rows is not None:
        with report.part():
            for shown in sample(recipe, rows, start):
                report.console.print(shown, soft_wrap=True)
    if plan is not None:
        report.console.print(memory_table(recipe, start.config, start.others, plan))
        report.console.print(Text(activations(recipe, start.config, plan)), soft_wrap=True)
    if not (Path(recipe.output_dir) / MANIFEST).is_file():
        _write_stand_in(recipe, start, stand_in)
        made[Path(recipe.output_dir).resolve()] = stand_in
        report.stand_ins[str(stand_in)] = f"{recipe.output_dir} (made by {name})"


def _output_state(recipe: StageRecipe, stage: str) -> str:
    folder = Path(recipe.output_dir)
    if is_finished(recipe, stage, stage_inputs(recipe)):
        return f"{folder} is finished; the stage would be skipped"
    return f"{writable(folder)}, {'which would be resumed' if (folder / RUN).is_file() else 'new'}"


def _counts(rows: Rows, recipe: StageRecipe, plan: BatchPlan | None) -> str:
    bad = "; ".join(f"{entry['count']} skipped: {reason}" for reason, entry in rows.report["bad_rows"].items())
    text = f"{len(rows.train)} to train on, {len(rows.evaluation)} to evaluate on" + (f"; {bad}" if bad else "")
    if isinstance(recipe, TrainerRecipe) and plan is not None:
        trained = len(rows.train)
        if isinstance(recipe, SFTRecipe):
            trained += replay_count(recipe.replay_fraction, trained)
        per_epoch = math.ceil(trained / plan.batch_size)
        steps = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * per_epoch)
        text += f"; up to {steps} optimiser steps"
    return text


def _with_stand_ins(recipe: StageRecipe, made: dict[Path, Path], report: Report) -> StageRecipe:
    changes: dict[str, Any] = {}
    for key, path in stage_inputs(recipe).items():
        if path and (stand_in := made.get(Path(path).resolve())):
            changes[key] = str(stand_in)
            report.say(f"{key}: {stand_in}")
    return dataclasses.replace(recipe, **changes)


def _start(recipe: StageRecipe, rows: Rows | None, stand_in: Path) -> Start | None:
    """The stage's own look at what it starts from; None when that depends on rows that are not there.

    Raises:
        UserError: as the stage would.
    """
    if isinstance(recipe, RewardRecipe):
        from align.reward.inputs import check_inputs as check_reward_inputs

        reward = check_reward_inputs(recipe)
        others = {}
        if reward.answering is not None:
            others["SFT model (to set the zero)"] = load_config(reward.answering, recipe, "sft_model_path")
        return Start(reward.config, reward.tokenizer, reward.encoder, others)
    if isinstance(recipe, PPORecipe):
        from align.ppo.setup import check_inputs as check_ppo_inputs

        inputs = check_ppo_inputs(recipe)
        others = {"value": load_config(inputs.value_path, recipe, "value_model_path")}
        if inputs.reward_config is not None:
            others["reward"] = inputs.reward_config
        return Start(load_config(recipe.sft_model_path, recipe, "sft_model_path"), inputs.tokenizer, False, others)
    if isinstance(recipe, ClassifyRecipe):
        return _classifier(recipe, rows) if rows is not None else None
    if isinstance(recipe, MLMRecipe):
        from align.encoders.mlm import check_inputs as check_mlm_inputs

        return Start(*check_mlm_inputs(recipe), encoder=True)
    assert isinstance(recipe, SFTRecipe)
    if recipe.model_name_or_path is None:
        return _scratch(recipe, rows, stand_in) if rows is not None else None
    path = recipe.model_name_or_path
    config = load_config(path, recipe, "model_name_or_path")
    if is_encoder(config):
        raise UserError(f"model_name_or_path: {path} is an encoder ({config.model_type}); name a model that generates.")
    tokenizer = load_tokenizer(path, recipe)
    check_tokenizer(path, tokenizer, "model_name_or_path")
    return Start(config, tokenizer)


def _classifier(recipe: ClassifyRecipe, rows: Rows) -> Start:
    """The model to put a head on, with the labels of the rows in its configuration."""
    from align.encoders.classify import check_inputs

    inputs = check_inputs(recipe)
    labels = find_labels(rows.train, rows.evaluation, recipe.problem_type)
    inputs.config.num_labels = len(labels.names)
    return Start(inputs.config, inputs.tokenizer, inputs.encoder, labels=labels)


def _scratch(recipe: SFTRecipe, rows: Rows, stand_in: Path) -> Start:
    """The tokenizer and configuration of a model that the stage would start at random."""
    from align.models.from_scratch import scratch_config, train_tokenizer

    config = scratch_config(recipe)
    texts = [render_text(turns) for row in rows.train for turns in (row.prompt, row.completion)]
    train_tokenizer(texts, recipe.tokenizer_vocab_size).save_pretrained(stand_in)
    tokenizer = load_tokenizer(str(stand_in), recipe)
    config.vocab_size = len(tokenizer)
    return Start(config, tokenizer)


def _write_stand_in(recipe: StageRecipe, start: Start, folder: Path) -> None:
    """What the stage would leave in its output folder, weights apart."""
    auto = AutoModelForMaskedLM if isinstance(recipe, MLMRecipe) else AutoModelForCausalLM
    if isinstance(recipe, RewardRecipe | ClassifyRecipe):
        auto = AutoModelForSequenceClassification
    changes = {"num_labels": 1} if isinstance(recipe, RewardRecipe) else {}
    model = skeleton(auto, start.config, recipe.trust_remote_code, **changes)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    write_json(folder / MANIFEST, {"stage": recipe.stage, "tokenizer": tokenizer_digest(start.tokenizer)})


def described_retention(recipe: SFTRecipe, rows: Rows, retention: Retention) -> list[str]:
    """Where the retention rows come from and of which form they are, and what becomes of them."""
    if not recipe.retention:
        return []
    forms = Counter(map(_form, [*retention.measured, *retention.replayable]))
    sources = [each for each in rows.report["sources"] if each["used_for"] == "retention"]
    named = ", ".join(f"{each['source']} ({each['rows']} rows)" for each in sources)
    replayed = replay_count(recipe.replay_fraction, len(rows.train))
    lines = [f"retention rows: {named}; {', '.join(f'{count} of {form}' for form, count in forms.items())}"]
    return lines + retention_lines(rows.report, len(rows.train), replayed)


def _form(row: Demonstration) -> str:
    if not isinstance(row.completion, str):
        return "`messages`"
    return "`prompt` and `completion`" if row.prompt else "`text`"
