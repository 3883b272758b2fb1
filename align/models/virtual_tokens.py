"""Prompt and prefix tuning outside of training: learnt tokens before every row, which cannot be merged into the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

from align.compat import active_adapter_config
from align.errors import UserError
from align.models.load import adapter_settings, load_policy

KINDS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")


def prompt_tuning_base(path: str) -> tuple[str, int] | None:
    """The model that the virtual tokens in `path` were learnt for, and their number; None when `path` holds none.

    Raises:
        UserError: they are of another kind, or not those of a language model.
    """
    settings = adapter_settings(path)
    if settings is None or not settings["num_virtual_tokens"]:
        return None
    kind, task = settings["peft_type"], settings["task_type"]
    if kind not in KINDS or task != "CAUSAL_LM":
        raise UserError(
            f"{path}: expected virtual tokens of kind {' or '.join(KINDS)} and task CAUSAL_LM, got {kind} and {task}."
        )
    return str(settings["base_model_name_or_path"]), int(settings["num_virtual_tokens"])


def load_language_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A language model as `load_policy` gives it; on a folder of virtual tokens, one that has these before every row."""
    found = prompt_tuning_base(path)
    model: nn.Module = load_policy(
        found[0] if found else path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    if found is None:
        return model
    return VirtualTokenModel(PeftModel.from_pretrained(model, path, config=PeftConfig.from_pretrained(path)))


class VirtualTokenModel(nn.Module):
    """A language model whose rows begin with the virtual tokens of its adapter, under any padding and with a cache.

    PEFT's own forward takes no positions, so that on a row with padding before it the virtual tokens would be further
    away from the row than they were in training.
    """

    def __init__(self, adapted: PeftModel):
        super().__init__()
        self.adapted = adapted
        self.model: Any = adapted.get_base_model()
        self.config = self.model.config
        self.length = int(active_adapter_config(adapted).num_virtual_tokens)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any = None,
        **settings: Any,
    ) -> Any:
        """The model's output; logits of virtual tokens are among them unless `logits_to_keep` leaves them out.

        Args:
            input_ids, position_ids: [B, S]; positions count from 0 at a row's first real token.
            attention_mask: [B, past + S], of what is in the cache too, virtual tokens apart.
            past_key_values: a cache; while it is empty, the virtual tokens are put into it.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids}
        positions = position_ids + self.length
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            virtual = self.adapted.get_prompt(batch_size=input_ids.shape[0])
            if isinstance(virtual, Tensor):  # embeddings [B, v, H]
                rows = self.model.get_input_embeddings()(input_ids)
                inputs = {"inputs_embeds": torch.cat([virtual.to(rows.dtype), rows], dim=1)}
                first = torch.arange(self.length, device=positions.device).expand(len(positions), -1)
                positions = torch.cat([first, positions], dim=1)
            else:  # keys and values of every layer
                if past_key_values is None:
                    past_key_values = DynamicCache(config=self.config)
                for index, layer in enumerate(virtual.layers):
                    past_key_values.update(layer.keys, layer.values, index)
        mask = F.pad(attention_mask, (self.length, 0), value=1)
        return self.model(
            **inputs, attention_mask=mask, position_ids=positions, past_key_values=past_key_values, **settings
        )
