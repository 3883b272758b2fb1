"""Verdicts on the measurements of a card: good, doubtful or bad, the reason, and which stage or data to go back to.

`LIMITS` has the limits and their sources; every card prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

DEGRADING_PROBES = (
    "repeated twice",
    "cut at half",
    "empty",
    "answer to another prompt",
)  # probes that a good reward dislikes
GOOD, DOUBTFUL, BAD = "good", "doubtful", "bad"
ORDER = (GOOD, DOUBTFUL, BAD)
MIN_PAIRS = 30  # with fewer pairs the intervals are too wide for a verdict
MAX_SEEN = 0.05  # share of the pairs that training may have seen for a doubtful card; with more it is bad
LOW_ACCURACY = 0.6
MAX_ECE = 0.1
PROBE_STD = 0.25
LOW_SPREAD_RATIO, FLAT_SPREAD_RATIO = 0.2, 0.05
LIMITS = (
    "Every interval is a 95% percentile interval over resampled prompts; a difference whose interval holds 0 is not "
    "distinguishable, and then doubtful.",
    f"held out: doubtful where the reward model was trained on some of the pairs, bad where on more than {MAX_SEEN:.0%} of them.",
    f"accuracy: bad where the interval holds .5 or less; doubtful below {LOW_ACCURACY}. People agree with one another on .63 "
    "(Anthropic's annotators with its researchers, arXiv 2204.05862) to .77 (summaries, arXiv 2009.01325).",
    "words alone, longer wins: baselines that a reward must beat. That length alone explains much of the gain of "
    "RLHF: arXiv 2310.03716.",
    f"calibration: good up to the ECE that {200} draws of labels from the model's own probabilities exceed once in 20; bad "
    f"where it stays above {MAX_ECE} after the temperature (temperature and ECE: arXiv 1706.04599).",
    "length: bad where the model is wrong more often than right on pairs whose shorter response is better, or no better than "
    "chance at equal length (length-controlled as in AlpacaEval 2, arXiv 2404.04475).",
    f"probes: a response made worse should lose score: bad where more than half gain. A stock phrase or markup should not "
    f"matter: doubtful where more than half gain, bad if by {PROBE_STD} standard deviations or more. The limits are ours.",
    f"spread: bad where the standard deviation within prompts is below {FLAT_SPREAD_RATIO} of that over all samples, or most prompts "
    f"are flat; doubtful below {LOW_SPREAD_RATIO}. That flat rewards slow PPO down is arXiv 2503.15477; the limits are ours.",
    "ratings: bad where the interval of Spearman's correlation holds 0 or less; doubtful where that of the pairs of one prompt in the "
    "rated order holds .5 or less.",
)
MORE_PAIRS = "the reward stage: more pairs, more epochs, or a larger or better pre-trained model"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the card.

    Attributes:
        line: what is judged.
        verdict: good, doubtful or bad.
        measured: the numbers.
        go_back_to: the stage or data to improve; empty if the verdict is good.
    """

    line: str
    verdict: str
    measured: str
    reason: str
    go_back_to: str = ""


def format_value(value: Mapping[str, Any] | None, sign: str = "") -> str:
    """A measurement as text, with its interval and n."""
    if value is None or value["value"] is None:
        return "-"
    text = f"{value['value']:{sign}.3f}"
    if value["low"] is not None:
        text += f" [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"
    return f"{text} (n {value['n']}" + (f", {value['prompts']} prompts)" if value["prompts"] != value["n"] else ")")


def judge(card: Mapping[str, Any]) -> list[dict[str, str]]:
    """The verdicts on a card's measurements, as dicts of `Verdict`, in the order of the card."""
    found: list[Verdict] = []
    if (seen := card.get("trained_on")) is not None:
        found.append(_held_out(seen))
    if metrics := card.get("metrics", {}):
        found.append(_accuracy(metrics["accuracy"]))
    if (ceiling := card.get("ceiling")) is not None:
        found.append(_ceiling(metrics["accuracy"], ceiling))
    for name, baseline in card.get("baselines", {}).items():
        found.append(_baseline(name, baseline))
    if "ece" in metrics:
        found.append(_calibration(metrics))
    if length := card.get("length"):
        found.append(_length(length))
    if slices := card.get("slices"):
        found.append(_slices(slices))
    found += [_probe(name, probe) for name, probe in card.get("probes", {}).items()]
    if spread := card.get("spread"):
        found.append(_spread(spread))
    if ratings := card.get("ratings"):
        found.append(_ratings(ratings))
    if agreement := card.get("agreement"):
        found.append(_agreement(agreement))
    return [asdict(each) for each in found]


def overall(verdicts: list[dict[str, str]]) -> str:
    """The worst verdict; doubtful if there is none."""
    return max((each["verdict"] for each in verdicts), key=ORDER.index, default=DOUBTFUL)


def summary(verdicts: list[dict[str, str]]) -> str:
    """One line with the lines that are bad and doubtful."""
    wrong = [f"{name}: {', '.join(v['line'] for v in verdicts if v['verdict'] == name)}" for name in (BAD, DOUBTFUL)
             if any(v["verdict"] == name for v in verdicts)]  # fmt: skip
    return "; ".join([overall(verdicts).upper() if not wrong else wrong[0], *wrong[1:]])


