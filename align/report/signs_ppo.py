"""Faults in the optimization of a PPO run. The limits follow the healthy ranges of metrics.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import chain

from align.report.findings import (
    MIN_UPDATES,
    Finding,
    describe_updates,
    end_values,
    late_median,
    metric_values,
    quarter_means,
    reaches,
)
from align.report.read import Run
from align.runs.records import is_number

MAX_KL = 50.0  # nats per response; in longer responses, 1 nat per token
MIN_APPROX_KL = 1e-5  # policy/approx_kl of a policy that trains
MAX_APPROX_KL = 0.05
MAX_UPDATE_KL = 1.0  # policy/approx_kl of a single update
MAX_CLIPFRAC = 0.3
MIN_EXPLAINED_VARIANCE = 0.05
WORSE_THAN_CONSTANT = -0.5  # explained variance
STRONG_KL_PENALTY = 0.5  # penalty for one nat, in standard deviations of the score


def ppo_signs(run: Run) -> Iterator[Finding]:
    """Faults of a run, in no order."""
    yield from chain(_scores(run), _divergence(run), _clipping(run), _value_model(run), _engine(run))


def normalized(run: Run) -> bool:
    """Whether scores were divided by their standard deviation, as those of reward models are by default."""
    chosen = run.recipe.get("normalize_scores", False)
    return bool(run.recipe.get("reward_model_path")) if chosen is None else bool(chosen)


def _noise(run: Run) -> float:
    """The standard error of the difference between the first and the last quarter of `objective/score`."""
    batch, spread = (
        run.recipe.get("rollout_batch_size"),
        statistics.fmean(metric_values(run, "objective/score_std") or [0.0]),
    )
    size = len(end_values(run.series("objective/score"), 0))
    return spread * math.sqrt(2 / (size * batch)) if is_number(batch) and batch else spread


def _scores(run: Run) -> Iterator[Finding]:
    score, spreads = quarter_means(run, "objective/score"), metric_values(run, "objective/score_std")
    if score is None or not spreads:
        return
    first, last = score
    if statistics.median(spreads) <= 1e-6 * max(1.0, abs(first)):
        yield Finding(
            "severe", "flat scores", "all responses score alike",
            f"objective/score_std has a median of {statistics.median(spreads):.2g} and objective/score is {last:.4g} "
            f"({describe_updates(run)}): there is no signal to learn from.",
            "Check the reward and what it is given: `align judge-reward`, and `samples.jsonl` for the responses.",
        )  # fmt: skip
        return
    evidence = f"objective/score was {first:.4g} in the first quarter and {last:.4g} in the last, standard error of the difference "
    evidence += f"{_noise(run):.2g} ({describe_updates(run)})."
    enough = reaches(run.series("objective/score"), MIN_UPDATES)
    moved, kl = late_median(run, "policy/approx_kl"), late_median(run, "objective/kl")
    if enough and moved is not None and moved < MIN_APPROX_KL and kl is not None and abs(kl) < 0.05:
        rate = max(metric_values(run, "policy/learning_rate"), default=0.0)
        yield Finding(
            "warning", "learning rate too low", "the policy does not change",
            f"policy/approx_kl has a median of {moved:.2g} in the second half, objective/kl of {kl:.2g} nats; the highest "
            f"learning rate is {rate:.2g}. {evidence}",
            "Raise `learning_rate` by ten, or train with more `num_ppo_epochs`; see that `method` trains what it should.",
        )  # fmt: skip
    elif last - first < -3 * _noise(run):
        yield Finding(
            "severe", "falling scores", "the score falls", evidence,
            "Lower `learning_rate`; if objective/kl is small, lower `kl_coef`, which pulls back to the SFT model.",
        )  # fmt: skip
    elif len(run.series("objective/score")) >= MIN_UPDATES and last - first < 2 * _noise(run):
        penalty, spread = max(metric_values(run, "objective/kl_coef"), default=0.0), statistics.median(spreads)
        unit = 1.0 if normalized(run) else spread  # of kl_coef, per nat
        strong = penalty > STRONG_KL_PENALTY * unit
        more = f" kl_coef is {penalty:.3g} per nat, where the scores' spread is {unit:.3g}." if strong else ""
        yield Finding(
            "warning", "flat scores", "the score does not rise", evidence + more,
            "Lower `kl_coef`, or set `normalize_scores` or `kl_target`, which do not depend on the reward's scale."
            if strong
            else "Raise `learning_rate`, lower `kl_coef`, and judge the reward (`align judge-reward`): its scores may not vary "
            "among the responses to one prompt.",
        )  # fmt: skip
    objective = quarter_means(run, "objective/reward")
    if objective is not None and enough and objective[1] < objective[0] - 3 * _noise(run) and last >= first:
        yield Finding(
            "warning", "objective fell", "the KL penalty costs more than the score gains",
            f"objective/reward was {objective[0]:.4g} in the first quarter and {objective[1]:.4g} in the last ({describe_updates(run)}).",
            "Lower `learning_rate`, or lower `kl_coef` if the distance is wanted.",
        )  # fmt: skip


def _divergence(run: Run) -> Iterator[Finding]:
    points = run.series("objective/kl")
    if not points:
        return
    length = statistics.fmean(metric_values(run, "response/length") or [0.0])
    target = run.recipe.get("kl_target")
    bound = max(MAX_KL, length, 2 * float(target) if is_number(target) else 0.0)  # type: ignore[arg-type]
    above = [(step, value) for step, value in points if value > bound]
    moved = late_median(run, "policy/approx_kl")
    if above:
        worst = max(above, key=lambda each: each[1])
        yield Finding(
            "severe", "KL explosion", "the policy has left the SFT model",
            f"objective/kl is above {bound:.3g} nats per response from update {above[0][0]:.0f}, {worst[1]:.4g} at most (update "
            f"{worst[0]:.0f}); kl_coef {metric_values(run, 'objective/kl_coef')[-1]:.3g}."
            if metric_values(run, "objective/kl_coef")
            else f"objective/kl is above {bound:.3g} nats per response from update {above[0][0]:.0f}.",
            "Raise `kl_coef` or set `kl_target`, lower `learning_rate`; use `best/`, or bound it by `max_kl`.",
        )  # fmt: skip
    highest = max(metric_values(run, "policy/approx_kl"), default=0.0)
    if (moved is not None and moved > MAX_APPROX_KL) or highest > MAX_UPDATE_KL:
        rate = max(metric_values(run, "policy/learning_rate"), default=0.0)
        yield Finding(
            "severe" if highest > MAX_UPDATE_KL else "warning", "learning rate too high",
            "single updates change the policy too much",
            f"policy/approx_kl is {highest:.3g} at most" + (f", {moved:.3g} in the median of the second half" if moved is not None
            else "") + f"; up to {MAX_APPROX_KL:g} is healthy. The highest learning rate is {rate:.2g}.",
            "Lower `learning_rate` by three to ten, use fewer `num_ppo_epochs`, or set `max_approx_kl`.",
        )  # fmt: skip
    kl = late_median(run, "objective/kl")
    if kl is not None and kl < -0.5:
        yield Finding(
            "severe", "negative KL", "sampling and training disagree",
            f"objective/kl has a median of {kl:.3g} nats in the second half; its expectation is never below 0.",
            "Temperature, template or precision differs between generation and training; see policy/sampler_gap, compare `bf16`.",
        )  # fmt: skip


def _clipping(run: Run) -> Iterator[Finding]:
    clipped = late_median(run, "policy/clipfrac")
    if clipped is not None and clipped > MAX_CLIPFRAC:
        yield Finding(
            "warning", "clipping all the time", "the loss of many tokens is clipped",
            f"policy/clipfrac has a median of {clipped:.3g} in the second half; up to {MAX_CLIPFRAC:g} is healthy "
            f"({describe_updates(run)}).",
            "Lower `learning_rate`, use fewer `num_ppo_epochs` or larger minibatches.",
        )  # fmt: skip
    clipped = late_median(run, "value/clipfrac")
    if clipped is not None and clipped > MAX_CLIPFRAC:
        yield Finding(
            "warning", "clipping all the time", "the loss of many values is clipped",
            f"value/clipfrac has a median of {clipped:.3g} in the second half; up to {MAX_CLIPFRAC:g} is healthy "
            f"({describe_updates(run)}).",
            "Raise `cliprange_value`: it is small against the spread of the scores; or set `normalize_scores`.",
        )  # fmt: skip


def _value_model(run: Run) -> Iterator[Finding]:
    explained, points = late_median(run, "value/explained_variance"), run.series("value/explained_variance")
    constant = statistics.median(metric_values(run, "objective/score_std") or [0.0]) < 1e-6
    if explained is None or not reaches(points, MIN_UPDATES) or constant or explained >= MIN_EXPLAINED_VARIANCE:
        return
    spread, mean = metric_values(run, "objective/score_std")[-1], metric_values(run, "value/mean")
    worse = explained < WORSE_THAN_CONSTANT
    far = mean and abs(mean[-1] - metric_values(run, "objective/score")[-1]) > 2 * spread
    yield Finding(
        "warning", "value model explains nothing", f"the values are {'worse' if worse else 'no better'} than a constant",
        f"value/explained_variance has a median of {explained:.3g} in the second half; 0.3 to 0.9 is healthy ({describe_updates(run)})."
        + (f" value/mean is {mean[-1]:.3g}, far from the score." if far else ""),
        "Raise `value_learning_rate` (and `cliprange_value`, if scores are large), start the value model from the reward model, "
        "use `value_warmup_updates`; or an `advantage_estimator` that has none.",
    )  # fmt: skip


def _engine(run: Run) -> Iterator[Finding]:
    limit = 0.05 if run.recipe.get("bf16") else 0.01
    off = [(step, value) for step, value in run.series("policy/first_ratio") if abs(value - 1) > limit]
    if off:
        yield Finding(
            "severe", "sampling and training disagree", "the probability ratio is not 1 before the first step of an update",
            f"policy/first_ratio is {off[0][1]:.5g} at update {off[0][0]:.0f} ({len(off)} of "
            f"{len(run.series('policy/first_ratio'))} logged updates are off by more than {limit:g}).",
            "A bug and no setting: dropout, temperature, padding or precision differ; compare `bf16` and `gradient_checkpointing`.",
        )  # fmt: skip
    if skipped := sum(metric_values(run, "policy/skipped")):
        yield Finding(
            "warning", "not finite", "minibatches were skipped",
            f"policy/skipped adds up to {skipped:.0f} over {describe_updates(run)}; each is saved under bad_batches/.",
            "Look at the saved rows; lower `learning_rate`, compare a run in float32.",
        )  # fmt: skip
