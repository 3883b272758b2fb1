"""Evaluation of the policy against the SFT model on held-out prompts, and choice of the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from align.config.judge import JUDGE, SCORE, TRUE, best_metric, best_metrics
from align.data.rows import render_text
from align.engine.distributed import rows_of_rank
from align.engine.engine import Engine
from align.engine.faults import during
from align.engine.user_functions import user_function
from align.errors import UserError
from align.evaluate.statistics import win_rate
from align.generation.responses import decode_responses
from align.generation.sampler import PromptBatch
from align.ppo.frontier import MIN_DRAWN, describe_fit, draw_frontier, fit
from align.ppo.held_out import (
    SAMPLE_COLUMNS,
    HeldOutResponses,
    measure_columns,
    member_columns,
    same_responses,
    sample_rows,
)
from align.ppo.metrics import response_kl, response_metrics, score_length_correlation
from align.ppo.outputs import check_best, save_best
from align.ppo.ppo_run import PPORun, TokenizedPrompt, truncated
from align.ppo.rollout import gather_rollout
from align.ppo.sample import sample_responses, score_responses
from align.ppo.verdict import (
    Change,
    describe_fall,
    mean,
    metric_label,
    paired_change,
    spread,
    verdicts,
    warnings,
    win_rate_metric,
)
from align.runs.tracker import Tracker

MAX_RESPONSES = 500  # of the last evaluation, written to samples.jsonl for the report


class Evaluation:
    """Evaluates the policy on held-out prompts. SFT model and policy sample with the same noise for each prompt.

    At the start of a run the SFT model is the best checkpoint.

    Args:
        prompts: held-out prompts; may be empty.
        start: updates done before.

    Attributes:
        metrics: of the last evaluation.
        changes: differences of the last evaluation from the SFT model, by metric.
        samples: rows of the last evaluation in the columns `SAMPLE_COLUMNS`.
        measures: further columns for these rows: lengths in tokens and true rewards of both models.
        of_members: further columns: scores and disagreement of the members of an ensemble.
        stops: whether `early_stopping_patience` ends the run.
    """

    def __init__(self, run: PPORun, prompts: Sequence[TokenizedPrompt], start: int):
        self.run = run
        self.prompts, self.ids = [prompt for prompt, _ in prompts], [ids for _, ids in prompts]
        self.texts = [render_text(prompt.prompt) for prompt in self.prompts]
        self.metrics: dict[str, float] = {}
        self.changes: dict[str, Change] = {}
        self.samples: list[list[Any]] = []
        self.measures: dict[str, list[float | None]] = {}
        self.of_members: dict[str, list[float | None]] = {}
        self.warned: set[str] = set()
        self.stops = False
        if self.prompts:
            check_best(run)
            names, timeout = run.recipe.eval_reward_funcs, run.recipe.reward_timeout
            self.true_rewards = [user_function(name, "eval_reward_funcs", timeout) for name in names]
            self.baseline = self._respond(run.models.reference)
            if start == 0:
                self._keep_best(0, self.measure(self.baseline), self.baseline)

    @property
    def sft_eos_rate(self) -> float | None:
        """EOS rate of the SFT model's responses; None without prompts."""
        return float(self.baseline.rollout.ended.float().mean()) if self.prompts else None

    def track_if_due(self, tracker: Tracker, done: int) -> None:
        """`track` if there are prompts and an evaluation is due: every `eval_steps` updates and after the last one."""
        every = self.run.recipe.eval_steps
        if self.prompts and (done == self.run.updates or (every is not None and done % every == 0)):
            self.track(tracker, done)

    def track(self, tracker: Tracker, step: int) -> None:
        """Evaluate the policy after `step` updates, log the metrics, and save it in `best/` if it is the best so far."""
        run, policy = self.run, self._respond(self.run.models.policy)
        self.metrics = self.measure(policy)
        self.samples = sample_rows(self.texts, self.baseline, policy)
        self.of_members = member_columns(policy, run.models.rewards)
        self.measures = {**measure_columns(self.baseline, policy), **self.of_members}
        tracker.log(step, self.metrics)
        columns = [*SAMPLE_COLUMNS, *self.of_members]
        rows = [[*sample, *more] for sample, *more in zip(self.samples, *self.of_members.values(), strict=True)]
        tracker.table(step, "samples", columns, rows[: run.recipe.num_sample_rows])
        self._warn(tracker, step, policy)
        self._choose(tracker, step, policy)
        if step == run.updates or self.stops:
            columns = [*SAMPLE_COLUMNS, *self.measures]
            rows = [[*sample, *more] for sample, *more in zip(self.samples, *self.measures.values(), strict=True)]
            tracker.table(step, "responses", columns, rows[:MAX_RESPONSES])

    def measure(self, model: HeldOutResponses) -> dict[str, float]:
        """Metrics of a model's responses and their differences from the SFT model's, under their documented names."""
        rollout, before = model.rollout, self.baseline
        error = 1.96 * float(rollout.scores.std()) / len(rollout) ** 0.5 if len(rollout) > 1 else 0.0
        metrics = {
            **response_metrics(rollout, self.run.models.rewards, "eval"),
            "eval/score_low": float(rollout.scores.mean()) - error,
            "eval/score_high": float(rollout.scores.mean()) + error,
            "eval/kl": float(response_kl(rollout).mean()),
            "eval/score_length_correlation": score_length_correlation(rollout, before.rollout),
        }
        self.changes = {}
        same = same_responses(before, model)
        for name, values in model.metric_values.items():
            metric = name.removeprefix("eval/")
            scored = zip(values, before.metric_values[name], same, strict=True)
            both = [(b if tie else a, b) for a, b, tie in scored if not math.isnan(a + b)]
            metrics.setdefault(name, mean(values))
            if not both:  # a function that applies to no row
                continue
            won = win_rate(*map(list, zip(*both, strict=True)))
            metrics[win_rate_metric(name)] = won["win_rate"]
            if name == SCORE:
                metrics |= {"eval/win_rate_low": won["low"], "eval/win_rate_high": won["high"]}
            self.changes[name] = each = paired_change(values, before.metric_values[name], self.texts)
            metrics |= {
                f"eval/change/{metric}": each.mean,
                f"eval/change_low/{metric}": each.low,
                f"eval/change_high/{metric}": each.high,
            }
        return metrics

    def _warn(self, tracker: Tracker, step: int, policy: HeldOutResponses) -> None:
        """Print signs that the gain is not real, each kind once."""
        run, before = self.run, self.baseline
        objective = (policy.rollout.scores - run.raw_score_kl_coef * response_kl(policy.rollout)).tolist()
        lengths = [float(model.rollout.lengths.float().mean()) for model in (before, policy)]
        found = warnings(
            self.changes,
            paired_change(objective, before.metric_values[SCORE], self.texts),
            self.metrics["eval/score_length_correlation"],
            (lengths[0], lengths[1]),
            before.truncated + policy.truncated,
        )
        for kind, text in found.items():
            if kind not in self.warned:
                tracker.warn(step, kind, f"update {step}: {text}")
        self.warned |= found.keys()

    def _choose(self, tracker: Tracker, step: int, policy: HeldOutResponses) -> None:
        """Save the policy in `best/` if it is the best so far, and count consecutive evaluations worse than the best."""
        recipe, progress, name = self.run.recipe, self.run.progress, best_metric(self.run.recipe)
        progress.history.append({"update": step, **self.metrics})
        within = recipe.max_kl is None or self.metrics["eval/kl"] <= recipe.max_kl
        if within and (progress.best is None or self.metrics[name] > progress.best[name]):
            self._keep_best(step, self.metrics, policy)
        if not progress.best_worth or progress.best == {"update": step, **self.metrics}:
            return
        since = paired_change(policy.metric_values[name], progress.best_worth, self.texts)
        progress.falls = progress.falls + 1 if since.comparison == "worse than" else 0
        if progress.falls:
            assert progress.best is not None
            score = self.metrics[SCORE] - progress.best[SCORE]
            tracker.warn(step, "fell", f"update {step}: {describe_fall(name, since, progress.best['update'], score)}")
        if recipe.early_stopping_patience is not None and progress.falls >= recipe.early_stopping_patience:
            self.stops = True
            tracker.say(f"early_stopping_patience: {progress.falls} evaluations in a row: training stops")

    def _keep_best(self, step: int, metrics: dict[str, float], model: HeldOutResponses) -> None:
        run = self.run
        run.progress.best, run.progress.falls = {"update": step, **metrics}, 0
        run.progress.best_worth = model.metric_values[best_metric(run.recipe)]
        save_best(run)

    @during("evaluation")
    def _respond(self, engine: Engine) -> HeldOutResponses:
        """Sample responses to all held-out prompts from `engine` and score them; the same on every rank."""
        count, world = len(self.prompts), self.run.world
        # `engine` may be the reference, which cannot train: sampling and scoring need only its forward pass.
        models = replace(self.run.models, policy=engine, value=None)  # type: ignore[arg-type]
        run = replace(self.run, models=models)
        mine = rows_of_rank(world, count)
        batch = PromptBatch([self.prompts[i] for i in mine], [self.ids[i] for i in mine], "evaluation", mine)
        samples = sample_responses(run, batch)
        gathered = gather_rollout(score_responses(run, samples), world, run.sampler.pad_token_id)
        rollout = gathered.rows(torch.arange(count, device=world.device))
        responses = decode_responses(run.sampler.tokenizer, self.prompts, rollout)
        metric_values: dict[str, Tensor] = {SCORE: rollout.scores}
        cut = 0.0
        try:
            metric_values |= {f"{TRUE}{function.name}": function.score(responses) for function in self.true_rewards}
        except ValueError as error:  # the message names the function and the row
            raise UserError(f"eval_reward_funcs: {error}") from error
        if (judge := run.models.judge) is not None:
            before = truncated(judge, world)
            try:
                judged, _, _ = judge.score(decode_responses(run.sampler.tokenizer, batch.prompts, samples))
            except ValueError as error:
                raise UserError(f"the judge: {error}") from error
            metric_values[JUDGE] = world.gather(judged.to(world.device))[:count]
            cut = truncated(judge, world) - before
        sums = {name: values if values.dim() == 1 else values.sum(dim=1) for name, values in metric_values.items()}
        ordered = {name: sums[name].tolist() for name in best_metrics(run.recipe)}
        return HeldOutResponses(rollout, responses.texts, ordered, cut)

    def results(self) -> dict[str, Any]:
        """Closing numbers: the last metrics, the table of SFT model and policy, the verdict, the fit, and three samples."""
        if not self.metrics:
            return {"table": []}
        samples = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in self.samples[:3]]
        law = fit(self.run.progress.history, best_metric(self.run.recipe))
        verdict = verdicts(self.changes) + ([] if law is None else [describe_fit(law, self.metrics["eval/kl"])])
        return {**self.metrics, "table": self.table(), "verdict": verdict, "fit": law, "samples": samples}

    def chart(self) -> str | None:
        """The chart of gains against KL as SVG; None with fewer than two evaluations."""
        history = self.run.progress.history
        if len(history) < MIN_DRAWN:
            return None
        spreads = {name: spread(values) for name, values in self.baseline.metric_values.items()}
        return draw_frontier(history, spreads, fit(history, best_metric(self.run.recipe)))

    def table(self) -> list[list[Any]]:
        """SFT model against policy in the last evaluation: rows of measure, before, after."""
        before = response_metrics(self.baseline.rollout, self.run.models.rewards, "eval")
        after, rows = self.metrics, []
        for name, values in self.baseline.metric_values.items():
            rows.append([metric_label(name), mean(values), after[name]])
            words = "score" if name == SCORE else metric_label(name)
            rows.append([f"win rate by {words}", None, after.get(win_rate_metric(name))])
        return [
            *rows,
            ["KL from SFT (nats/response)", 0.0, after["eval/kl"]],
            ["response length (tokens)", before["eval/length"], after["eval/length"]],
            ["EOS rate", before["eval/eos_rate"], after["eval/eos_rate"]],
            ["repeated 3-grams", before["eval/repetition"], after["eval/repetition"]],
        ]