def _held_out(seen: Mapping[str, int]) -> Verdict:
    verdict = BAD if seen["count"] > MAX_SEEN * seen["pairs"] else DOUBTFUL
    measured = f"{seen['count']} of {seen['pairs']} pairs"
    reason = "the reward model was trained on them, and its accuracy on them says little of others"
    return Verdict("held out", verdict, measured, reason, "the data: judge on pairs that training does not see")


def _accuracy(accuracy: Mapping[str, Any]) -> Verdict:
    text = format_value(accuracy)
    if accuracy["n"] < MIN_PAIRS:
        few = f"{accuracy['n']} pairs are too few; {MIN_PAIRS} or more are needed"
        return Verdict("accuracy", DOUBTFUL, text, few, "the data: hold out more pairs")
    if accuracy["low"] is None:
        return Verdict("accuracy", DOUBTFUL, text, "all pairs have one prompt", "the data: hold out more prompts")
    if accuracy["low"] <= 0.5:
        reason = "worse than chance" if accuracy["high"] < 0.5 else "not distinguishable from chance"
        return Verdict("accuracy", BAD, text, reason, f"{MORE_PAIRS}; check that chosen is the better response")
    if accuracy["value"] < LOW_ACCURACY:
        return Verdict("accuracy", DOUBTFUL, text, f"above chance, below {LOW_ACCURACY}", MORE_PAIRS)
    return Verdict("accuracy", GOOD, text, "above chance")


def _ceiling(accuracy: Mapping[str, Any], ceiling: float) -> Verdict:
    text = f"{format_value(accuracy)}, ceiling {ceiling:.3f}"
    if accuracy["low"] is not None and accuracy["low"] > ceiling:
        reason = "it predicts the annotators better than the true reward does: they prefer something that the truth does not know"
        return Verdict(
            "accuracy and its ceiling",
            BAD,
            text,
            reason,
            "the pairs: what annotators like beside the truth, such as length",
        )
    return Verdict("accuracy and its ceiling", GOOD, text, "not above what the true reward itself reaches")


def _baseline(name: str, baseline: Mapping[str, Any]) -> Verdict:
    if baseline["difference"] is None:
        return Verdict(name, DOUBTFUL, "-", "there are no pairs to compare on")
    difference = baseline["difference"]
    text = f"{format_value(baseline['accuracy'])}; the reward less it {format_value(difference, '+')}"
    if difference["low"] > 0:
        return Verdict(name, GOOD, text, "the reward is better")
    if difference["high"] < 0:
        return Verdict(name, BAD, text, f"{name} is better than the reward", MORE_PAIRS)
    return Verdict(name, DOUBTFUL, text, f"the reward is not distinguishable from {name}", MORE_PAIRS)


def _calibration(metrics: Mapping[str, Any]) -> Verdict:
    error, after, t = metrics["ece"], metrics["ece_after_temperature"], metrics["temperature"]
    text = f"ECE {format_value(error)}, {after:.3f} after temperature {format_value(t)}"
    if error["value"] <= error["if_calibrated"]:
        return Verdict(
            "calibration", GOOD, text, f"not distinguishable from calibrated (ECE up to {error['if_calibrated']:.3f})"
        )
    problem = "too sure" if t["value"] > 1 else "less sure than it could be"
    if after > MAX_ECE:
        return Verdict("calibration", BAD, text, f"{problem}, and no temperature helps", f"{MORE_PAIRS}; fewer epochs")
    remedy = "the reward stage: fewer epochs or more pairs; or divide the scores by the temperature (PPO: `normalize_scores`)"
    return Verdict("calibration", DOUBTFUL, text, f"{problem}; the temperature corrects it", remedy)


def _length(length: Mapping[str, Any]) -> Verdict:
    longer, shorter = length["accuracy_longer_won"], length["accuracy_shorter_won"]
    controlled = length.get("length_controlled_accuracy")
    text = f"longer won {format_value(longer)}, shorter won {format_value(shorter)}, length-controlled {format_value(controlled)}"
    remedy = "the data: pairs whose shorter response is better; PPO: a penalty on length, or a judge that ignores it"
    if shorter["high"] is not None and shorter["high"] < 0.5:
        return Verdict("length", BAD, text, "wrong more often than right where the shorter response is better", remedy)
    if controlled and controlled["low"] is not None and controlled["low"] <= 0.5:
        return Verdict("length", BAD, text, "at equal length not distinguishable from chance", remedy)
    if None in (longer["low"], shorter["low"]):
        return Verdict("length", DOUBTFUL, text, "too few pairs of one kind", remedy)
    if longer["low"] > shorter["high"] or shorter["low"] > longer["high"]:
        return Verdict("length", DOUBTFUL, text, "its accuracy depends on which response is longer", remedy)
    return Verdict("length", GOOD, text, "no difference by which response is longer is distinguishable")


