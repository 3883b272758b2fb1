"""Warnings about collapse of the policy, from the metrics of each update."""

from __future__ import annotations

from collections.abc import Mapping

from align.config.ppo import PPORecipe
from align.ppo.ppo_run import Progress

MAX_KL = 50.0  # nats per response; in longer responses, 1 nat per token
MIN_EOS_RATE = 0.05  # of the SFT model, for which the self-checks warn
MIN_ENTROPY = 0.05  # nats per token


class CollapseWatch:
    """Warns of each kind of collapse once, with advice.

    Signs that the first update shows are properties of the SFT model, which the self-checks report; they are not reported
    here while they last.

    Args:
        progress: of the run; keeps the state of the watch in checkpoints, so that a resumed run gives the same warnings.
        sft_eos_rates: measurements of the EOS rate of the SFT model, or None; the first that is not None is used, by
            default 1.
    """

    def __init__(self, recipe: PPORecipe, progress: Progress, *sft_eos_rates: float | None):
        self.progress = progress
        if progress.eos_rate is None:
            progress.eos_rate = next((rate for rate in sft_eos_rates if rate is not None), 1.0)
        self.response_length = recipe.response_length
        self.kl_target = recipe.kl_target or 0.0
        self.entropy_bonus = " or entropy_coef" if recipe.objective == "ppo" else ""

    def warnings(self, update: int, metrics: Mapping[str, float]) -> dict[str, str]:
        """New warnings by kind.

        Args:
            update: number of the update, from 1.
        """
        progress, signs = self.progress, self._signs(metrics)
        progress.inherited = [kind for kind in signs if update == 1 or kind in progress.inherited]
        new = [kind for kind in signs if kind not in progress.warned + progress.inherited]
        progress.warned += new
        return {kind: f"update {update}: {signs[kind]}" for kind in new}

    def _signs(self, metrics: Mapping[str, float]) -> dict[str, str]:
        signs = {}
        kl, length, ended = (metrics[name] for name in ("objective/kl", "response/length", "response/eos_rate"))
        bound = max(MAX_KL, length, 2 * self.kl_target)
        if kl > bound:
            signs["kl"] = (
                f"objective/kl is {kl:.3g} nats per response, above {bound:.3g}: the policy has left the SFT model, and the "
                "score means little there. Raise kl_coef, lower learning_rate, or stop at the best checkpoint (max_kl)."
            )
        self.progress.eos_rate = highest = max(self.progress.eos_rate or 0.0, ended)
        if highest >= MIN_EOS_RATE and ended < highest / 2:
            signs["length"] = (
                f"{ended:.1%} of the responses end by themselves, where {highest:.1%} did before; their mean length is "
                f"{length:.4g} of {self.response_length} tokens: the policy no longer stops. Set "
                "missing_eos_penalty, or see whether the reward favors length."
            )
        entropy = metrics.get("objective/entropy")  # absent while only the value model trains
        if entropy is not None and entropy < MIN_ENTROPY:
            signs["entropy"] = (
                f"objective/entropy is {entropy:.2g} nats per token, below {MIN_ENTROPY:g}: the policy has collapsed onto a "
                f"few responses. Raise kl_coef{self.entropy_bonus}, or lower learning_rate."
            )
        return signs
