"""What the trainers of demonstrations share: the evaluation, and the choice of the best checkpoint by it.

An evaluation covers the rows of `align/sft/evaluation.py` and the responses of `align/sft/responses.py`, and becomes one
log entry; the best checkpoint is chosen by these entries.
"""

from __future__ import annotations

import contextlib
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from align.compat.peft import active_adapter_config
from align.compat.trl import pending_metrics
from align.runs.tracker import Tracker
from align.sft.best_checkpoint import BoundedEarlyStopping, rank_key, within_bound
from align.sft.evaluation import EvalRows, metrics_from_sums
from align.sft.responses import RESPONSE_COLUMNS, ResponseEvaluation
from align.trainer.callback import check_best
from align.trainer.hf_trainer import ExactEvaluation, evaluation_logs


class DemonstrationEvaluation(ExactEvaluation):
    """A mixin whose trainer adds to `sums`, [groups, 4], what `group_sums` gives for each evaluation batch.

    Args:
        evaluation: the rows to evaluate on; `eval_dataset` must hold them, padded to full batches.
        responses: the responses to evaluate, if any.
        tracker: logs the table of responses; needed where there are any.
        max_forgetting: most percent by which the retention loss of the best checkpoint may exceed the initial one.
    """

    def __init__(
        self,
        *args: Any,
        evaluation: EvalRows | None = None,
        responses: ResponseEvaluation | None = None,
        tracker: Tracker | None,
        max_forgetting: float | None = None,
        **kwargs: Any,
    ):
        self.groups = evaluation.groups if evaluation else []
        self.sums_shape = (len(self.groups), 4)
        self.responses, self.tracker, self.max_forgetting = responses, tracker, max_forgetting
        super().__init__(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with contextlib.ExitStack() as stack:
            model = self.accelerator.unwrap_model(self.model)
            # Before the first step virtual tokens are noise; forgetting is relative to the model without them.
            if (
                self.state.global_step == 0
                and isinstance(model, PeftModel)
                and active_adapter_config(model).is_prompt_learning
            ):
                stack.enter_context(model.disable_adapter())
            return super().evaluate(*args, **kwargs)

    def add_exact_metrics(self, logs: dict[str, float]) -> None:
        retention = [entry["eval_retention_loss"] for entry in evaluation_logs(self) if "eval_retention_loss" in entry]
        sums = self.accelerator.reduce(self.sums, "sum")
        logs |= metrics_from_sums(sums, self.groups, initial_retention_loss=retention[0] if retention else None)
        pending_metrics(self, "eval").clear()  # TRL's means of batches
        if self.responses is not None:
            with self.compute_loss_context_manager():
                texts = self.responses.generate(self.model)
            logs |= {f"eval_{name}": value for name, value in self.responses.score(texts).items()}
            check_best(self.args, logs)  # before anything is recorded
            assert self.tracker is not None
            self.tracker.table(self.state.global_step, "samples", RESPONSE_COLUMNS, self.responses.table(texts))

    def early_stopping_callback(self, patience: int) -> TrainerCallback:
        if self.max_forgetting is None:
            return super().early_stopping_callback(patience)
        return BoundedEarlyStopping(patience, max_forgetting=self.max_forgetting)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if (bound := self.max_forgetting) is None:
            return bool(super()._determine_best_metric(metrics, trial))
        metric = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        trained = [entry for entry in evaluation_logs(self) if entry["step"] > 0]
        best = min(trained, key=lambda entry: rank_key(entry, metric, bool(self.args.greater_is_better), bound))
        self.state.best_global_step = int(best["step"])
        if within_bound(best, bound):  # early stopping compares with it
            self.state.best_metric = best[metric]
        return int(best["step"]) == int(self.state.global_step)
