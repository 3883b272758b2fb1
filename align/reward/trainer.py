"""TRL's RewardTrainer without a loss from padding rows, and with one for ties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from align.compat.trl import pending_metrics
from align.engine.sequence_parallel import ULYSSES, SequenceGroup
from align.trainer.hf_trainer import ExactEvaluation
from reward_models.heads import hf_model, score_head


class PairCollator(DataCollatorForPreference):
    """TRL's batches, with `tie` [pairs] where the rows have it."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        ties = {"tie": torch.tensor([row["tie"] for row in examples])} if "tie" in examples[0] else {}
        return batch | ties


class PairTrainer(ExactEvaluation, RewardTrainer):
    """RewardTrainer in which padding rows (chosen and rejected are the same ids) add nothing to loss or metrics.

    The loss of a tie is -1/2 ln sigmoid(d) - 1/2 ln sigmoid(-d), d = chosen - rejected: TRL's -ln sigmoid(d), and d / 2.
    """

    accuracy = "accuracy"
    sums_shape = (
        4,
    )  # loss, correct, pairs, and those of them that are no ties; once for each process that shares them

    def __init__(self, *args: Any, sequence: SequenceGroup | None = None, **kwargs: Any):
        self.sequence = sequence
        super().__init__(*args, **kwargs)
        if sequence is not None:
            hf_model(self.model).set_attn_implementation(ULYSSES)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        margin = inputs.get("margin", 0.0)  # [pairs], of rows that have one
        tie = inputs.pop("tie", None)  # [pairs], 1 where neither is better
        differences: list[Tensor] = []
        mask = inputs["attention_mask"]  # [2 x pairs, S]
        if self.sequence is not None:
            inputs = {**inputs, "attention_mask": self.sequence.part(mask, 0)}  # TRL counts tokens by it

        def scored(**batch: Any) -> Any:
            arguments = {name: value for name, value in batch.items() if name != "margin"}
            output = model(**arguments) if self.sequence is None else self._split(model, arguments, mask)
            chosen_ids, rejected_ids = batch["input_ids"].chunk(2)
            real = (chosen_ids != rejected_ids).any(dim=1)  # [pairs]
            output.logits = output.logits.float() * real.repeat(2)[:, None]  # so the centering term is 0 as well
            chosen, rejected = output.logits.squeeze(-1).chunk(2)
            differences.append(chosen - rejected)
            if not self.model.training:
                correct = (chosen > rejected) + 0.5 * (chosen == rejected)
                loss = -logsigmoid(chosen - rejected - margin)
                decided = real
                if tie is not None:
                    loss, decided = loss + tie * (chosen - rejected) / 2, real & (tie == 0)
                self.sums += torch.stack([loss[real].sum(), correct[decided].sum(), real.sum(), decided.sum()])
            return output

        found = super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if tie is None:
            return found
        more = (tie * differences[0]).mean() / 2
        return (found[0] + more, found[1]) if return_outputs else found + more

    def _split(self, model: Any, arguments: dict[str, Any], mask: Tensor) -> Any:
        """The model's output on whole rows, from this process's part of them: the score of each row's last token."""
        sequence = self.sequence
        assert sequence is not None
        last = mask.sum(dim=1) - 1

        def scores_everywhere(module: Any, args: Any, output: Tensor) -> Tensor:
            return sequence.at(output.squeeze(-1), last)[:, None, None].expand(output.shape)

        own = sequence.inputs(arguments["input_ids"], None)
        hook = score_head(self.model)[1].register_forward_hook(scores_everywhere)
        try:
            return model(**own, use_cache=False)
        finally:
            hook.remove()

    def add_exact_metrics(self, logs: dict[str, float]) -> None:
        """The loss of all pairs, and the accuracy of those that are no ties."""
        loss, correct, pairs, decided = self.accelerator.reduce(self.sums, "sum").tolist()
        logs["eval_loss"] = loss / pairs
        pending_metrics(self, "eval")[self.accuracy] = [correct / decided if decided else 0.5]
