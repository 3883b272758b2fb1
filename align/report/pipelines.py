"""The pipelines of a report, and their stages side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.report.curves import LabelledRun
from align.report.read import Run, read_run, with_members

MODELS = (
    *("model_name_or_path", "sft_model_path", "reward_model_path", "judge_reward_model_path"),
    *("second_reward_model_path", "value_model_path", "policy_path", "models"),
)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Runs of consecutive stages, in their order, with a label that is unique in the report."""

    label: str
    runs: list[Run]


@dataclass(frozen=True, slots=True)
class Group:
    """The runs of one stage in all pipelines, which share charts. `key` is an HTML id."""

    key: str
    title: str
    stage: str
    runs: list[LabelledRun]


def read_pipelines(folders: Sequence[Sequence[Path]]) -> list[Pipeline]:
    """The runs in the output folders of each pipeline.

    Raises:
        UserError: a record is damaged.
    """
    read = [_in_order([read_run(folder) for folder in with_members(each)]) for each in folders]
    return [Pipeline(label, runs) for label, runs in zip(_labels(read), read, strict=True)]


def _in_order(runs: Sequence[Run]) -> list[Run]:
    """Runs sorted so that each follows the runs whose output folders its recipe names; otherwise in the given order."""
    by_name = {run.name: run for run in runs}
    found: dict[str, Run] = {}

    def add(run: Run, waiting: tuple[str, ...] = ()) -> None:
        if run.name in (*found, *waiting):
            return
        for path in input_model_paths(run.recipe):
            for part in Path(path).parts:
                if part in by_name:
                    add(by_name[part], (*waiting, run.name))
        found[run.name] = run

    for run in runs:
        add(run)
    return list(found.values()) if len(found) == len(runs) else list(runs)


def input_model_paths(recipe: Mapping[str, Any]) -> list[str]:
    """The paths of the models that a recipe names."""
    found: list[str] = []
    for name in MODELS:
        if value := recipe.get(name):
            values = value if isinstance(value, list) else [value]
            found += [str(each[-1]) if isinstance(each, list) and each else str(each) for each in values]
    return found


def _labels(pipelines: Sequence[Sequence[Run]]) -> list[str]:
    """Labels of the pipelines: the parts of their paths in which they differ."""
    paths = [(runs[0].folder if len(runs) == 1 else runs[0].folder.parent).resolve().parts for runs in pipelines]
    if len(paths) == 1:
        return [paths[0][-1]]
    common = 0
    while all(len(path) > common + 1 for path in paths) and len({path[common] for path in paths}) == 1:
        common += 1
    tail = 0
    while all(len(path) > common + tail + 1 for path in paths) and len({path[-1 - tail] for path in paths}) == 1:
        tail += 1
    names = ["/".join(path[common : len(path) - tail]) for path in paths]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def group_stages(pipelines: Sequence[Pipeline]) -> list[Group]:
    """Group the runs of all pipelines by stage if no pipeline has a stage twice, otherwise by stage and folder name.

    Groups are in the order of the longest pipeline.
    """
    single = all(len({run.stage for run in each.runs}) == len(each.runs) for each in pipelines)
    found: dict[tuple[str, str], list[LabelledRun]] = {}
    for pipeline in sorted(pipelines, key=lambda each: -len(each.runs)):
        for run in pipeline.runs:
            key = (run.stage, "" if single else run.name)
            found.setdefault(key, []).append(LabelledRun(pipeline.label, run, pipelines.index(pipeline)))
    groups = []
    for number, ((stage, _), runs) in enumerate(found.items()):
        runs.sort(key=lambda each: each.colour)
        names = list(dict.fromkeys(each.run.name for each in runs))
        title = names[0] if len(names) == 1 else stage
        groups.append(Group(f"stage-{number}", title, stage, runs))
    return groups