def _slices(slices: Mapping[str, Any]) -> Verdict:
    named = [(f"{column} {each['slice']}", each) for column, values in slices.items() for each in values]
    name, worst = min(named, key=lambda each: each[1]["accuracy"]["value"])
    text = f"lowest: {name} {format_value(worst['accuracy'])}"
    below = [n for n, each in named if each["accuracy"]["high"] is not None and each["accuracy"]["high"] < 0.5]
    behind = [
        n for n, each in named
        if None not in (each["less_the_rest"]["high"], each["accuracy"]["low"])
        and each["less_the_rest"]["high"] < 0 and each["accuracy"]["low"] <= 0.5
    ]  # fmt: skip
    if below:
        return Verdict("slices", BAD, text, f"worse than chance: {', '.join(below)}", "the data of these slices")
    if behind:
        reason = f"behind the rest, and not distinguishable from chance: {', '.join(behind)}"
        return Verdict("slices", DOUBTFUL, text, reason, "the data of these slices: more pairs, or check their labels")
    return Verdict("slices", GOOD, text, "no slice is distinguishable from chance and behind the rest at once")


def _probe(name: str, probe: Mapping[str, Any]) -> Verdict:
    rises, change = probe["rises"], probe["mean_change_in_std"]
    text = f"score rises for {format_value(rises)}, by {change:+.2f} std on average"
    low, high = (rises["value"] if rises[side] is None else rises[side] for side in ("low", "high"))
    line = f"probe: {name}"
    remedy = "the data: add pairs in which this response loses; PPO: watch for it, or a rule that takes points off"
    if name in DEGRADING_PROBES:
        if low > 0.5:
            return Verdict(line, BAD, text, "most responses gain by being made worse", remedy)
        if high >= 0.5:
            return Verdict(line, DOUBTFUL, text, "whether more gain than lose is not distinguishable", remedy)
        return Verdict(line, GOOD, text, "most responses lose or stay the same")
    if low > 0.5 and change >= PROBE_STD:
        return Verdict(line, BAD, text, "most responses gain much from added text without content", remedy)
    if low > 0.5:
        return Verdict(line, DOUBTFUL, text, "most responses gain a little from added text without content", remedy)
    return Verdict(line, GOOD, text, "no gain for most responses is distinguishable")


def _spread(spread: Mapping[str, Any]) -> Verdict:
    ratio, flat = spread["ratio"], spread["flat_prompts"]
    text = f"std within prompts {format_value(spread['within_prompts'])}, over all samples {spread['over_all_samples']:.3f}; flat prompts {format_value(flat)}"
    remedy = "the reward stage: pairs of responses of this policy; PPO: more samples a prompt, a higher temperature"
    if ratio is None:
        return Verdict("spread of scores", BAD, text, "all scores are equal, or there is one sample a prompt", remedy)
    if ratio < FLAT_SPREAD_RATIO or (flat["low"] is not None and flat["low"] > 0.5):
        return Verdict("spread of scores", BAD, text, "nearly constant among the responses to one prompt", remedy)
    if ratio < LOW_SPREAD_RATIO:
        return Verdict(
            "spread of scores", DOUBTFUL, text, "scores depend on the prompt far more than on the response", remedy
        )
    return Verdict("spread of scores", GOOD, text, f"{ratio:.2f} of the spread over all samples")


def _ratings(ratings: Mapping[str, Any]) -> Verdict:
    rank, pairs = ratings["spearman"], ratings["pair_accuracy"]
    text = f"Spearman {format_value(rank)}; pairs of a prompt in the rated order {format_value(pairs)}"
    if rank["low"] is None:
        reason = "all scores or all ratings are equal, or there is one prompt"
        return Verdict("ratings", DOUBTFUL, text, reason, "the data: ratings of responses to more prompts")
    if rank["high"] < 0 or (pairs["high"] is not None and pairs["high"] < 0.5):
        return Verdict("ratings", BAD, text, "it falls as the ratings rise", MORE_PAIRS)
    if rank["low"] <= 0:
        return Verdict("ratings", BAD, text, "not distinguishable from unrelated to the ratings", MORE_PAIRS)
    if pairs["low"] is not None and pairs["low"] <= 0.5:
        reason = "within prompts, which is what PPO climbs, not distinguishable from chance"
        return Verdict("ratings", DOUBTFUL, text, reason, MORE_PAIRS)
    return Verdict("ratings", GOOD, text, "it rises with the ratings")


def _agreement(agreement: Mapping[str, Any]) -> Verdict:
    difference = agreement["second"]["difference"]
    text = f"order alike {format_value(agreement['agree'])}; accuracy less the second's {format_value(difference, '+')}"
    if difference is not None and difference["high"] < 0:
        return Verdict(
            "second reward",
            BAD,
            text,
            "the second reward is better",
            "the second reward: take it, or both as an ensemble",
        )
    if difference is not None and difference["low"] > 0:
        return Verdict("second reward", GOOD, text, "this reward is better")
    return Verdict("second reward", GOOD, text, "not distinguishable in accuracy from the second")
