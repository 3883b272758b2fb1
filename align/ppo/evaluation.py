"""How the policy does on held-out prompts, against the SFT model's responses to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.rows import Prompt, render_text
from align.engine.distributed import World
from align.engine.torch_engine import Engine
from align.errors import UserError
from align.evaluate.statistics import win_rate
from align.generation.sampler import Sampler
from align.ppo.metrics import response_kl, summary
from align.ppo.rollout import Rollout, collect, gather_rollout, responses_of
from align.ppo.setup import Models
from reward_models.functions import FunctionReward

SAMPLE_COLUMNS = ["prompt", "sft", "response", "score_sft", "score", "kl"]


class Evaluation:
    """Held-out prompts, and what the SFT model answered. Both models get the same noise, prompt by prompt."""

    def __init__(
        self,
        world: World,
        sampler: Sampler,
        models: Models,
        prompts: Sequence[tuple[Prompt, list[int]]],
        truths: Sequence[FunctionReward],
        missing_eos: Callable[[Tensor, Tensor], Tensor],
    ):
        self.world, self.sampler, self.models = world, sampler, models
        self.prompts, self.truths, self.missing_eos = prompts, truths, missing_eos
        self.baseline, self.baseline_truth = self._respond(models.reference)

    def _respond(self, engine: Engine) -> tuple[Rollout, dict[str, Tensor]]:
        """Responses of `engine` to all held-out prompts, on every rank, and their true rewards."""
        count = len(self.prompts)
        share = -(-count // self.world.size)
        start = self.world.rank * share
        indexes = [min(index, count - 1) for index in range(start, start + share)]  # the last rank may repeat a row
        mine = collect(
            self.world, self.sampler, engine, engine, self.models.reference, None, self.models.rewards,
            [self.prompts[index] for index in indexes], "evaluation", indexes, self.missing_eos,
        )  # fmt: skip
        rollout = gather_rollout(mine, self.world, int(self.sampler.tokenizer.pad_token_id))
        rollout = rollout.rows(torch.arange(count, device=self.world.device))
        try:
            given = {truth.name: truth.score(self._responses(rollout)) for truth in self.truths}
            return rollout, {name: own if own.dim() == 1 else own.sum(dim=1) for name, own in given.items()}
        except ValueError as error:  # the message names the function and the row
            raise UserError(f"eval_reward_funcs: {error}") from error

    def _responses(self, rollout: Rollout) -> Any:
        return responses_of(
            self.sampler.tokenizer, [prompt for prompt, _ in self.prompts],
            rollout.prompt_ids, rollout.prompt_mask, rollout.response_ids, rollout.mask,
        )  # fmt: skip

    def run(self) -> tuple[dict[str, float], list[list[Any]]]:
        """Metrics under their documented names, and a sample row per prompt (columns `SAMPLE_COLUMNS`)."""
        rollout, truth = self._respond(self.models.policy)
        kl = response_kl(rollout)
        won = win_rate(rollout.scores.tolist(), self.baseline.scores.tolist())
        error = 1.96 * float(rollout.scores.std()) / len(rollout) ** 0.5 if len(rollout) > 1 else 0.0
        metrics = {
            **summary(rollout, self.models.reward_names, "eval"),
            "eval/score_low": float(rollout.scores.mean()) - error,
            "eval/score_high": float(rollout.scores.mean()) + error,
            "eval/kl": float(kl.mean()),
            "eval/win_rate": won["win_rate"],
            "eval/win_rate_low": won["low"],
            "eval/win_rate_high": won["high"],
        }
        for name, scores in truth.items():
            metrics[f"eval/true/{name}"] = float(scores.nanmean())
            judged = ~(scores + self.baseline_truth[name]).isnan()  # a function may pass on a row
            if judged.any():
                compared = win_rate(scores[judged].tolist(), self.baseline_truth[name][judged].tolist())
                metrics[f"eval/true_win_rate/{name}"] = compared["win_rate"]
        before, after = self._responses(self.baseline).texts, self._responses(rollout).texts
        rows = [
            [
                render_text(prompt.prompt),
                before[i],
                after[i],
                float(self.baseline.scores[i]),
                float(rollout.scores[i]),
                float(kl[i]),
            ]
            for i, (prompt, _) in enumerate(self.prompts)
        ]
        return metrics, rows

    def table(self, metrics: dict[str, float]) -> list[list[Any]]:
        """SFT against PPO: rows of measure, before, after."""
        before = summary(self.baseline, self.models.reward_names, "eval")
        rows: list[list[Any]] = []
        for name, scores in self.baseline_truth.items():
            rows.append([f"true reward ({name})", float(scores.nanmean()), metrics[f"eval/true/{name}"]])
            rows.append([f"win rate by true reward ({name})", None, metrics.get(f"eval/true_win_rate/{name}")])
        rows += [
            ["score (the training reward)", before["eval/score"], metrics["eval/score"]],
            ["win rate by score", None, metrics["eval/win_rate"]],
            ["KL from SFT (nats/response)", 0.0, metrics["eval/kl"]],
            ["response length (tokens)", before["eval/length"], metrics["eval/length"]],
            ["EOS rate", before["eval/eos_rate"], metrics["eval/eos_rate"]],
            ["repeated 3-grams", before["eval/repetition"], metrics["eval/repetition"]],
        ]
        return rows
