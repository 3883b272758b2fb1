"""The overview of a report: runs, closing numbers, versions, and recipes to repeat the runs."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from align.config.stages import STAGES
from align.report.costs import format_duration, wall_seconds
from align.report.figures import PageTable
from align.report.pipelines import Group, Pipeline, input_model_paths
from align.report.read import Run
from align.runs.tables import cell


@dataclass(frozen=True, slots=True)
class RecipeSection:
    """How to run a stage again: the command, the non-default keys as YAML, all keys as YAML, and input fingerprints."""

    title: str
    command: str
    changed: str
    everything: str
    fingerprints: PageTable


def stages_table(pipelines: Sequence[Pipeline]) -> PageTable:
    """A row for each run: stage, state, starting models, rows, seed, duration."""
    rows = []
    for each in pipelines:
        for run in each.runs:
            data = run.record.get("data", {})
            seconds = wall_seconds(run)
            rows.append([
                display_name(each, run, len(pipelines) > 1),
                run.stage,
                describe_state(run),
                _models(run.recipe),
                _sources(data),
                cell(run.recipe.get("seed")),
                format_duration(seconds) if seconds is not None else "",
            ])  # fmt: skip
    return PageTable(
        "Runs in their order", ["run", "stage", "state", "starts from", "rows", "seed", "first to last metrics"], rows
    )


def display_name(pipeline: Pipeline, run: Run, several: bool) -> str:
    """A run's name, with its pipeline's if there are several."""
    if not several:
        return run.name
    return pipeline.label if pipeline.label.endswith(run.name) else f"{pipeline.label}: {run.name}"


def describe_state(run: Run) -> str:
    """ "finished", or the step that an unfinished run has reached."""
    if run.finished:
        return "finished"
    done = run.lines[-1]["step"] if run.lines else 0
    of = f" of {run.steps_planned}" if run.steps_planned else ""
    return f"unfinished, at step {done}{of}"


@dataclass(frozen=True, slots=True)
class Headline:
    """One of the main results, shown at the top."""

    name: str
    value: str
    before: str
    about: str


# By stage: prefix of a measure in its closing table, and the title shown for it.
HEADLINES = {
    "sft": (("held-out loss", "held-out loss of {run}"),),
    "reward": (("held-out pair accuracy", "reward model's accuracy"),),
    "ppo": (
        ("judge", "judge's reward"),
        ("true reward", "true reward"),
        ("score", "score, which was trained on"),
        ("win rate by score", "win rate against SFT by score"),
        ("KL from SFT", "KL from SFT"),
    ),
    "classify": (("accuracy", "accuracy"), ("macro F1", "macro F1")),
    "token-classification": (("held-out F1", "F1 of entities"),),
    "question-answering": (("held-out exact match", "exact match"), ("held-out F1", "F1 of words")),
    "mlm": (("held-out loss", "held-out loss"),),
}


def headline(pipeline: Pipeline) -> list[Headline]:
    """The main results of a pipeline, from the closing tables of its stages; of a stage that it has several times, with the run's name."""
    found = []
    stages = [run.stage for run in pipeline.runs]
    for run in pipeline.runs:
        for begin, name in HEADLINES.get(run.stage, ()):
            for measure, before, after in run.table:
                if measure.startswith(begin) and after is not None:
                    was = f"{before:.3g}" if before is not None else ""
                    whose = f"{run.name}: " * (stages.count(run.stage) > 1 and "{run}" not in name)
                    label = whose + name.format(run=run.name)
                    found.append(Headline(label, f"{after:.3g}", was, f"{run.name}: {measure}"))
                    break
    return found


def _models(recipe: Mapping[str, Any]) -> str:
    found = input_model_paths(recipe)
    if not found and recipe.get("model_config"):
        found = ["from scratch"]
    return ", ".join(dict.fromkeys(found[:8]))


