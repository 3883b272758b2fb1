"""Faults of a PPO run. Every limit is that of a documented healthy range, and no sound run of the tests comes near it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from itertools import chain

from align.report.findings import Finding, change, correlation, late, part, values
from align.report.read import Run
from align.report.responses import last_rows
from align.runs.records import is_number

FEWEST_UPDATES = 8  # before it is said that something does not happen
MOST_KL = 50.0  # nats per response; in longer responses, 1 nat per token
LEAST_CHANGE = 1e-5  # policy/approx_kl of a policy that trains
MOST_CHANGE = 0.05
MOST_CLIPPED = 0.3
LEAST_EXPLAINED = 0.05
LOST_EOS = 0.1  # fall of the EOS rate
MOST_REPEATED = 0.2
LONGER = 1.25  # growth of the length that is worth a look
CARRIED = 0.6  # rank correlation of score and length
LEAST_ENTROPY = 0.05  # nats per token
STRONG_PENALTY = 0.5  # kl_coef times one nat, in spreads of the score


def ppo_signs(run: Run, reward_model: Run | None) -> Iterator[Finding]:
    """Faults of a run, in no order.

    Args:
        reward_model: the stage that made its reward model, where that is known.
    """
    yield from chain(
        _scores(run), _divergence(run), _clipping(run), _value_model(run), _endings(run), _length(run), _text(run),
        _out_of_data(run, reward_model), _engine(run),
    )  # fmt: skip


def _updates(run: Run) -> str:
    points = run.series("objective/score")
    batch = run.recipe.get("rollout_batch_size")
    of = f" of {batch} responses" if is_number(batch) else ""
    return f"updates {points[0][0]:.0f} to {points[-1][0]:.0f}, {len(points)} logged{of}" if points else "no updates"


def _noise(run: Run) -> float:
    """The standard error of the difference between the first and the last quarter of `objective/score`."""
    batch, spread = run.recipe.get("rollout_batch_size"), statistics.fmean(values(run, "objective/score_std") or [0.0])
    size = len(part(run.series("objective/score"), 0))
    return spread * math.sqrt(2 / (size * batch)) if is_number(batch) and batch else spread


def _scores(run: Run) -> Iterator[Finding]:
    score, spreads = change(run, "objective/score"), values(run, "objective/score_std")
    if score is None or not spreads:
        return
    first, last = score
    if statistics.median(spreads) <= 1e-6 * max(1.0, abs(first)):
        yield Finding(
            "severe", "flat scores", "all responses score alike",
            f"objective/score_std has a median of {statistics.median(spreads):.2g} and objective/score is {last:.4g} "
            f"({_updates(run)}): there is no signal to learn from.",
            "Check the reward and what it is given: `align judge-reward`, and `samples.jsonl` for the responses.",
        )  # fmt: skip
        return
    told = f"objective/score was {first:.4g} in the first quarter and {last:.4g} in the last, standard error of the difference "
    told += f"{_noise(run):.2g} ({_updates(run)})."
    enough = len(run.series("objective/score")) >= FEWEST_UPDATES
    moved, kl = late(run, "policy/approx_kl"), late(run, "objective/kl")
    if enough and moved is not None and moved < LEAST_CHANGE and kl is not None and abs(kl) < 0.05:
        rate = max(values(run, "policy/learning_rate"), default=0.0)
        yield Finding(
            "warning", "learning rate too low", "the policy does not change",
            f"policy/approx_kl has a median of {moved:.2g} in the second half, objective/kl of {kl:.2g} nats; the highest "
            f"learning rate is {rate:.2g}. {told}",
            "Raise `learning_rate` by ten, or train with more `num_ppo_epochs`; see that `method` trains what it should.",
        )  # fmt: skip
    elif last - first < -3 * _noise(run):
        yield Finding(
            "severe", "falling scores", "the score falls", told,
            "Lower `learning_rate`; if objective/kl is small, lower `kl_coef`, which pulls back to the SFT model.",
        )  # fmt: skip
    elif enough and last - first < 2 * _noise(run):
        penalty, spread = max(values(run, "objective/kl_coef"), default=0.0), statistics.median(spreads)
        strong = penalty > STRONG_PENALTY * spread
        more = f" kl_coef is {penalty:.3g} per nat, and the scores' spread only {spread:.3g}." if strong else ""
        yield Finding(
            "warning", "flat scores", "the score does not rise", told + more,
            "Lower `kl_coef`, or set `normalize_scores` or `kl_target`, which do not depend on the reward's scale."
            if strong
            else "Raise `learning_rate`, lower `kl_coef`, and judge the reward (`align judge-reward`): its scores may not vary "
            "among the responses to one prompt.",
        )  # fmt: skip
    objective = change(run, "objective/reward")
    if objective is not None and enough and objective[1] < objective[0] - 3 * _noise(run) and last >= first:
        yield Finding(
            "warning", "objective fell", "the KL penalty costs more than the score gains",
            f"objective/reward was {objective[0]:.4g} in the first quarter and {objective[1]:.4g} in the last ({_updates(run)}).",
            "Lower `learning_rate`, or lower `kl_coef` if the distance is wanted.",
        )  # fmt: skip


def _divergence(run: Run) -> Iterator[Finding]:
    points = run.series("objective/kl")
    if not points:
        return
    length = statistics.fmean(values(run, "response/length") or [0.0])
    target = run.recipe.get("kl_target")
    bound = max(MOST_KL, length, 2 * float(target) if is_number(target) else 0.0)  # type: ignore[arg-type]
    above = [(step, value) for step, value in points if value > bound]
    moved = late(run, "policy/approx_kl")
    if above:
        worst = max(above, key=lambda each: each[1])
        yield Finding(
            "severe", "KL explosion", "the policy has left the SFT model",
            f"objective/kl is above {bound:.3g} nats per response from update {above[0][0]:.0f}, {worst[1]:.4g} at most (update "
            f"{worst[0]:.0f}); kl_coef {values(run, 'objective/kl_coef')[-1]:.3g}."
            if values(run, "objective/kl_coef")
            else f"objective/kl is above {bound:.3g} nats per response from update {above[0][0]:.0f}.",
            "Raise `kl_coef` or set `kl_target`, lower `learning_rate`; use `best/`, or bound it by `max_kl`.",
        )  # fmt: skip
    highest = max(values(run, "policy/approx_kl"), default=0.0)
    if (moved is not None and moved > MOST_CHANGE) or highest > 10 * MOST_CHANGE:
        rate = max(values(run, "policy/learning_rate"), default=0.0)
        yield Finding(
            "severe" if highest > 10 * MOST_CHANGE else "warning", "learning rate too high",
            "single updates change the policy too much",
            f"policy/approx_kl is {highest:.3g} at most" + (f", {moved:.3g} in the median of the second half" if moved is not None
            else "") + f"; up to {MOST_CHANGE:g} is healthy. The highest learning rate is {rate:.2g}.",
            "Lower `learning_rate` by three to ten, use fewer `num_ppo_epochs`, or set `max_approx_kl`.",
        )  # fmt: skip
    kl = late(run, "objective/kl")
    if kl is not None and kl < -0.5:
        yield Finding(
            "severe", "negative KL", "sampling and training disagree",
            f"objective/kl has a median of {kl:.3g} nats in the second half; its expectation is never below 0.",
            "Temperature, template or precision differs between generation and training; see policy/sampler_gap, compare `bf16`.",
        )  # fmt: skip


def _clipping(run: Run) -> Iterator[Finding]:
    clipped = late(run, "policy/clipfrac")
    if clipped is not None and clipped > MOST_CLIPPED:
        yield Finding(
            "warning", "clipping all the time", "the loss of many tokens is clipped",
            f"policy/clipfrac has a median of {clipped:.3g} in the second half; up to {MOST_CLIPPED:g} is healthy "
            f"({_updates(run)}).",
            "Lower `learning_rate`, use fewer `num_ppo_epochs` or larger minibatches.",
        )  # fmt: skip
    clipped = late(run, "value/clipfrac")
    if clipped is not None and clipped > MOST_CLIPPED:
        yield Finding(
            "warning", "clipping all the time", "the loss of many values is clipped",
            f"value/clipfrac has a median of {clipped:.3g} in the second half; up to {MOST_CLIPPED:g} is healthy "
            f"({_updates(run)}).",
            "Raise `cliprange_value`: it is small against the spread of the scores; or set `normalize_scores`.",
        )  # fmt: skip


def _value_model(run: Run) -> Iterator[Finding]:
    explained, points = late(run, "value/explained_variance"), run.series("value/explained_variance")
    alike = statistics.median(values(run, "objective/score_std") or [0.0]) < 1e-6
    if explained is None or len(points) < FEWEST_UPDATES or alike or explained >= LEAST_EXPLAINED:
        return
    spread, mean = values(run, "objective/score_std")[-1], values(run, "value/mean")
    far = mean and abs(mean[-1] - values(run, "objective/score")[-1]) > 2 * spread
    yield Finding(
        "warning", "value model explains nothing", "the values are no better than a constant",
        f"value/explained_variance has a median of {explained:.3g} in the second half; 0.3 to 0.9 is healthy ({_updates(run)})."
        + (f" value/mean is {mean[-1]:.3g}, far from the score." if far else ""),
        "Raise `value_learning_rate` (and `cliprange_value`, if scores are large), start the value model from the reward model, "
        "use `value_warmup_updates`; or an `advantage_estimator` that has none.",
    )  # fmt: skip


def _endings(run: Run) -> Iterator[Finding]:
    rates = run.series("response/eos_rate")
    start = run.series("self_check/eos_rate") or rates[:1]
    if len(rates) < 4 or not start:
        return
    before, after = max(start[0][1], rates[0][1]), statistics.fmean(part(rates, -1))
    if after < before - LOST_EOS:
        yield Finding(
            "severe" if after < before / 2 else "warning", "EOS loss", "responses no longer end by themselves",
            f"response/eos_rate was {before:.3g} at the start and is {after:.3g} in the last quarter ({_updates(run)}); mean length "
            f"{values(run, 'response/length')[-1]:.4g} of {run.recipe.get('response_length')} tokens.",
            "Set `missing_eos_penalty`, and see whether the reward favors length (`align judge-reward`).",
        )  # fmt: skip


def _length(run: Run) -> Iterator[Finding]:
    lengths, scores = run.series("response/length"), run.series("objective/score")
    grown = change(run, "response/length")
    if grown is None or len(lengths) != len(scores) or not grown[0]:
        return
    factor = grown[1] / grown[0]
    rows = [row for row in last_rows(run) if is_number(row.get("length"))]
    over_time = correlation([v for _, v in lengths], [v for _, v in scores])
    within = correlation([row["length"] for row in rows], [row["score"] for row in rows]) if len(rows) >= 30 else None
    carried = within > CARRIED if within is not None else over_time > 0.9 and factor > 1.5
    gained = scores[-1][1] > scores[0][1]
    if factor < LONGER or not carried or not gained or len(scores) < FEWEST_UPDATES:
        return
    among = f", over {len(rows)} held-out responses of the last evaluation {within:.2f}" if within is not None else ""
    yield Finding(
        "warning", "length growth", "the score grows by length",
        f"response/length went from {grown[0]:.4g} to {grown[1]:.4g} tokens; its rank correlation with the score is "
        f"{over_time:.2f} over {len(scores)} updates{among}.",
        "Judge the reward's length bias (`align judge-reward`), train it on pairs of equal length, or penalize length in "
        "`reward_funcs`.",
    )  # fmt: skip


def _text(run: Run) -> Iterator[Finding]:
    repeated = change(run, "response/repetition")
    if repeated is not None and repeated[1] > MOST_REPEATED and repeated[1] > 2 * repeated[0]:
        yield Finding(
            "severe", "repeated text", "the responses repeat themselves",
            f"response/repetition was {repeated[0]:.3g} in the first quarter and {repeated[1]:.3g} in the last; under 0.1 is healthy "
            f"({_updates(run)}).",
            "The reward favors repetition: read the samples, raise `kl_coef`, lower `learning_rate`, train the reward on such "
            "responses.",
        )  # fmt: skip
    entropy = change(run, "objective/entropy")
    if entropy is not None and entropy[1] < LEAST_ENTROPY and entropy[1] < entropy[0] / 4:
        yield Finding(
            "severe", "entropy collapse", "the policy has collapsed onto a few responses",
            f"objective/entropy was {entropy[0]:.3g} nats per token in the first quarter and {entropy[1]:.3g} in the last "
            f"({_updates(run)}).",
            "Raise `kl_coef` or `entropy_coef`, lower `learning_rate`.",
        )  # fmt: skip


def _out_of_data(run: Run, reward_model: Run | None) -> Iterator[Finding]:
    told = list(_truth_falls(run))
    score = part(run.series("objective/score"), -1) if run.series("objective/score") else []
    if reward_model is not None and score:
        highest, zero = reward_model.last("eval/max_reward"), reward_model.record.get("score_mean", 0.0)
        weights = run.recipe.get("reward_weights")
        if (
            highest is not None
            and not run.recipe.get("reward_funcs")
            and not weights
            and not run.recipe.get("normalize_scores")
        ):
            mean = statistics.fmean(score)
            if mean > highest - zero:
                told.append(
                    f"objective/score is {mean:.3g} in the last quarter, above {highest - zero:.3g}, the highest that "
                    "the reward model gave to its held-out pairs"
                )
    cut, episodes = run.last("objective/truncated"), run.last("episode")
    if cut and episodes and cut > 0.01 * episodes:
        told.append(f"{cut:.0f} of {episodes:.0f} responses were truncated for the reward model")
    if told:
        yield Finding(
            "severe", "reward model out of its data", "the reward is exploited, or judges what it was not trained on",
            "; ".join(told) + f" ({_updates(run)}).",
            "Use the checkpoint before the turn, raise `kl_coef`, set `kl_target` or `max_kl`; collect pairs of this policy's responses "
            "and train the reward on them.",
        )  # fmt: skip


def _truth_falls(run: Run) -> Iterator[str]:
    rows = last_rows(run)
    for name in sorted(run.metrics):
        if not name.startswith(("eval/true/", "eval/judge")) or "win_rate" in name or name.endswith(("_low", "_high")):
            continue
        points, column = run.series(name), name.removeprefix("eval/")
        given = [
            (row[column], row[f"{column}_sft"])
            for row in rows
            if is_number(row.get(column)) and is_number(row.get(f"{column}_sft"))
        ]
        if len(given) < 2:
            continue
        best_step, best = max(points, key=lambda each: each[1])
        sft = statistics.fmean(before for _, before in given)
        error = 1.96 * statistics.stdev(after - before for after, before in given) / math.sqrt(len(given))
        start, last = max((0.0, sft), (best_step, best), key=lambda each: each[1]), points[-1][1]
        scores = {0.0: statistics.fmean(row["score_sft"] for row in rows), **dict(run.series("eval/score"))}
        risen = scores.get(points[-1][0], -math.inf) >= scores.get(start[0], math.inf)
        # The best of several evaluations is high by luck, too.
        if last < start[1] - (1.5 if start[0] else 1.0) * error and risen:
            where = f"at update {start[0]:.0f}" if start[0] else "for the SFT model"
            yield (
                f"{name} is {last:.4g} at update {points[-1][0]:.0f} and was {start[1]:.4g} {where} (n={len(given)}, 95% within "
                f"{error:.2g}), while the score did not fall"
            )


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
    if skipped := sum(values(run, "policy/skipped")):
        yield Finding(
            "warning", "not finite", "minibatches were skipped",
            f"policy/skipped adds up to {skipped:.0f} over {_updates(run)}; each is saved under bad_batches/.",
            "Look at the saved rows; lower `learning_rate`, compare a run in float32.",
        )  # fmt: skip
