"""Faults in the responses of a PPO run: missing ends, length, repetition, and rewards outside of their training data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from align.report.findings import (
    FIRST_UPDATES,
    MIN_UPDATES,
    Finding,
    correlation,
    describe_updates,
    end_values,
    late_median,
    metric_values,
    quarter_means,
    reaches,
)
from align.report.read import Run
from align.report.responses import last_rows
from align.runs.records import is_number

EOS_RATE_DROP = 0.1
MAX_REPETITION = 0.2
LENGTH_GROWTH = 1.25  # mean length of the last quarter over that of the first
LENGTH_CORRELATION = 0.6  # rank correlation of score and length
MIN_ENTROPY = 0.05  # nats per token
DISAGREEMENT_GROWTH = 1.5


def response_signs(run: Run, reward_model: Run | None) -> Iterator[Finding]:
    """Faults of a run, in no order.

    Args:
        reward_model: the run that trained its reward model, if known.
    """
    yield from _endings(run)
    yield from _length(run)
    yield from _text(run)
    yield from _out_of_data(run, reward_model)
    yield from _disagreement(run)


def _endings(run: Run) -> Iterator[Finding]:
    rates = run.series("response/eos_rate")
    start = run.series("self_check/eos_rate") or rates[:1]
    if not reaches(rates, FIRST_UPDATES) or not start:
        return
    before, after = max(start[0][1], rates[0][1]), statistics.fmean(end_values(rates, -1))
    # Standard error of the difference if both rates equal the first.
    batch, last = run.recipe.get("rollout_batch_size"), len(end_values(rates, -1))
    share = min(max(before, 0.02), 0.98)
    error = math.sqrt(share * (1 - share) * (1 + 1 / last) / batch) if is_number(batch) and batch else 0.0
    if after < before - max(EOS_RATE_DROP, 3 * error):
        yield Finding(
            "severe" if after < before / 2 else "warning", "EOS loss", "responses no longer end by themselves",
            f"response/eos_rate was {before:.3g} at the start and is {after:.3g} in the last quarter ({describe_updates(run)}); mean length "
            f"{metric_values(run, 'response/length')[-1]:.4g} of {run.recipe.get('response_length')} tokens.",
            "Set `missing_eos_penalty`, and see whether the reward favors length (`align judge-reward`).",
        )  # fmt: skip


def _length(run: Run) -> Iterator[Finding]:
    lengths, scores = run.series("response/length"), run.series("objective/score")
    grown = quarter_means(run, "response/length")
    if grown is None or len(lengths) != len(scores) or not grown[0]:
        return
    factor = grown[1] / grown[0]
    rows = [row for row in last_rows(run) if is_number(row.get("length"))]
    over_time = correlation([v for _, v in lengths], [v for _, v in scores])
    within = correlation([row["length"] for row in rows], [row["score"] for row in rows]) if len(rows) >= 30 else None
    alone = len(scores) >= MIN_UPDATES and over_time > 0.9 and factor > 1.5  # few points correlate by chance
    carried = within > LENGTH_CORRELATION if within is not None else alone
    gained = scores[-1][1] > scores[0][1]
    if factor < LENGTH_GROWTH or not carried or not gained or not reaches(scores, MIN_UPDATES):
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
    repeated = quarter_means(run, "response/repetition")
    if repeated is not None and repeated[1] > MAX_REPETITION and repeated[1] > 2 * repeated[0]:
        yield Finding(
            "severe", "repeated text", "the responses repeat themselves",
            f"response/repetition was {repeated[0]:.3g} in the first quarter and {repeated[1]:.3g} in the last; under 0.1 is healthy "
            f"({describe_updates(run)}).",
            "The reward favors repetition: read the samples, raise `kl_coef`, lower `learning_rate`, train the reward on such "
            "responses.",
        )  # fmt: skip
    entropy = quarter_means(run, "objective/entropy")
    if entropy is not None and entropy[1] < MIN_ENTROPY and entropy[1] < entropy[0] / 4:
        yield Finding(
            "severe", "entropy collapse", "the policy has collapsed onto a few responses",
            f"objective/entropy was {entropy[0]:.3g} nats per token in the first quarter and {entropy[1]:.3g} in the last "
            f"({describe_updates(run)}).",
            "Raise `kl_coef` (with PPO, `entropy_coef` too), lower `learning_rate`.",
        )  # fmt: skip


def _disagreement(run: Run) -> Iterator[Finding]:
    score, spread = quarter_means(run, "objective/score"), late_median(run, "objective/score_std")
    if score is None or spread is None or not reaches(run.series("objective/score"), MIN_UPDATES):
        return
    for name in sorted(name for name in run.metrics if name.startswith("objective/disagreement/")):
        evidence, means, late = [], quarter_means(run, name), late_median(run, name)
        if means is not None and means[1] > DISAGREEMENT_GROWTH * means[0] and score[1] > score[0]:
            evidence.append(
                f"{name} was {means[0]:.3g} in the first quarter and {means[1]:.3g} in the last, while the score rose from "
                f"{score[0]:.3g} to {score[1]:.3g}"
            )
        # With other rewards, objective/score_std is not the ensemble's own.
        if late is not None and not run.recipe.get("reward_funcs") and late > spread > 0:
            evidence.append(
                f"{name} has a median of {late:.3g} in the second half, and the scores of different responses spread by "
                f"{spread:.3g} (objective/score_std)"
            )
        if evidence:
            yield Finding(
                "warning", "ensemble disagreement", "the reward models of the ensemble do not agree on these responses",
                "; ".join(evidence) + f" ({describe_updates(run)}).",
                "Set `reward_ensemble` to wco or uwo, which trust no member alone; raise `kl_coef` or set `kl_target`; train the "
                "members on more pairs, of this policy's responses among them.",
            )  # fmt: skip


def _out_of_data(run: Run, reward_model: Run | None) -> Iterator[Finding]:
    evidence = list(_truth_falls(run))
    score = end_values(run.series("objective/score"), -1) if run.series("objective/score") else []
    enough = reaches(run.series("objective/score"), MIN_UPDATES)
    if reward_model is not None and score and enough:
        highest, zero = reward_model.last("eval/max_reward"), reward_model.record.get("score_mean", 0.0)
        weights = run.recipe.get("reward_weights")
        if highest is not None and not run.recipe.get("reward_funcs") and not weights:
            mean = statistics.fmean(score)
            if mean > highest - zero:
                evidence.append(
                    f"objective/score is {mean:.3g} in the last quarter, above {highest - zero:.3g}, the highest that "
                    "the reward model gave to its held-out pairs"
                )
    cut, episodes = run.last("objective/truncated"), run.last("episode")
    if cut and episodes and cut > 0.01 * episodes and enough:
        evidence.append(f"{cut:.0f} of {episodes:.0f} responses were truncated for the reward model")
    if evidence:
        yield Finding(
            "severe", "reward model out of its data", "the reward is exploited, or judges what it was not trained on",
            "; ".join(evidence) + f" ({describe_updates(run)}).",
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
        # The best of several evaluations is biased upwards.
        if last < start[1] - (1.5 if start[0] else 1.0) * error and risen:
            where = f"at update {start[0]:.0f}" if start[0] else "for the SFT model"
            yield (
                f"{name} is {last:.4g} at update {points[-1][0]:.0f} and was {start[1]:.4g} {where} (n={len(given)}, 95% within "
                f"{error:.2g}), while the score did not fall"
            )
