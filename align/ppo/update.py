"""One update of PPO: passes over a scored rollout, an optimiser step of policy and value model per minibatch."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor

from align.config.ppo import PPORecipe
from align.data.batches import PromptLoader
from align.data.collate import chunks, pad_right
from align.data.tokenize import IGNORE_INDEX
from align.engine.batch_plan import BatchPlan
from align.engine.distributed import World
from align.errors import UserError
from align.generation.sampling import generator
from align.maths.kl import LOSS_ESTIMATORS
from align.maths.losses import loss_weights, policy_loss, token_logprobs, value_loss
from align.models.forward import position_ids, response_loss, response_values
from align.ppo.rollout import Rollout
from align.ppo.setup import Models

# How token losses are weighed in the objective; where nothing is said, every token counts the same.
AGGREGATION = {"grpo": "sequence_mean", "dr_grpo": "constant"}
MOST_SKIPPED = 3  # minibatches in a row with a loss that is not finite, before the run stops
Sums = dict[str, Tensor]  # over this rank's part of a minibatch, scalars


@dataclass(slots=True)
class Updater:
    """What the updates of a run share, and how many minibatches in a row had to be skipped."""

    recipe: PPORecipe
    plan: BatchPlan
    world: World
    models: Models
    ptx: Dataset | None = None  # tokenised rows of `ptx_dataset`
    skipped: int = 0

    def run(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, kl_coef: float, update: int, rates: tuple[float, float]
    ) -> dict[str, float]:  # fmt: skip
        """`num_ppo_epochs` passes over the rollout. Returns metrics: means over the tokens of the minibatches stepped.

        A minibatch whose loss is NaN or infinite is saved under `bad_batches/` and not stepped.

        Args:
            advantages, returns: [B, T].
            kl_coef: of the penalty in the loss.
            rates: learning rates of policy and value model.

        Raises:
            UserError: `MOST_SKIPPED` minibatches in a row were not finite.
        """
        recipe, world, models = self.recipe, self.world, self.models
        totals: dict[str, float] = defaultdict(float)
        first_ratio, steps, bad = None, 0, 0
        count = len(rollout) // recipe.minibatch_size
        for number in range(recipe.num_ppo_epochs * count):
            epoch, place = divmod(number, count)
            order = torch.randperm(len(rollout), generator=generator(recipe.seed, "minibatches", update, epoch))
            minibatch = order.to(world.device)[place * recipe.minibatch_size :][: recipe.minibatch_size]
            weights = loss_weights(
                rollout.mask[minibatch], AGGREGATION.get(recipe.advantage_estimator, "token_mean"), recipe.response_length  # type: ignore[arg-type]
            )  # fmt: skip
            tokens = rollout.mask[minibatch].sum()  # of all ranks, as the weights are
            parts: list[Sums] = []
            # By length, rows that share a microbatch need little padding, and ranks have the same work.
            by_length = (rollout.prompt_mask[minibatch].sum(dim=1) + rollout.lengths[minibatch]).argsort(stable=True)
            mine = by_length[world.rank :: world.size]
            for part in chunks(len(mine), self.plan.micro_batch_size):
                index = minibatch[mine[part]]
                batch = rollout.rows(index)
                width = batch.mask.shape[1]
                numbers = [n[:, :width] for n in (advantages[index], returns[index], weights[mine[part]])]
                parts.append(self._train_on(batch, numbers[0], numbers[1], numbers[2], tokens, kl_coef, update))
            if self.ptx is not None and self._trains_policy(update):
                parts += self._train_on_text(self.ptx, update * recipe.num_ppo_epochs * count + number)
            sums = self._over_ranks(parts)

            if not all(torch.tensor(list(sums.values())).isfinite()):
                bad += 1
                self._skip(rollout, minibatch, advantages, returns, f"update-{update + 1}-minibatch-{number + 1}", sums)
                continue
            self.skipped = 0
            if first_ratio is None and "policy/ratio" in sums:
                first_ratio = sums["policy/ratio"] / sums["tokens"]
            too_far = recipe.max_approx_kl or float("inf")
            if sums.get("policy/approx_kl", 0.0) / sums["tokens"] > too_far:  # the same number on every rank
                models.discard()
                break
            for name, value in sums.items():
                totals[name] += value
            steps += 1
            if self._trains_policy(update):
                with world.clock.phase("update_policy"):
                    totals["policy/grad_norm"] += models.policy.step(rates[0]) * sums["tokens"]
            if models.value is not None:
                with world.clock.phase("update_value"):
                    totals["value/grad_norm"] += models.value.step(rates[1]) * sums["tokens"]

        every = totals.pop("tokens", 1.0)
        ptx = {"ptx/loss": totals.pop("ptx/loss") / totals.pop("ptx/tokens")} if "ptx/loss" in totals else {}
        metrics = {name: total / every for name, total in totals.items()} | ptx
        metrics |= {"policy/steps": steps, "policy/skipped": bad, "policy/learning_rate": rates[0]}
        if models.value is not None:
            metrics["value/learning_rate"] = rates[1]
        if first_ratio is not None:
            metrics["policy/first_ratio"] = first_ratio
        return metrics

    def _trains_policy(self, update: int) -> bool:
        return update >= self.recipe.value_warmup_updates

    def _train_on(
        self, batch: Rollout, advantages: Tensor, returns: Tensor, weights: Tensor, tokens: Tensor, kl_coef: float, update: int
    ) -> Sums:  # fmt: skip
        """Forward and backward of one microbatch of m responses; `advantages`, `returns` and `weights` are [m, T]."""
        recipe, models = self.recipe, self.models
        ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1)  # [m, S]
        mask = torch.cat([batch.prompt_mask, batch.mask], dim=1)
        length = batch.mask.shape[1]
        sums = {"tokens": batch.mask.sum()}

        if self._trains_policy(update):
            with self.world.clock.phase("update_policy"):
                old, reference, advantage, weight = (
                    numbers[batch.mask] for numbers in (batch.old_logprobs, batch.ref_logprobs, advantages, weights)
                )  # [n], as the objective takes them

                def objective(logprobs: Tensor, entropy: Tensor, part: slice) -> Tensor:
                    clipped = policy_loss(logprobs, old[part], advantage[part], recipe.cliprange, recipe.dual_clip)
                    loss = clipped.loss
                    if recipe.entropy_coef > 0:
                        loss = loss - recipe.entropy_coef * entropy
                    if recipe.use_kl_loss:
                        loss = loss + kl_coef * LOSS_ESTIMATORS[recipe.kl_estimator](logprobs, reference[part])
                    return (loss * weight[part]).sum()

                loss, logprobs, entropy = response_loss(models.policy, ids, mask, length, recipe.temperature, objective)
                models.policy.backward(loss)
                policy = policy_loss(logprobs, old, advantage, recipe.cliprange, recipe.dual_clip)
                sums |= {
                    "policy/loss": (policy.loss * weight).sum() * tokens,
                    "policy/ratio": policy.ratio,
                    "policy/clipfrac": policy.clipped,
                    "policy/approx_kl": policy.approx_kl,
                    "objective/entropy": entropy.sum(),
                }
                if recipe.use_kl_loss:
                    sums["policy/kl_loss"] = LOSS_ESTIMATORS[recipe.kl_estimator](logprobs, reference).sum()

        if models.value is not None:
            with self.world.clock.phase("update_value"):
                values = response_values(models.value, ids, mask, length)  # [m, T]
                value = value_loss(values, batch.values, returns, batch.mask, recipe.cliprange_value)
                models.value.backward(value.loss.sum() / tokens)
            sums |= {"value/loss": value.loss.detach().sum(), "value/clipfrac": value.clipped}
        return sums

    def _train_on_text(self, rows: Dataset, step: int) -> list[Sums]:
        """Add the gradient of `ptx_coef` times the mean negative log-likelihood of the step's PPO-ptx rows, all ranks'."""
        recipe, world = self.recipe, self.world
        chosen = rows[PromptLoader(len(rows), recipe.seed).batch(step, recipe.ptx_batch_size)]
        labels = chosen["labels"]
        trained = sum(label != IGNORE_INDEX for row in labels for label in row[1:])  # the first token has no prediction
        sums = []
        mine = range(world.rank, len(labels), world.size)
        for part in chunks(len(mine), self.plan.micro_batch_size):
            ids, mask = pad_right([chosen["input_ids"][i] for i in mine[part]], 0)
            targets, _ = pad_right([labels[i] for i in mine[part]], IGNORE_INDEX)
            ids, mask, targets = (tensor.to(world.device) for tensor in (ids, mask, targets))
            output = self.models.policy(
                input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
            )
            counted = targets[:, 1:] != IGNORE_INDEX
            logprobs = token_logprobs(output.logits[:, :-1], targets[:, 1:].clamp(min=0), 1.0)
            loss = -logprobs.masked_fill(~counted, 0.0).sum()
            self.models.policy.backward(recipe.ptx_coef * loss / trained)
            sums.append({"ptx/loss": loss.detach(), "ptx/tokens": counted.sum()})
        return sums

    def _over_ranks(self, parts: list[Sums]) -> dict[str, float]:
        """The sums of all microbatches on all ranks, in one reduction."""
        names = list(dict.fromkeys(name for part in parts for name in part))
        zero = torch.zeros((), device=self.world.device)
        mine = [torch.stack([part.get(name, zero).double() for part in parts]).sum() for name in names]
        return dict(zip(names, self.world.sum(torch.stack(mine)).tolist(), strict=True))

    def _skip(
        self, rollout: Rollout, minibatch: Tensor, advantages: Tensor, returns: Tensor, name: str, sums: dict[str, float]
    ) -> None:  # fmt: skip
        """Forget a minibatch whose loss is not finite, and save it for a look at it."""
        self.models.discard()
        self.skipped += 1
        file = Path(self.recipe.output_dir) / "bad_batches" / f"{name}.safetensors"
        if self.world.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            kept = rollout.rows(minibatch)
            tensors = {n: getattr(kept, n) for n in ("prompt_ids", "prompt_mask", "response_ids", "mask", "old_logprobs",
                                                     "ref_logprobs", "values", "scores")}  # fmt: skip
            tensors |= {"advantages": advantages[minibatch], "returns": returns[minibatch]}
            save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, file)
        if self.skipped >= MOST_SKIPPED:
            losses = ", ".join(f"{n} {sums[n]}" for n in ("policy/loss", "value/loss", "ptx/loss") if n in sums)
            raise UserError(
                f"{name.replace('-', ' ')}: the loss is not finite ({losses}), and was not in {self.skipped} minibatches in a "
                f"row; they are in {file.parent}. Lower learning_rate, see that scores are of order 1, and run again to "
                "go on from the last checkpoint."
            )
