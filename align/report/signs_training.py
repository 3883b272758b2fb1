"""Faults of the stages that train with a Trainer: SFT, reward model, classifier, masked language model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from align.report.findings import Finding, end_values, late_median, metric_values, quarter_means
from align.report.read import Run
from align.runs.records import is_number

MIN_LOSS_DROP = 0.01  # relative to the first quarter
CLIPPED_SHARE = 0.9  # of the steps, with a gradient far above max_grad_norm
MAX_OVERFITTING = 0.25  # nats by which the held-out loss may rise above its minimum
ACCURACY_GAP = 0.15  # between training pairs and held-out pairs
MIN_PAIRS = 20  # for a finding on the accuracy
MAX_MARGIN = 4.0


def training_signs(run: Run) -> Iterator[Finding]:
    """A loss that rises or does not fall, constant gradient clipping, overfitting."""
    losses, points = quarter_means(run, "train/loss"), run.series("train/loss")
    if losses is not None and len(points) >= 8:
        first, last = losses
        noise = 2 * statistics.pstdev(end_values(points, -1)) / len(end_values(points, -1)) ** 0.5
        rate = max(metric_values(run, "train/learning_rate"), default=0.0)
        about = f"train/loss was {first:.4g} in the first quarter and {last:.4g} in the last ({len(points)} lines, " + (
            f"highest learning rate {rate:.3g})."
        )
        if last > first * 1.1 + noise:
            yield Finding(
                "severe", "learning rate too high", "the loss has risen", about,
                "Lower `learning_rate` by ten, add `warmup_steps`.",
            )  # fmt: skip
        elif last > first * (1 - MIN_LOSS_DROP) - noise and first > 0.05:
            yield Finding(
                "warning", "learning rate too low", "the loss does not fall", about,
                "Raise `learning_rate` by three to ten, or train for more steps; if that changes nothing, the labels or the "
                "trained parameters (`method`) are wrong.",
            )  # fmt: skip
    norms, limit = metric_values(run, "train/grad_norm"), run.recipe.get("max_grad_norm")
    if is_number(limit) and limit and len(norms) >= 8:
        above = sum(norm > 5 * limit for norm in norms) / len(norms)
        if above >= CLIPPED_SHARE:
            yield Finding(
                "warning", "clipping all the time", "the gradient is clipped at nearly every step",
                f"train/grad_norm was more than five times max_grad_norm {limit:g} in {above:.0%} of {len(norms)} lines, median "
                f"{statistics.median(norms):.3g}.",
                "Lower `learning_rate`, or raise `max_grad_norm`: clipping sets the size of every step.",
            )  # fmt: skip
    held_out = run.series("eval/loss")
    if len(held_out) >= 3 and len(points) >= 8:
        best_step, best = min(held_out, key=lambda each: each[1])
        last_step, final = held_out[-1]
        train = [value for step, value in points if step >= best_step]
        if final > best + min(MAX_OVERFITTING, 0.1 * best) and len(train) >= 2 and train[-1] < train[0]:
            yield Finding(
                "warning", "overfitting", "the held-out loss rises while the training loss falls",
                f"eval/loss was lowest at step {best_step:.0f} ({best:.4g}) and is {final:.4g} at step {last_step:.0f}; train/loss "
                f"fell from {train[0]:.4g} to {train[-1]:.4g} meanwhile.",
                "Train for fewer epochs, or set `load_best_model_at_end`; more or more varied data, an adapter.",
            )  # fmt: skip


def reward_signs(run: Run) -> Iterator[Finding]:
    """A reward model no better than chance, better than the labels allow, memorized pairs, or overconfidence."""
    accuracy, low, ceiling = (run.last(f"eval/{name}") for name in ("accuracy", "accuracy_low", "ceiling"))
    pairs = run.results.get("pairs")
    of = f" of {pairs} held-out pairs" if is_number(pairs) else " of the held-out pairs"
    enough = pairs is None or not is_number(pairs) or pairs >= MIN_PAIRS
    if accuracy is not None and low is not None and low <= 0.5 and run.finished and enough:
        yield Finding(
            "severe" if accuracy <= 0.5 else "warning", "no better than chance", "the reward model may be no better than chance",
            f"eval/accuracy is {accuracy:.3g}{of}, with an interval from {low:.3g}: 0.5 is chance.",
            "More or cleaner pairs, a higher `learning_rate`, a larger model; hold out more pairs to know it better.",
        )  # fmt: skip
    if accuracy is not None and low is not None and ceiling is not None and low > ceiling:
        yield Finding(
            "severe", "accuracy above the ceiling", "the reward model is right more often than the labels can be",
            f"eval/accuracy is {accuracy:.3g}{of} (interval from {low:.3g}), and the true reward agrees with only {ceiling:.3g} of "
            "their labels.",
            "It has learned what else the labels follow, such as length: see the card of the reward, and change the labels.",
        )  # fmt: skip
    train, margin = late_median(run, "train/accuracy"), late_median(run, "train/margin")
    measured = run.series("eval/accuracy")[-1][0] > 0 if accuracy is not None else False  # step 0 is before training
    if train is not None and measured and accuracy is not None and train > accuracy + ACCURACY_GAP:
        yield Finding(
            "warning", "memorized", "the training pairs are memorized",
            f"train/accuracy has a median of {train:.3g} in the second half, eval/accuracy is {accuracy:.3g}{of}.",
            "One epoch, a lower `learning_rate`, or more pairs.",
        )  # fmt: skip
    if margin is not None and margin > MAX_MARGIN:
        yield Finding(
            "warning", "overconfident", "the margins are large",
            f"train/margin has a median of {margin:.3g} in the second half; above {MAX_MARGIN:g} PPO is likely to exploit it.",
            "Fewer epochs, a lower `learning_rate`, `center_rewards_coefficient`.",
        )  # fmt: skip