def _sources(data: Any) -> str:
    if not isinstance(data, dict) or not isinstance(data.get("sources"), list):
        return ""
    rows = [
        f"{each['rows']:,} {each['source']}{' (held out)' if each.get('used_for') == 'evaluation' else ''}"
        for each in data["sources"]
        if isinstance(each, dict) and isinstance(each.get("rows"), int) and isinstance(each.get("source"), str)
    ]
    return "; ".join(rows[:12])


def before_after(groups: Sequence[Group]) -> PageTable | None:
    """The closing tables of all stages in one table, with a pair of columns for each pipeline; None without any."""
    labels = list(dict.fromkeys(each.label for group in groups for each in group.runs))
    rows = []
    for group in groups:
        tables = {each.label: each.run.table for each in group.runs}
        for measure in dict.fromkeys(row[0] for table in tables.values() for row in table):
            cells: list[object] = [f"{group.title}: {measure}"]
            for label in labels:
                found = next((row for row in tables.get(label, []) if row[0] == measure), None)
                before, after = found[1:] if found else (None, None)
                cells += [cell(before), cell(after), *([_change(before, after)] if len(labels) == 1 else [])]
            rows.append(cells)
    if not rows:
        return None
    columns = ["before", "after", "change"]
    if len(labels) > 1:
        columns = [f"{label}: {name}" for label in labels for name in ("before", "after")]
    return PageTable("Closing numbers of the stages", ["measure", *columns], rows)


def _change(before: Any, after: Any) -> str:
    if before is None or after is None:
        return ""
    return f"{after - before:+.4g}".replace("-", "−")


def versions_table(pipelines: Sequence[Pipeline]) -> PageTable | None:
    """Versions of the packages, by run if they differ; None if unknown."""
    runs = [
        (each.label, run) for each in pipelines for run in each.runs if isinstance(run.record.get("versions"), dict)
    ]
    names = list(dict.fromkeys(name for _, run in runs for name in run.record["versions"]))
    rows = []
    for name in names[:30]:
        by_version: dict[str, list[str]] = {}
        for label, run in runs:
            by_version.setdefault(run.record["versions"].get(name, "unknown"), []).append(f"{label}/{run.name}")
        only = len(by_version) == 1
        rows.append(
            [name, *by_version] if only else [name, "; ".join(f"{v} ({', '.join(w)})" for v, w in by_version.items())]
        )
    return PageTable("Versions of the packages", ["package", "version"], rows) if rows else None


def recipe_of(pipeline: Pipeline, run: Run, several: bool) -> RecipeSection:
    """The recipe of a run, and how to run it again."""
    stage = STAGES.get(run.stage)
    recipe = {"stage": run.stage, **run.recipe}
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(stage.recipe) if stage else ():
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    plain = json.loads(json.dumps(defaults, default=str))
    changed = {
        key: _source_without_defaults(value)
        for key, value in recipe.items()
        if key == "stage" or plain.get(key, ...) != value
    }
    title = display_name(pipeline, run, several)
    return RecipeSection(
        title,
        f"align {shlex.quote(run.stage)} {run.stage}.yaml",
        _yaml(changed),
        _yaml(recipe),
        PageTable("SHA-256 of what the run began with", ["input", "fingerprint"], _fingerprints(run)),
    )


def _source_without_defaults(value: Any) -> Any:
    """Data sources without the keys that have their default value; other values unchanged."""
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        kept = [
            {k: v for k, v in each.items() if v not in (None, {}, []) and (k, v) not in SOURCE_DEFAULTS}
            for each in value
        ]
        return kept[0] if len(kept) == 1 else kept
    return value


SOURCE_DEFAULTS = (("split", "train"), ("label_column", "label"), ("weight", 1.0))  # of a data source


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100))


def _fingerprints(run: Run) -> list[list[object]]:
    rows: list[list[object]] = []
    for place, kinds in run.record.get("inputs", {}).items():
        if isinstance(kinds, str):
            rows.append([place, kinds])
            continue
        for kind, value in kinds.items():
            if isinstance(value, str):
                rows.append([f"{place} ({kind})", value])
            else:
                rows += [[f"{place}: {name}", each] for name, each in value.items()]
    return rows[:60]
