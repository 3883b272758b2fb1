"""Runs that cases are compared with and start from: undisturbed ones, and ones killed just before their last line."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaign.cases import Place
from tests.campaign.judge import changed, different, ended_badly, last_line
from tests.campaign.process import Ended, Stop, writes

OUT = "out"


class Layout(NamedTuple):
    """Processes, and the recipe keys that go with them."""

    ranks: int = 1
    keys: Mapping[str, Any] = {}


JUDGED = {
    "reward_model_path": ["scorer", "second_scorer"], "reward_ensemble": "uwo", "reward_variance_coef": 0.5,
    "judge_reward_model_path": "judge", "judge_reward_funcs": ["functions:grade"], "early_stopping_patience": 9,
}  # fmt: skip
# Several evaluations in a row are the best.
BETTER = {"eval_steps": 1, "learning_rate": 0.1, "kl_coef": 0.0, "kl_target": None, "seed": 11}
LAYOUTS = {
    "alone": Layout(),
    "better": Layout(1, BETTER),
    "better two": Layout(2, BETTER),
    "two": Layout(2),
    "judged": Layout(1, JUDGED),
    "judged two": Layout(2, JUDGED),
    "judged zero3": Layout(2, {**JUDGED, "deepspeed": "zero3.json"}),
    "balanced": Layout(1, {"balanced_sampling": True}),
    "weights": Layout(1, {"class_weights": "balanced"}),
    "pairs of pieces": Layout(1, {"next_sentence_prediction": True, "whole_word_mask": True}),
    "encoder-decoder": Layout(1, {"model_name_or_path": "pair"}),
    "bottleneck": Layout(1, {"method": "bottleneck", "bottleneck_size": 2}),
    "prefix": Layout(1, {"method": "prefix", "prefix_projection": True, "num_virtual_tokens": 2}),
    "momentum": Layout(
        1,
        {
            "optim": "sgd",
            "optim_args": {"momentum": 0.9},
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        },
    ),
    "members": Layout(1, {"ensemble_size": 2}),
    "halves": Layout(1, {"train_judge": True}),
    "members zero2": Layout(2, {"ensemble_size": 2, "deepspeed": "zero2.json"}),
    "zero0": Layout(2, {"deepspeed": "zero0.json"}),
    "zero2": Layout(2, {"deepspeed": "zero2.json"}),
    "zero3": Layout(2, {"deepspeed": "zero3.json"}),
}


class Run(NamedTuple):
    """A finished or killed run: its folder, and each rank's writes in order."""

    folder: Path
    writes: list[list[str]]

    @property
    def out(self) -> Path:
        return self.folder / OUT


def start(place: Place, stage: str, layout: str = "alone", **settings: Any) -> Ended:
    """The stage in a layout, in the case's folder, whose recipe has the keys of the layout."""
    return place.run(stage, f"{stage}.yaml", ranks=LAYOUTS[layout].ranks, **settings)


def prepare(place: Place, stage: str, layout: str = "alone", keys: Mapping[str, Any] = {}) -> None:
    place.recipe(stage, {**LAYOUTS[layout].keys, **keys})


def whole(place: Place, stage: str, layout: str = "alone") -> Run:
    """The undisturbed run, made once in a campaign."""
    return _made_once(place, f"whole-{stage}-{layout}", stage, layout, None)


def unfinished(place: Place, stage: str, layout: str = "alone") -> Run:
    """The same run, killed before it wrote its manifest, with all its checkpoints."""
    last = dict.fromkeys(("evaluate", "bon", "judge-reward"), "results.json").get(stage, "stage.json")
    return _made_once(place, f"unfinished-{stage}-{layout}", stage, layout, Stop(last))  # at several ranks numbers vary


def _made_once(place: Place, name: str, stage: str, layout: str, stop: Stop | None) -> Run:
    root = place.template.parent / "runs" / name
    ranks = LAYOUTS[layout].ranks
    if not (root / "made").exists():
        other = Place(root, place.template, name)
        prepare(other, stage, layout)
        ended = start(other, stage, layout, stop=stop)
        assert ended.code == (0 if stop is None else -stop.signum), f"{name}: {ended}"
        (root / "made").touch()
    return Run(root / "work", [writes(root / "log", rank) for rank in range(ranks)])


def resumes(
    place: Place, stage: str, layout: str = "alone", says: Sequence[str] = (), may_refuse: bool = True
) -> list[str]:
    """Problems of the same command given again: it has to end as the undisturbed run, or to say what is wrong.

    Args:
        says: words of which an error has to have one.
    """
    before = place.snapshot()
    ended = start(place, stage, layout)
    problems = ended_badly(ended) + changed(before, place.snapshot(), [OUT])
    if ended.code == 0:
        return problems + different(place.folder / OUT, whole(place, stage, layout).out)
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    if ended.code != 2 or not errors:
        return [*problems, f"exit code: {ended.code}, {last_line(ended.err)}"] if None not in ended.codes else problems
    if not may_refuse:
        problems.append(f"no resume: {errors[0][:300]}")
    elif says and not any(word in errors[0] for word in says):
        problems.append(f"unnamed: none of {', '.join(says)} in: {errors[0][:300]}")
    return problems


def take(place: Place, run: Run) -> Path:
    """Put a run's output folder into the case's."""
    shutil.rmtree(place.folder / OUT, ignore_errors=True)
    shutil.copytree(run.out, place.folder / OUT, symlinks=True)
    return place.folder / OUT
