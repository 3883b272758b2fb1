"""Faults of judges and of the stages that measure (`evaluate`, `bon`, `judge-reward`), and of several reward models in one folder."""

# fmt: off
from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.campaign.cases import MISSING, Case, Place
from tests.campaign.damage import Harm, one_weight, replace
from tests.campaign.faults import ONE_RANK, Check, ends, full, removed, two_at_once
from tests.campaign.judge import different, ended_badly, refused
from tests.campaign.runs import OUT, prepare, start, take, unfinished

# Where a user's function scores: the stage, the keys of its recipe without the function, and the key that names it.
PLACES: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "judge of ppo": ("ppo", {}, "judge_reward_funcs"),
    "true reward of ppo": ("ppo", {}, "eval_reward_funcs"),
    "judged reward": ("judge-reward", {"reward_model_path": MISSING, "second_reward_funcs": [], "per_device_eval_batch_size": 2}, "reward_funcs"),
    "second reward": ("judge-reward", {"per_device_eval_batch_size": 2}, "second_reward_funcs"),
    "reward of best-of-n": ("bon", {}, "reward_funcs"),
    "judge of best-of-n": ("bon", {}, "judge_reward_funcs"),
}
WRONG = {"raises": ("raises", "stumbled"), **{name: (name,) for name in ("exits", "too_few", "nan", "text", "nothing", "huge", "shouts")}}


def function(place: str, name: str, *says: str, **settings: Any) -> Check:
    stage, keys, key = PLACES[place]
    return ends(stage, says or (f"functions:{name}",), {**keys, key: [f"functions:{name}"], "reward_timeout": 2}, **settings)


def empties(place: str) -> Check:
    """A function that empties the lists it is given: an error, or the results of one that does not."""
    stage, keys, key = PLACES[place]

    def check(case: Place) -> list[str]:
        source, outputs = case.folder / "functions.py", []
        for emptied in (False, True):  # under one name, which results and metrics show
            if emptied:
                source.write_text(source.read_text().replace("def constant(", "def plain(").replace("def empties(", "def constant("))
            prepare(case, stage, keys={**keys, key: ["functions:constant"]})
            if (ended := start(case, stage)).code != 0:
                return refused(ended, ("constant",)) if emptied else ["campaign broken: the sound function was refused"]
            outputs.append(case.root / f"out-{emptied}")
            shutil.move(case.folder / OUT, outputs[-1])
        return ended_badly(ended) + different(outputs[1], outputs[0])
    return check


def begun_anew(stage: str, change: Callable[[Place], object]) -> Check:
    """A killed measurement that has kept nothing is started again with another recipe or input: its results have nothing of the old one."""
    def check(place: Place) -> list[str]:
        prepare(place, stage)
        out = take(place, unfinished(place, stage))
        change(place)
        outputs = place.root / "again", place.root / "new"
        for output in outputs:
            if (ended := start(place, stage)).code != 0:
                return refused(ended, ("out",))
            shutil.move(out, output)
        return ended_badly(ended) + different(*outputs)
    return check


def file(path: str, harm: Harm) -> Callable[[Place], object]:
    return lambda place: harm(place.folder / path, place.random)


ANEW: dict[str, tuple[str, Callable[[Place], object]]] = {
    "a pair": ("judge-reward", file("data/pairs_eval.jsonl", replace(b'"uv"', b'"uw"'))),
    "a weight of the reward": ("judge-reward", file("scorer/model.safetensors", one_weight)),
    "a function": ("judge-reward", file("functions.py", replace(b'count("a")', b'count("b")'))),
    "a seed": ("judge-reward", lambda place: prepare(place, "judge-reward", keys={"seed": 5})),
}


def cases() -> Iterator[Case]:
    for place in PLACES:
        yield from (Case("judges", f"{place}: {name}", function(place, name, *says)) for name, says in WRONG.items())
        yield Case("judges", f"{place}: hangs", function(place, "hangs"))
        yield Case("judges", f"{place}: empties its inputs", empties(place))
        yield Case("judges", f"{place}: raises on rank 1 alone", function(place, "raises_on_rank_1", "stumbled on rank 1", **ONE_RANK))
        yield Case("judges", f"{place}: hangs on rank 1 alone", function(place, "hangs_on_rank_1", **ONE_RANK))
    yield from (Case("altered inputs", f"{stage}: {name}", begun_anew(stage, change)) for name, (stage, change) in ANEW.items())
    for stage in ("bon", "judge-reward"):
        yield from (Case("machine", f"no space left: {stage}, {number}", full(stage, errno.ENOSPC, "No space", "space")) for number in (1, 2))
        yield Case("machine", f"the output is removed: {stage}", removed(stage))
        yield Case("folders", f"two runs at once: {stage}", two_at_once(stage))
        yield Case("folders", f"two runs at once, the first dies: {stage}", two_at_once(stage, killed=True))
