"""Inference with prompt and prefix tuning: learned tokens before every row, which cannot be merged into the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from align.compat.peft import active_adapter_config
from align.compat.transformers import keeps_state
from align.data.collate import pad_left
from align.errors import UserError, reason
from align.models.forward import position_ids
from align.models.load import adapter_settings, language_model_class, load_config, load_policy
from align.models.model_types import is_encoder_decoder
from align.models.packing import TOLERANCE, VOCABULARY, example_rows
from align.models.small_model import small_model

PROMPT_LEARNING_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")


def prompt_tuning_base(path: str) -> tuple[str, int] | None:
    """The base model of the virtual tokens in `path`, and their number; None if `path` holds no virtual tokens.

    Raises:
        UserError: an adapter type or task that is not supported.
    """
    settings = adapter_settings(path)
    if settings is None or not settings["num_virtual_tokens"]:
        return None
    adapter_type, task = settings["peft_type"], settings["task_type"]
    if adapter_type not in PROMPT_LEARNING_TYPES or task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise UserError(
            f"{path}: expected virtual tokens of type {' or '.join(PROMPT_LEARNING_TYPES)} and task CAUSAL_LM or SEQ_2_SEQ_LM, "
            f"got {adapter_type} and {task}."
        )
    return str(settings["base_model_name_or_path"]), int(settings["num_virtual_tokens"])


def check_takes_virtual_tokens(
    config: PretrainedConfig, method: str, where: str, trust_remote_code: bool = False
) -> None:
    """Check that a model's layers attend to virtual tokens in front of a row; tried on a small model of its configuration.

    Args:
        method: "prompt" or "prefix".

    Raises:
        UserError: some are recurrent, or PEFT's virtual tokens do not fit its layers; it begins with `where`.
    """
    if keeps_state(config):
        raise UserError(
            f"{where} ({config.model_type}): virtual tokens need a model of attention layers alone that takes positions, "
            "without a recurrent state; use method: lora."
        )
    try:
        model = small_model(config, VOCABULARY, trust_remote_code=trust_remote_code)
    except Exception:  # an architecture without a small model, as in `check_causal`
        return
    try:
        gap = _virtual_token_gap(model, method)
    except Exception as error:  # whatever PEFT or the model raises for them
        why = f"cannot be put in front of its rows: {reason(error)}"
    else:
        if gap <= TOLERANCE:
            return
        why = f"give log-probabilities that are off by up to {gap:.2g} nats"
    raise UserError(
        f"{where} ({config.model_type}): PEFT's virtual tokens {why} (tried on a small random model); use method: lora."
    )


def _virtual_token_gap(model: PreTrainedModel, method: str) -> float:
    """Largest difference in any log-probability of a row between PEFT's forward pass, which trains, and the one below, nats."""
    kind = PrefixTuningConfig if method == "prefix" else PromptTuningConfig
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
        assert isinstance(adapted, PeftModel)
        rows = example_rows((12, 7), VOCABULARY)
        ids, mask = pad_left(rows, 0)
        ours = VirtualTokenModel(adapted)(ids, mask.long(), position_ids(mask), use_cache=False).logits
        trained = [adapted(input_ids=torch.tensor([row])).logits[0, -len(row) :] for row in rows]
        pairs = [(found[-len(row) :], alone) for row, found, alone in zip(rows, ours, trained, strict=True)]
    return max(float((a.log_softmax(dim=-1) - b.log_softmax(dim=-1)).abs().max()) for a, b in pairs)


def load_language_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> nn.Module:
    """`load_policy`, or for a folder of virtual tokens, their base model with them before each row."""
    found = prompt_tuning_base(path)
    config = load_config(found[0] if found else path, "models", trust_remote_code, encoder_decoder=True)
    model: nn.Module = load_policy(
        found[0] if found else path,
        auto=language_model_class(config),
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        device=device,
    )
    if found is None:
        return model
    adapted = PeftModel.from_pretrained(model, path, config=PeftConfig.from_pretrained(path))
    return adapted if is_encoder_decoder(config) else VirtualTokenModel(adapted)


class VirtualTokenModel(nn.Module):
    """A language model whose rows begin with the virtual tokens of its adapter, with any padding and with a cache.

    They come right before a row's first real token, after the padding on its left: a sliding window counts columns, and
    in training there are none between them and the row.
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
        """The model's output; its logits include those of the virtual tokens, unless `logits_to_keep` excludes them.

        Args:
            input_ids, position_ids: [B, S]; positions count from 0 at a row's first real token.
            attention_mask: [B, past + S], the cached tokens included, the virtual tokens not.
            past_key_values: a cache; if it is empty, the virtual tokens are added to it first.
        """
        first = attention_mask.long().argmax(dim=1)[:, None]  # [B, 1], columns of padding on the left
        columns = torch.arange(attention_mask.shape[1] + self.length, device=first.device)
        virtual = (columns >= first) & (columns < first + self.length)  # [B, length + past + S]
        mask = self._insert(attention_mask, virtual, 1)
        positions = position_ids + self.length
        inputs: dict[str, Any] = {"input_ids": input_ids}
        kept: Any = contextlib.nullcontext()
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            prompt = self.adapted.get_prompt(batch_size=len(input_ids))
            places = torch.arange(self.length, device=first.device).expand(len(input_ids), -1)
            positions = self._insert(positions, virtual, places)
            if isinstance(prompt, Tensor):  # embeddings [B, v, H]
                rows = self.model.get_input_embeddings()(input_ids)
                inputs = {"inputs_embeds": self._insert(rows, virtual, prompt.to(rows.dtype))}
            else:  # keys and values of every layer: tokens of any id, whose own keys and values they replace
                inputs = {"input_ids": self._insert(input_ids, virtual, 0)}
                if past_key_values is None:
                    past_key_values = DynamicCache(config=self.config)
                kept = _keys_and_values_at(past_key_values, virtual, prompt)
        with kept:
            return self.model(
                **inputs, attention_mask=mask, position_ids=positions, past_key_values=past_key_values, **settings
            )

    def _insert(self, rows: Tensor, virtual: Tensor, content: Any) -> Tensor:
        """Rows [B, S, ...] with `content` at the columns `virtual` [B, length + S]."""
        longer = rows.new_zeros(len(rows), rows.shape[1] + self.length, *rows.shape[2:])
        longer[~virtual] = rows.flatten(0, 1)
        longer[virtual] = content.flatten(0, 1).to(rows.dtype) if isinstance(content, Tensor) else content
        return longer


@contextlib.contextmanager
def _keys_and_values_at(cache: Any, virtual: Tensor, prompt: Any) -> Iterator[None]:
    """While rows of every layer are added to a cache, those at the columns `virtual` [B, S] are the ones in `prompt`."""
    update = cache.update
    number = virtual.cumsum(dim=1)  # counts the virtual tokens of a row

    def with_prompt(keys: Tensor, values: Tensor, layer: int, *rest: Any, **settings: Any) -> Any:
        replaced = []
        for states, given in ((keys, prompt.layers[layer].keys), (values, prompt.layers[layer].values)):
            longer = states.transpose(1, 2).clone()  # [B, S, heads, size]
            # PEFT keeps as many as fit into a sliding window: the last ones.
            places = virtual & (number > number[:, -1:] - given.shape[2])
            longer[places] = given.transpose(1, 2).flatten(0, 1).to(states.dtype)
            replaced.append(longer.transpose(1, 2))
        return update(*replaced, layer, *rest, **settings)

    cache.update = with_prompt
    try:
        yield
    finally:
        del cache.update
