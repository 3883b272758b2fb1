"""Time updates, watch them for collapse, and log them."""

from __future__ import annotations

import time

from align.errors import UserError
from align.ppo.collapse import CollapseWatch
from align.ppo.ppo_run import PPORun, truncated
from align.ppo.step import step
from align.runs.tracker import Tracker


def tracked_step(
    run: PPORun, tracker: Tracker, watch: CollapseWatch, done: int, check_metrics: dict[str, float]
) -> None:
    """Run the next update, warn of collapse, show progress, and log its metrics if due.

    Args:
        done: updates done after this one. Metrics are logged every `logging_steps`, and for the first and last update.
        check_metrics: metrics of the self-checks, logged with the first update.

    Raises:
        UserError: the update failed; the message has its number.
    """
    metrics = timed_step(run, done - 1) | check_metrics
    for kind, warning in watch.warnings(done, metrics).items():
        tracker.warn(done, f"collapse: {kind}", warning)
    if done % run.recipe.logging_steps == 0 or done in (1, run.updates):
        tracker.log(done, metrics)
    tracker.progress(done, score=metrics["objective/score"], kl=metrics["objective/kl"])


def timed_step(run: PPORun, update: int) -> dict[str, float]:
    """`step`, with time and memory by phase, episode and epoch added to its metrics.

    Raises:
        UserError: the update failed; the message has its number.
    """
    run.world.clock.take()
    run.world.clock.take_bytes()
    began = time.perf_counter()
    try:
        metrics = step(run, update)
    except UserError as error:
        raise UserError(f"update {update + 1}: {error}") from error
    elapsed = time.perf_counter() - began
    phases = run.world.clock.take()
    episodes = (update + 1) * run.recipe.rollout_batch_size
    return metrics | {
        "objective/truncated": truncated(run.models.rewards, run.world),
        "episode": episodes,
        "epoch": episodes / run.recipe.num_generations / len(run.prompts),
        "time/communication": 0.0,  # of one process, which has none
        "memory/communication": 0.0,
        **{f"time/{phase}": seconds for phase, seconds in phases.items()},
        **{f"memory/{phase}": size / 2**30 for phase, size in run.world.clock.take_bytes().items()},
        "time/other": elapsed - sum(phases.values()),
        "time/total": elapsed,
        "time/tokens_per_second": metrics["response/length"] * run.recipe.rollout_batch_size / elapsed,
    }
