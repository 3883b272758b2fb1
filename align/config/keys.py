"""How a recipe key is declared: its default, its meaning, and the range of its value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from align.errors import UserError, first_of, nearest

Where = Callable[[str], str]  # from the name of a key to its place in words, with which an error begins


LARGEST = 10**9  # limit of numbers without a lower one of their own; larger ones run endlessly or overflow a float32


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a key accepts: in words, as errors print them, and as a test; and the largest."""

    words: str
    holds: Callable[[float], bool]
    largest: int = LARGEST


AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
AT_LEAST_0 = Range("at least 0", lambda value: value >= 0)
ABOVE_0 = Range("above 0", lambda value: value > 0)
SECONDS = Range("above 0", lambda value: value > 0, 7 * 24 * 3600)
ABOVE_1 = Range("above 1", lambda value: value > 1)
FROM_0_TO_1 = Range("from 0 to 1", lambda value: 0 <= value <= 1)
FROM_0_TO_BELOW_1 = Range("from 0 to below 1", lambda value: 0 <= value < 1)
ABOVE_0_BELOW_1 = Range("above 0 and below 1", lambda value: 0 < value < 1)
MINUS_1_OR_AT_LEAST_1 = Range("-1, or at least 1", lambda value: value == -1 or value >= 1)
SEED = Range("at least 0", lambda value: value >= 0, 2**32 - 1)  # what numpy takes, and so `transformers.set_seed`
BATCH = Range("at least 1", lambda value: value >= 1, 2**20)  # rows are repeated to fill the last batch
TOKENS = Range("at least 1", lambda value: value >= 1, 2**24)  # some memory is as large as the longest sequence may be
MAX_LENGTH = Range("at least 2, a prompt and a response token", lambda value: value >= 2, 2**24)
VOCABULARY = Range("at least 259, all bytes and three special tokens", lambda value: value >= 259, 2**24)
TIMES = Range("above 0", lambda value: value > 0, 1000)  # how often rows are held in memory
RESAMPLES = Range("at least 1", lambda value: value >= 1, 10**6)


SAME = object()


def key(default: Any, meaning: str, accepts: Range | None = None, *, before: Any = SAME) -> Any:
    """A recipe key: its default, the sentence that `--help` prints, and for a number its range.

    Args:
        before: the value that describes runs from before the key existed, whose records lack it, if not `default`; or a
            function that tells it by the keys in the record.
    """
    metadata = {"help": meaning, "range": accepts, "before": default if before is SAME else before}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def reward_timeout() -> Any:
    """The key `reward_timeout`, of the stages that call a user's functions."""
    meaning = "Seconds that a reward function or grader may take for one batch; a run in which it takes longer ends."
    return key(1800.0, meaning, SECONDS)


def score_reasoning() -> Any:
    """The key `score_reasoning`, of the stages that score responses."""
    meaning = (
        "Whether rewards and metrics read what a response holds up to `</think>` or the model's own mark; otherwise the "
        "answer alone, nothing if the reasoning has no end."
    )
    return key(False, meaning)


def required(meaning: str, type_name: str | None = None) -> Any:
    """A recipe key without a default; `type_name` is what `--help` prints where a key takes more than its annotation."""
    return field(metadata={"help": meaning, "required": True, "type_name": type_name})


def check_ranges(values: Any, where: Where) -> None:
    """Check the numbers of a dataclass made with `key`, those in lists too; None is always accepted.

    Raises:
        UserError: numbers out of their ranges.
    """
    if wrong := list(range_errors(values, {each.name: getattr(values, each.name) for each in fields(values)}, where)):
        raise first_of(wrong)


def range_errors(keys: Any, values: Mapping[str, Any], where: Where) -> Iterator[UserError]:
    """An error for each number out of its range.

    Args:
        keys: a dataclass made with `key`, or an instance.
        values: by the names of its keys, which may be some of them.
    """
    for each in fields(keys):
        accepts, value = each.metadata.get("range"), values.get(each.name)
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float):
                continue
            if accepts is not None and not accepts.holds(number):
                yield UserError(f"{where(each.name)}: expected a number {accepts.words}, got {number}")
                continue
            largest = accepts.largest if accepts is not None else LARGEST
            if abs(number) > largest:
                yield UserError(f"{where(each.name)}: expected a number of at most {largest:,}, got {number:,}")


def check_function_name(spec: str, where: str) -> None:
    """Check that text has the form `module:function`; the module is not imported.

    Raises:
        UserError: it has another form; begins with `where`.
    """
    module, _, function = spec.partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{where}: expected `module:function`, got {spec!r}")


def check_function_names(names: Sequence[str], where: str) -> None:
    """Check the `module:function`s of one key, which tell its rewards apart.

    Raises:
        UserError: as `check_function_name`, or one is written twice; begins with `where`.
    """
    for index, name in enumerate(names):
        check_function_name(name, f"{where}[{index}]")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: expected different functions, got {', '.join(names)}")


def check_best_metric(name: str, metrics: Iterable[str], place: str) -> None:
    """Check that evaluations have the metric `name` among `metrics`; `eval_` before it may be left out.

    Raises:
        UserError: they do not; begins with `place`.
    """
    known = [f"eval_{each.removeprefix('eval_')}" for each in metrics]
    if f"eval_{name.removeprefix('eval_')}" not in known:
        raise UserError(f"{place}: no metric {name}{nearest(name, known)}; this stage evaluates {', '.join(known)}.")
