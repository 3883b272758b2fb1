"""How the policy does on held-out prompts, against the SFT model's responses to the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.data.rows import render_text
from align.engine.distributed import rows_of_rank
from align.engine.engine import Engine
from align.engine.faults import during
from align.engine.user_functions import user_function
from align.errors import UserError
from align.evaluate.statistics import win_rate
from align.generation.responses import decode_responses
from align.generation.sampler import PromptBatch
from align.ppo.metrics import response_kl, response_metrics
from align.ppo.outputs import save_model
from align.ppo.ppo_run import PPORun, TokenizedPrompt
from align.ppo.rollout import Rollout, gather_rollout, sample_responses, score_responses
from align.runs.tracker import Tracker
from reward_models.responses import Responses

SAMPLE_COLUMNS = ["prompt", "sft", "response", "score_sft", "score", "kl"]
MOST_RESPONSES = 500  # of the last evaluation that are kept, for the report


class Evaluation:
    """Held-out prompts with the SFT model's responses. Both models get the same noise, prompt by prompt.

    Attributes:
        true_rewards: `eval_reward_funcs`, which are measured and not trained on.
        metrics, samples: of the last evaluation; empty before the first.
        measures: more of each sample, by column: lengths in tokens and true rewards, of the SFT model and of the policy.
    """

    def __init__(self, run: PPORun, prompts: Sequence[TokenizedPrompt]):
        self.run = run
        self.prompts, self.ids = [prompt for prompt, _ in prompts], [ids for _, ids in prompts]
        self.metrics: dict[str, float] = {}
        self.samples: list[list[Any]] = []
        self.measures: dict[str, list[float | None]] = {}
        if self.prompts:
            names, timeout = run.recipe.eval_reward_funcs, run.recipe.reward_timeout
            self.true_rewards = [user_function(name, "eval_reward_funcs", timeout) for name in names]
            self.baseline, self.baseline_truth = self._respond(run.models.reference)

    def is_due(self, done: int) -> bool:
        """Whether to evaluate after `done` updates: every `eval_steps`, and after the last; never without prompts."""
        every = self.run.recipe.eval_steps
        return bool(self.prompts) and (done == self.run.updates or (every is not None and done % every == 0))

    def track(self, tracker: Tracker, step: int) -> None:
        """Measure the policy after `step` updates, log it, and save it in `best/` if no evaluation before was better."""
        run, progress = self.run, self.run.progress
        self.metrics, self.samples = self.measure()
        tracker.log(step, self.metrics)
        tracker.table(step, "samples", SAMPLE_COLUMNS, self.samples[: run.recipe.num_sample_rows])
        if step == run.updates:
            columns = [*SAMPLE_COLUMNS, *self.measures]
            rows = [[*sample, *more] for sample, *more in zip(self.samples, *self.measures.values(), strict=True)]
            tracker.table(step, "responses", columns, rows[:MOST_RESPONSES])
        within = run.recipe.max_kl is None or self.metrics["eval/kl"] <= run.recipe.max_kl
        if within and (progress.best is None or self.metrics["eval/score"] > progress.best["eval/score"]):
            progress.best = {"update": step, **self.metrics}
            save_model(run, run.models.policy, Path(run.recipe.output_dir) / "best")

    @during("evaluation")
    def measure(self) -> tuple[dict[str, float], list[list[Any]]]:
        """Metrics under their documented names, and a sample row per prompt (columns `SAMPLE_COLUMNS`)."""
        rollout, truth = self._respond(self.run.models.policy)
        kl = response_kl(rollout)
        won = win_rate(rollout.scores.tolist(), self.baseline.scores.tolist())
        error = 1.96 * float(rollout.scores.std()) / len(rollout) ** 0.5 if len(rollout) > 1 else 0.0
        metrics = {
            **response_metrics(rollout, self.run.models.reward_names, "eval"),
            "eval/score_low": float(rollout.scores.mean()) - error,
            "eval/score_high": float(rollout.scores.mean()) + error,
            "eval/kl": float(kl.mean()),
            "eval/win_rate": won["win_rate"],
            "eval/win_rate_low": won["low"],
            "eval/win_rate_high": won["high"],
        }
        for name, scores in truth.items():
            metrics[f"eval/true/{name}"] = float(scores.nanmean())
            judged = ~(scores + self.baseline_truth[name]).isnan()  # a function may return None for a row
            if judged.any():
                compared = win_rate(scores[judged].tolist(), self.baseline_truth[name][judged].tolist())
                metrics[f"eval/true_win_rate/{name}"] = compared["win_rate"]
        both = ((self.baseline, self.baseline_truth, "_sft"), (rollout, truth, ""))
        self.measures = {f"length{whose}": responses.lengths.tolist() for responses, _, whose in both}
        for name in truth:
            for _, judged_by, whose in both:
                values = judged_by[name].tolist()
                self.measures[f"true/{name}{whose}"] = [None if math.isnan(value) else value for value in values]
        before, after = self._decoded(self.baseline).texts, self._decoded(rollout).texts
        numbers = zip(self.baseline.scores.tolist(), rollout.scores.tolist(), kl.tolist(), strict=True)
        prompts = [render_text(prompt.prompt) for prompt in self.prompts]
        return metrics, [[*texts, *row] for *texts, row in zip(prompts, before, after, numbers, strict=True)]

    def _respond(self, engine: Engine) -> tuple[Rollout, dict[str, Tensor]]:
        """Responses of `engine` to all held-out prompts, on every rank, and their true rewards [B] by function."""
        count, world = len(self.prompts), self.run.world
        # The reference only runs forward, which is all that is asked of a policy here.
        models = replace(self.run.models, policy=engine, value=None)  # type: ignore[arg-type]
        run = replace(self.run, models=models)
        mine = rows_of_rank(world, count)
        batch = PromptBatch([self.prompts[i] for i in mine], [self.ids[i] for i in mine], "evaluation", mine)
        scored = score_responses(run, sample_responses(run, batch))
        rollout = gather_rollout(scored, world, run.sampler.pad_token_id)
        rollout = rollout.rows(torch.arange(count, device=world.device))
        try:
            given = {function.name: function.score(self._decoded(rollout)) for function in self.true_rewards}
        except ValueError as error:  # the message names the function and the row
            raise UserError(f"eval_reward_funcs: {error}") from error
        return rollout, {name: own if own.dim() == 1 else own.sum(dim=1) for name, own in given.items()}

    def _decoded(self, rollout: Rollout) -> Responses:
        return decode_responses(self.run.sampler.tokenizer, self.prompts, rollout)

    def results(self) -> dict[str, Any]:
        """Closing numbers: the last metrics, a table of SFT against the policy, and three samples."""
        if not self.metrics:
            return {"table": []}
        samples = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in self.samples[:3]]
        return {**self.metrics, "table": self.table(), "samples": samples}

    def table(self) -> list[list[Any]]:
        """SFT against the policy as last measured: rows of measure, before, after."""
        before = response_metrics(self.baseline, self.run.models.reward_names, "eval")
        after, rows = self.metrics, []
        for name, scores in self.baseline_truth.items():
            rows.append([f"true reward ({name})", float(scores.nanmean()), after[f"eval/true/{name}"]])
            rows.append([f"win rate by true reward ({name})", None, after.get(f"eval/true_win_rate/{name}")])
        return [
            *rows,
            ["score (the training reward)", before["eval/score"], after["eval/score"]],
            ["win rate by score", None, after["eval/win_rate"]],
            ["KL from SFT (nats/response)", 0.0, after["eval/kl"]],
            ["response length (tokens)", before["eval/length"], after["eval/length"]],
            ["EOS rate", before["eval/eos_rate"], after["eval/eos_rate"]],
            ["repeated 3-grams", before["eval/repetition"], after["eval/repetition"]],
        ]
