"""`align check` for the stages that train; each stage has a subclass."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from peft import PeftConfig
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PretrainedConfig

from align.cli.check.findings import Context, describe, with_stand_ins, writable
from align.cli.check.memory import Footprint, activations_line, count_parameters, load_line, memory_table, skeleton
from align.cli.check.sample_rows import Sample, Start, evaluation_line, sample_lines
from align.cli.steps import processes
from align.config.base import FUNCTION_KEYS, StageRecipe, TrainerRecipe
from align.config.ensemble import JUDGE, MEMBER
from align.config.functions import resolve_function
from align.config.schedule import check_decay_steps
from align.data.duplicates import describe_duplicates
from align.data.load import DataSettings, Rows, load_rows
from align.data.mixture import describe_task_shares
from align.data.split import EmptySplit
from align.engine.batch_plan import BatchPlan, batch_plan
from align.models.bottleneck import adapter_entries
from align.models.inspect_folder import ADAPTER_CONFIG, inspect_inputs
from align.models.model_types import is_encoder_decoder
from align.ppo.shared_rewards import ADAPTER, FOLDER
from align.runs.checkpoint import complete_checkpoints
from align.runs.files import write_json
from align.runs.manifest import is_finished, tokenizer_digest
from align.runs.output_folder import find_mark
from align.runs.own_files import MANIFEST
from align.runs.run_record import check_rows
from align.runs.stage import check_records

R = TypeVar("R", bound=StageRecipe)


class TrainingCheck(Generic[R]):
    """The check of a stage that trains. Methods raise UserError where the stage would."""

    form: ClassVar[type]  # of its rows
    auto: ClassVar[Any] = AutoModelForCausalLM  # class of the model that it saves
    num_labels: ClassVar[int | None] = None  # of that model, where the stage decides it
    sequences_per_row: ClassVar[int] = 1
    has_logits: ClassVar[bool] = True  # whether a training step computes logits over the vocabulary

    def load(self, recipe: R) -> tuple[Rows, list[str], list[str]]:
        """The rows of the stage, further lines about them, and what is doubtful about rows that can be used."""
        rows = load_rows(DataSettings.from_recipe(recipe), self.form)
        return rows, [], doubts_about(rows)

    def functions(self, recipe: R) -> list[str]:
        """A line for each key that names functions or metrics, all of which can be imported."""
        lines = []
        for key in FUNCTION_KEYS:
            for spec in getattr(recipe, key, []):
                resolve_function(spec, key)
                lines.append(f"{key}: {spec}")
        return lines

    def start(self, recipe: R, rows: Rows | None, folder: Path) -> Start | None:
        """The starting point of the stage; None if it depends on rows that could not be loaded.

        Args:
            folder: where the check may write files that replace a model.
        """
        raise NotImplementedError

    def sample(self, recipe: R, rows: Sequence[Any], start: Start) -> Sample:
        """The first of `rows` as the model sees it, and the token ids of all."""
        raise NotImplementedError

    def footprints(self, recipe: R, start: Start) -> list[Footprint]:
        """The models of the stage: those that train, then the frozen ones."""
        raise NotImplementedError

    def adapter(self, recipe: R, start: Start) -> PeftConfig | None:
        """The adapter that is saved beside the model, if a later stage may read it, with the model that it is trained on."""
        return None

    def more_memory(self, recipe: R, start: Start) -> list[str]:
        """Lines on memory below the table, beside that of activations."""
        return []

    def max_tokens(self, recipe: R) -> int:
        """Most tokens of a sequence."""
        assert isinstance(recipe, TrainerRecipe)
        return recipe.max_length

    def trained_rows(self, recipe: R, rows: Rows) -> int:
        """Rows of an epoch."""
        return len(rows.train)

    def check(self, recipe: R, context: Context) -> None:
        """Report what can be found out about a recipe without loading weights; writes a stand-in for its output."""
        report, plan, rows, start = context.report, None, None, None
        with report.part():
            report.say(f"output_dir: {_output_state(recipe)}")
        with report.part():
            plan = batch_plan(recipe, context.num_gpus or processes(recipe, None))
            report.say(f"batch plan: {plan.describe()}")
        with report.part():
            for line in self.functions(recipe):
                report.say(line)
        with report.part():
            try:
                rows, lines, doubts = self.load(recipe)
            except EmptySplit as error:
                _check_unfinished(recipe, error.report)
                raise
            _check_unfinished(recipe, rows.report)
            for line in (f"rows: {_counts(rows)}", *lines):
                report.say(line)
            if shares := describe_task_shares(rows.report):
                report.say(f"tasks: {shares}")
            for line in doubts:
                report.say(line, "warning")
        with report.part():
            inspect_inputs(recipe, context.stand_ins)
            recipe = with_stand_ins(recipe, context.stand_ins, report)
            start = self.start(recipe, rows, context.folder)
            if start is not None:
                report.say(f"model: {start.config.model_type}, {describe(start.tokenizer)}; all inputs fit together")
                for note in start.notes:
                    report.say(note)
        if start is None:
            report.say("not checked: tokens and memory, which need the above", "error")
            return
        if rows is not None:
            with report.part():
                shown, sampled, sizes = sample_lines(rows.train, start, lambda some: self.sample(recipe, some, start))
                for each in shown:
                    report.console.print(each, soft_wrap=True)
                if rows.evaluation:
                    report.say(evaluation_line(rows.evaluation, start, lambda some: self.sample(recipe, some, start)))
                if isinstance(recipe, TrainerRecipe) and plan is not None:
                    report.say(self._steps(recipe, rows, plan, sampled, sizes))
        if plan is not None:
            hidden_size = start.config.get_text_config().hidden_size
            models = self.footprints(recipe, start)
            report.console.print(memory_table(recipe, models, plan, hidden_size))
            sequences = plan.micro_batch_size * self.sequences_per_row
            tokens = self.max_tokens(recipe)
            activations = activations_line(start.config, sequences, tokens, recipe, self.has_logits, plan.max_tokens)
            for line in (activations, *self.more_memory(recipe, start), load_line(models, start.config)):
                report.console.print(Text(line), soft_wrap=True)
        if not (Path(recipe.output_dir) / MANIFEST).is_file():
            self._write_stand_in(recipe, start, context)

    def _steps(self, recipe: R, rows: Rows, plan: BatchPlan, sampled: int, sizes: Sequence[int]) -> str:
        """Optimizer steps, from how many examples a sampled row makes: each trained turn of a dialogue may be one, and each
        piece of a text."""
        assert isinstance(recipe, TrainerRecipe)
        examples = len(sizes) / self.sequences_per_row
        count = math.ceil(self.trained_rows(recipe, rows) * examples / sampled)
        per_epoch = math.ceil(count / plan.batch_size)
        steps = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * per_epoch)
        if recipe.max_steps > 0 or sampled == len(rows.train):
            check_decay_steps(recipe, steps)
        most = "up to" if sampled == len(rows.train) else "about"
        made = f" of {count} examples" if count != len(rows.train) else ""
        return f"steps: {most} {steps} optimizer step{'s' * (steps != 1)}{made}"

    def _write_stand_in(self, recipe: R, start: Start, context: Context) -> None:
        """Write what the stage would write to its output folder, without weights, for later recipes."""
        changes = {} if self.num_labels is None else {"num_labels": self.num_labels}
        pairs = is_encoder_decoder(start.config) and self.auto in (AutoModelForCausalLM, AutoModelForMaskedLM)
        auto = AutoModelForSeq2SeqLM if pairs else self.auto
        model = skeleton(auto, start.config, recipe.trust_remote_code, **changes)
        model.config.architectures = [type(model).__name__]
        tokenizer = tokenizer_digest(start.tokenizer)
        adapter, inputs = self.adapter(recipe, start), {}
        if adapter is not None:
            inputs["model_name_or_path"] = {FOLDER: os.path.realpath(str(adapter.base_model_name_or_path))}
        manifest = {"stage": recipe.stage, "recipe": {}, "inputs": inputs, "tokenizer": tokenizer, "results": {}}
        several = getattr(recipe, "ensemble_size", 1)
        names = [f"{MEMBER}{number}" for number in range(1, several + 1)] if several > 1 else [""]
        for name in [*names, *[JUDGE] * getattr(recipe, "train_judge", False)]:
            folder = context.folder / name
            if recipe.method == "bottleneck":
                write_json(folder / ADAPTER_CONFIG, adapter_entries(recipe, model.config))
            else:
                model.config.save_pretrained(folder)
            if adapter is not None:
                adapter.save_pretrained(str(folder / ADAPTER))
            start.tokenizer.save_pretrained(folder)
            write_json(folder / MANIFEST, manifest)
            context.stand_ins[(Path(recipe.output_dir) / name).resolve()] = folder
            context.report.names[str(folder)] = f"{Path(recipe.output_dir) / name} (made by {context.name})"
        context.stand_ins[Path(recipe.output_dir).resolve()] = context.folder
        context.report.names[str(context.folder)] = f"{recipe.output_dir} (made by {context.name})"


def doubts_about(rows: Rows) -> list[str]:
    """A line if evaluation rows have duplicates among the training rows."""
    repeated = describe_duplicates(rows.report)
    return [repeated] if repeated else []


def _counts(rows: Rows) -> str:
    bad = "; ".join(f"{entry['count']} skipped: {reason}" for reason, entry in rows.report["bad_rows"].items())
    return f"{len(rows.train)} to train on, {len(rows.evaluation)} to evaluate on" + (f"; {bad}" if bad else "")


def frozen_model(name: str, auto: Any, config: PretrainedConfig, trust_remote_code: bool) -> Footprint:
    """A model that does not train, by its configuration."""
    model = skeleton(auto, config, trust_remote_code)
    return Footprint(name, count_parameters(model), 0)


def _output_state(recipe: StageRecipe) -> str:
    folder = Path(recipe.output_dir)
    if is_finished(recipe):
        return f"{folder} is finished; the stage would be skipped"
    mark = find_mark(folder)
    return f"{writable(folder)}, {'which would be resumed' if mark else 'new'}"


def _check_unfinished(recipe: StageRecipe, report: Mapping[str, Any] | None) -> None:
    """Check rows and records of a run that would be resumed; `is_finished` has compared the rest."""
    if report is None or (Path(recipe.output_dir) / MANIFEST).is_file():
        return
    check_rows(recipe, report)
    if found := complete_checkpoints(recipe.output_dir):
        check_records(recipe, found[-1])
