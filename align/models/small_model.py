"""A small random model of a given architecture: its configuration with every size reduced and its switches kept.

What an architecture does with positions, masks, padding and states shows on a hundred thousand weights as on billions,
and takes a few milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from align.compat.transformers import has_causal_lm
from align.models.forward_settings import NEUTRAL

WIDTH, HEADS, HEAD_DIM = 64, 4, 16
# Sizes by their names in transformers' configurations, and what they become.
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "attention_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "shared_intermediate_size", "n_inner"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "block_ff_dim"), 2 * WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group", "n_groups", "linear_num_key_heads"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), HEAD_DIM),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar"), HEAD_DIM),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_d_head", "mamba_dt_rank", "time_step_rank"), HEAD_DIM),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "block_multiple_of"), HEAD_DIM),
    "qk_head_dim": 2 * HEAD_DIM,
    "rotary_dim": HEAD_DIM // 2,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 1024),
    "num_nextn_predict_layers": 0,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SPREAD = 0.1  # of the weights, so that distributions are far from uniform
MOST_PARAMETERS = 50_000_000


def small_config(config: PretrainedConfig, vocab_size: int) -> PretrainedConfig:
    """The configuration with small sizes, one layer of each kind but at least two, and no special ids."""
    given = config.to_dict()
    changed: dict[str, Any] = {
        name: size for name, size in SIZES.items() if isinstance(given.get(name), int) and given[name] > 0
    }
    heads = getattr(config, "num_attention_heads", None)
    for name in KEY_VALUE_HEADS:
        if isinstance(given.get(name), int):
            changed[name] = HEADS if given[name] == heads else min(given[name], 2)
    if "num_attention_heads" not in given and "num_heads" in given:
        changed["num_heads"] = 2 * WIDTH // HEAD_DIM  # Mamba-2's, which share the expanded width
    if "mamba_n_heads" in given:
        changed["mamba_n_heads"] = 2 * WIDTH // HEAD_DIM
    layers = next((given[name] for name in LAYER_COUNTS if isinstance(given.get(name), int)), 0)
    by_layer = {name: value for name, value in given.items() if isinstance(value, list) and len(value) == layers}
    kinds = {str(kind): index for index, kind in reversed(list(enumerate(zip(*by_layer.values(), strict=True))))}
    kept = sorted(kinds.values()) or [0, 0]
    kept = kept * 2 if len(kept) == 1 else kept
    kept += kept[:1] * (len(given.get("block_types") or []) - len(kept))  # RecurrentGemma repeats this list
    changed |= {name: len(kept) for name in LAYER_COUNTS if name in given}
    changed |= {name: [value[index] for index in kept] for name, value in by_layer.items()}
    changed |= {
        name: _small_rope(given[name], given) for name in ("rope_parameters", "rope_scaling") if given.get(name)
    }
    changed |= {name: value for name, value in NEUTRAL.items() if name in given}
    if "initializer_range" in given:
        changed["initializer_range"] = SPREAD
    changed |= {"vocab_size": vocab_size, "dtype": "float32", "pad_token_id": None}
    small: PretrainedConfig = type(config).from_dict({**given, **changed, "bos_token_id": None, "eos_token_id": None})
    return small


def _small_rope(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings of rotary embeddings, or of several by kind of layer, with lists of as many entries as small heads have."""
    share = settings.get("partial_rotary_factor", given.get("partial_rotary_factor") or 1.0)
    count = int(HEAD_DIM * share) // 2
    sized = {name: settings[name][:count] for name in ("short_factor", "long_factor") if settings.get(name)}
    if settings.get("mrope_section"):
        sized["mrope_section"] = [count - 2 * (count // 3), count // 3, count // 3]
    inner = {name: _small_rope(value, given) for name, value in settings.items() if isinstance(value, dict)}
    return {**settings, **sized, **inner}


def small_model(
    config: PretrainedConfig, vocab_size: int, *, seed: int = 0, trust_remote_code: bool = False, **settings: Any
) -> PreTrainedModel:
    """A random language model of the architecture, in float32 and evaluation mode. The caller's generator is left alone.

    Args:
        config: of a model of any size; of the language model in it, if it also sees or hears.
        settings: for `from_config`, such as `attn_implementation`.

    Raises:
        Exception: whatever transformers raises for a configuration that cannot be reduced.
    """
    text = config.get_text_config()
    small = small_config(text if has_causal_lm(text) else config, vocab_size)
    settings["trust_remote_code"] = trust_remote_code
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(small, **settings).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"a small model of this type has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small, **settings)
    model.eval()
    return model
