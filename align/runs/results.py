"""The typed results of the stages, from `results` in `stage.json` or from `results.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from align.config.ensemble import JUDGE, MEMBER
from align.errors import UserError
from align.runs.files import finite

T = TypeVar("T", bound="StageResult")


class BeforeAfter(NamedTuple):
    """One row of a stage's closing table; None where a measure does not apply."""

    measure: str
    before: float | None
    after: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of a stage that trains."""

    output_dir: str  # the trained model, as `from_pretrained` loads it
    table: list[BeforeAfter]  # empty when nothing was evaluated
    metrics: dict[str, float]  # all other numbers by their names in `stage.json`, without undefined ones

    @classmethod
    def from_json(cls: type[T], output_dir: str, results: Mapping[str, Any]) -> T:
        """The result of a stage from `results` in its manifest.

        Raises:
            UserError: one of the numbers is missing.
        """
        needed = [each.name for each in dataclasses.fields(cls) if each.default is each.default_factory]
        if missing := [name for name in needed if name not in results and name not in ("output_dir", "metrics")]:
            raise UserError(
                f"{output_dir}/stage.json: results: `{missing[0]}` is missing; restore the file from a copy, or delete the "
                "folder to run the stage again."
            )
        results = finite(results)  # as the manifest holds them
        names = {field.name for field in dataclasses.fields(cls)}
        own = {name: value for name, value in results.items() if name in names}
        metrics = {name: value for name, value in results.items() if name not in names and value is not None}
        table = [BeforeAfter(*row) for row in results["table"]]
        return cls(**{**own, "output_dir": output_dir, "table": table, "metrics": metrics})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTResult(StageResult):
    """`metrics`: `eval_loss` (nats per token) and others, with the suffix `_before` those of the untrained model."""

    steps: int  # optimizer steps
    trained_parameters: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardResult(StageResult):
    """`metrics`: `eval_accuracy` on the held-out pairs, its 95% interval, `eval_loss` (nats per pair), and others."""

    steps: int  # optimizer steps
    card: dict[str, Any] | None = (
        None  # of its report card on the held-out pairs: verdict, summary, and verdicts by line
    )
    # Of the held-out pairs: accuracy, low, high and n of each, where there are several.
    by_source: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    members: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # results of each, with `ensemble_size`
    judge: dict[str, Any] | None = None  # results of the judge, with `train_judge`


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOResult(StageResult):
    """`metrics`: the last evaluation, by the names in `metrics.jsonl`, such as `eval/score` and `eval/kl`."""

    updates: int
    best: dict[str, float] | None  # evaluation of the policy in `best/`, and its `update`, 0 for the SFT model
    verdict: list[str] = dataclasses.field(
        default_factory=list
    )  # is it better than the SFT model? a line for each measure
    fit: dict[str, Any] | None = None  # of the gain by the root of the KL (arXiv 2210.10760): a, b, peak_kl, peak_gain
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # some held-out prompts with responses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyResult(StageResult):
    """`metrics`: `eval_loss`, `eval_accuracy`, `eval_macro_f1` or `eval_mse`, and those `_before` training."""

    steps: int  # optimizer steps
    baseline: dict[str, float] | None = None  # measures of the constant answer: the commonest label, or the mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassificationResult(StageResult):
    """`metrics`: `eval_loss`, `eval_f1` of entities with its 95% interval, `eval_precision`, `eval_recall`, and those `_before`."""

    steps: int  # optimizer steps
    baseline: dict[str, float] | None = None  # measures of giving each word its commonest tag


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnsweringResult(StageResult):
    """`metrics`: `eval_loss`, `eval_exact_match`, `eval_f1` of words, their 95% intervals, and those `_before` training."""

    steps: int  # optimizer steps
    baseline: dict[str, float] | None = None  # measures of a rule without a model


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLMResult(StageResult):
    """`metrics`: `eval_loss` (nats per masked token), `eval_accuracy`, and those `_before` training."""

    steps: int  # optimizer steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One metric of one model; `low` and `high` are its 95% interval, None where there is none."""

    model: str
    num_shots: int
    task: str | None  # None: over all rows
    n: int  # rows
    metric: str
    value: float | None
    low: float | None
    high: float | None
    template: str | None = None  # its name, where the recipe has `templates`


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingCosts:
    """What a model with a number of examples costs; None where the stage that made the model has not recorded it."""

    model: str
    num_shots: int
    trained_parameters: int | None
    training_seconds: float | None
    train_tokens: int | None  # over all epochs, prompts included
    prompt_tokens: float  # mean over the rows, with examples and virtual tokens
    template: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """A metric's difference from that of another setting on the same rows, with its 95% interval."""

    metric: str
    model: str
    num_shots: int
    against: dict[str, Any]  # `model`, `num_shots` and `template` of the other
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    template: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """The result of `align evaluate`; `results.json` and `results.md` are in `output_dir`."""

    output_dir: str
    baseline: str  # the model that the others are compared with
    rows: int
    values: list[MetricValue]
    comparisons: list[MetricDifference]
    data: dict[str, Any]  # sources with fingerprints, counts, bad rows
    costs: list[SettingCosts] = dataclasses.field(default_factory=list)  # earlier versions have none

    @classmethod
    def from_json(cls, output_dir: str, results: Mapping[str, Any]) -> EvaluationResult:
        """The result of an evaluation from its `results.json`."""
        results = finite(results)
        return cls(
            output_dir=output_dir,
            baseline=results["baseline"],
            rows=results["rows"],
            values=[MetricValue(**value) for value in results["results"]],
            comparisons=[MetricDifference(**difference) for difference in results["comparisons"]],
            data=results["data"],
            costs=[SettingCosts(**costs) for costs in results.get("costs", [])],
        )

    def value(
        self, metric: str, model: str, num_shots: int = 0, task: str | None = None, template: str | None = None
    ) -> float | None:
        """One number.

        Raises:
            UserError: it was not measured; says what was.
        """
        for each in self.values:
            own = (each.metric, each.model, each.num_shots, each.task, each.template)
            if own == (metric, model, num_shots, task, template):
                return each.value
        asked = {"metric": metric, "model": model, "num_shots": num_shots, "task": task, "template": template}
        requested = [f"{name} {value!r}" for name, value in asked.items() if value is not None]
        known = {name: list(dict.fromkeys(getattr(each, name) for each in self.values)) for name in asked}
        available = [f"{name} {', '.join(map(repr, values))}" for name, values in known.items() if values != [None]]
        raise UserError(f"{self.output_dir}: no value of {', '.join(requested)}; there are {'; '.join(available)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeResult:
    """The result of `align judge-reward`; `results.json` and `card.md` are in `output_dir`."""

    output_dir: str
    verdict: str  # the worst of the lines: good, doubtful or bad
    summary: str  # the lines that are not good
    card: dict[str, Any]  # everything measured, and under `verdicts` the lines

    @classmethod
    def from_json(cls, output_dir: str, results: Mapping[str, Any]) -> JudgeResult:
        """The result from its `results.json`."""
        results = finite(results)
        return cls(output_dir=output_dir, **{name: results[name] for name in ("verdict", "summary", "card")})


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfNResult:
    """The result of `align bon`; `results.json`, `results.md` and the data sets are in `output_dir`."""

    output_dir: str
    prompts: int
    num_generations: int
    frontier: list[dict[str, Any]]  # for n = 1, 2, ...: estimates with 95% intervals (`_low`, `_high`) and prompts
    datasets: dict[str, int]  # rows by file
    data: dict[str, Any]  # sources with fingerprints, counts, bad rows

    @classmethod
    def from_json(cls, output_dir: str, results: Mapping[str, Any]) -> BestOfNResult:
        """The result from its `results.json`."""
        results = finite(results)
        names = [each.name for each in dataclasses.fields(cls) if each.name != "output_dir"]
        return cls(output_dir=output_dir, **{name: results[name] for name in names})


def report_cards(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The report cards in the results of a reward stage, those of its members and judge among them, by file."""
    members = results.get("members")
    found = {"": results, f"{JUDGE}/": results.get("judge")}
    found |= {f"{MEMBER}{n}/": each for n, each in enumerate(members if isinstance(members, list) else [], start=1)}
    return {
        f"{at}card/card.md": each["card"]
        for at, each in found.items()
        if isinstance(each, Mapping) and isinstance(each.get("card"), Mapping)
    }
