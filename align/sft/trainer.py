"""TRL's SFTTrainer with the objective of an optimiser step named and exact, however rows are cut up, packed or spread.

token_mean      sum over label tokens of -log p, divided by their number
example_mean    mean over examples of the mean over each example's own label tokens

Both are over the whole batch of an optimiser step: all microbatches of all ranks. A packed row holds several
examples, told apart by its position ids, which start again at 0 with each.

An evaluation measures the rows of `align/sft/evaluation.py`, and the responses of `align/sft/responses.py`; all that it found
is one log entry, from which, and from those before it, the best checkpoint follows.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import TrainerCallback
from trl import SFTTrainer

from align.compat import (
    FUSED_HEAD_ARGUMENT,
    active_adapter_config,
    fused_head_on_label_tokens,
    pending_metrics,
)
from align.data.tokenize import IGNORE_INDEX
from align.runs.tracker import Tracker
from align.sft import responses as eval_responses
from align.sft.best_checkpoint import BoundedPatience, better, keeps
from align.sft.evaluation import PART, Measured, PartCollator, measures, part_sums
from align.sft.fused_head import FUSED, token_scores
from align.sft.responses import Questions
from align.trainer.hf_trainer import ExactEvaluation, evaluations


class DemonstrationTrainer(ExactEvaluation, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose loss is one of the above, and whose evaluation is a mean over tokens.

    Args:
        example_mean: which of the two objectives it trains.
        measured: what an evaluation measures; `eval_dataset` has its rows, padded to whole batches.
        questions: what it has the model answer.
        tracker: gets the table of answers.
        max_forgetting: percent by which the retention loss of the best checkpoint may be above that at the start.
    """

    data_collator: Any

    def __init__(
        self,
        *args: Any,
        example_mean: bool,
        measured: Measured | None = None,
        questions: Questions | None = None,
        tracker: Tracker,
        max_forgetting: float | None = None,
        **kwargs: Any,
    ):
        self.example_mean = example_mean
        self.parts = measured.parts if measured else []
        self.sums_shape = (len(self.parts), 4)
        self.questions, self.tracker, self.max_forgetting = questions, tracker, max_forgetting
        super().__init__(*args, **kwargs)
        self.data_collator = PartCollator(self.data_collator)
        if not FUSED:
            self.compute_loss_func = self._loss_of_logits
            self.num_virtual_tokens = 0  # TRL need not take theirs off the logits again

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        part = inputs.pop(PART, None)
        # Nothing predicts a first token, but for virtual tokens before it: those would be asked for one token more.
        inputs["labels"][:, 0] = IGNORE_INDEX
        batch = dict(inputs)  # Trainer takes the labels out before it calls a function for the loss

        def weighed(scores: Any) -> Any:
            if not self.model.training:
                values = (-scores.log_probs, scores.is_top1, scores.label_mask, scores.entropy)
                self.sums += part_sums(batch, part, len(self.parts), *values)
            elif self.example_mean:
                shares = token_shares(batch)
                virtual = scores.log_probs.shape[1] - shares.shape[1]
                scores.log_probs = scores.log_probs * F.pad(shares, (virtual, 0))
            return scores

        def measured(**arguments: Any) -> Any:
            output = model(**arguments)
            if FUSED_HEAD_ARGUMENT in arguments:
                return weighed(output)
            output.logits = output.logits[:, -batch["labels"].shape[1] :]  # for label smoothing, without virtual tokens
            return output

        self._weighed = weighed
        if not FUSED:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with fused_head_on_label_tokens():
            return super().compute_loss(measured, inputs, return_outputs, num_items_in_batch)

    def _loss_of_logits(self, output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        """The loss as TRL makes it from the fused head, on Python 3.10, whose last TRL (1.14) has none."""
        output.logits = output.logits[:, -labels.shape[1] :]  # those of virtual tokens come first
        scores = self._weighed(token_scores(output.logits, labels))
        if self.label_smoother is not None:
            return self.label_smoother(output, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
        count = scores.label_mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = -scores.log_probs.sum() / count.clamp(min=1)
        if self.aux_loss_enabled and self.model.training:
            # A mean over microbatches and ranks, though Trainer takes what it is given for a share of a sum.
            shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss + self.router_aux_loss_coef * output.aux_loss / shares
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            model = self.accelerator.unwrap_model(self.model)
            # Before the first step virtual tokens are noise: without them it is the model that may forget.
            if (
                self.state.global_step == 0
                and isinstance(model, PeftModel)
                and active_adapter_config(model).is_prompt_learning
            ):
                stack.enter_context(model.disable_adapter())
            return super().evaluate(*args, **kwargs)

    def measure(self, logs: dict[str, float]) -> None:
        start = [entry["eval_retention_loss"] for entry in evaluations(self) if "eval_retention_loss" in entry]
        logs |= measures(self.accelerator.reduce(self.sums, "sum"), self.parts, start[0] if start else None)
        pending_metrics(self, "eval").clear()  # TRL's means of batches
        if self.questions is not None:
            with self.compute_loss_context_manager():
                responses = eval_responses.respond(self.model, self.questions)
            logs |= {f"eval_{name}": value for name, value in eval_responses.judge(self.questions, responses).items()}
            rows = eval_responses.table(self.questions, responses)
            self.tracker.table(self.state.global_step, "samples", eval_responses.RESPONSE_COLUMNS, rows)

    def patience(self, evaluations: int) -> TrainerCallback:
        if self.max_forgetting is None:
            return super().patience(evaluations)
        return BoundedPatience(evaluations, max_forgetting=self.max_forgetting)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if (bound := self.max_forgetting) is None:
            return bool(super()._determine_best_metric(metrics, trial))
        metric = f"eval_{self.args.metric_for_best_model.removeprefix('eval_')}"
        trained = [entry for entry in evaluations(self) if entry["step"] > 0]  # checkpoints carry the log
        best = min(trained, key=lambda entry: better(entry, metric, self.args.greater_is_better, bound))
        self.state.best_global_step = int(best["step"])
        if keeps(best, bound):  # what early stopping compares with
            self.state.best_metric = best[metric]
        return int(best["step"]) == int(self.state.global_step)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        if not self.example_mean:
            return super()._get_num_items_in_batch(batch_samples, device)
        count = torch.stack(
            [token_shares(batch).sum() for batch in batch_samples]
        ).sum()  # an example's shares sum to 1
        return self.accelerator.reduce(count.to(device), "sum")


def token_shares(batch: dict[str, Tensor]) -> Tensor:
    """1 / |y| at each of the |y| label tokens of an example, [m, S - 1] float32 for predicted tokens; 0 elsewhere.

    Args:
        batch: `labels` [m, S], -100 where nothing is learnt; `position_ids` [m, S] in rows of several examples.
    """
    counted = batch["labels"][:, 1:] != IGNORE_INDEX
    if "position_ids" in batch:
        examples = (batch["position_ids"][:, 1:] == 0).long().cumsum(dim=1)
    else:
        examples = torch.zeros_like(counted, dtype=torch.long)
    sizes = torch.zeros(counted.shape[0], int(examples.max()) + 1, device=counted.device)
    sizes.scatter_add_(1, examples, counted.float())
    return counted / sizes.gather(1, examples).clamp(min=1)
