"""The loss that the sft stage trains on, by its own trainer: TRL's fused head and collators included."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from align.compat.trl import router_settings
from align.data.tokenize import IGNORE_INDEX
from align.sft.fused_head import fused_head_is_exact
from align.sft.trainer import DemonstrationTrainer


@torch.no_grad()
def sft_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    packs: bool,
) -> list[float]:
    """Mean loss of the response tokens, nats: of padded rows, and of packed ones if the model `packs`.

    Without the loss of a router, which depends on the batch.

    Args:
        model: on the CPU; TRL changes its forward pass.
    """
    rows: list[dict[str, Any]] = [
        {"input_ids": prompt + response, "labels": [IGNORE_INDEX] * len(prompt) + response}
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for packed in (False, True)[: 1 + packs]:
            trainer = DemonstrationTrainer(
                example_mean=False,
                fused_head=fused_head_is_exact(model.config),
                tracker=None,
                model=model,
                args=SFTConfig(
                    folder, dataset_kwargs={"skip_prepare_dataset": True}, loss_type="nll", max_length=None,
                    padding_free=packed, use_cpu=True, report_to="none", **router_settings(model.config, has_router_loss=False),
                ),
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )  # fmt: skip
            trainer.model.train()
            losses.append(float(trainer.compute_loss(trainer.model, trainer.data_collator(rows))))
    return losses
