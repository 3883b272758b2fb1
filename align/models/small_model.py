"""A small random model of a given architecture: its configuration with every size reduced and its switches kept.

What an architecture does with positions, masks, padding and states shows on a hundred thousand weights as on billions,
and takes a few milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from align.compat.transformers import has_causal_lm
from align.models.forward_settings import NEUTRAL
from align.models.model_types import is_encoder_decoder

WIDTH, HEADS, HEAD_DIM = 64, 4, 16
POSITIONS = 1024
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
# Sizes by their names in transformers' configurations, and what they become.
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_dim", "lru_width", "dim"), WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "shared_intermediate_size", "n_inner"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 2 * WIDTH),
    **dict.fromkeys(("mamba_d_ssm", "dff"), 2 * WIDTH),
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "block_ff_dim", "hidden_dim", "d_ff"), 2 * WIDTH),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2 * WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("linear_num_heads", "num_query_groups"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys((*EXPERTS_PER_TOKEN, "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "n_groups", "num_expert_group", "linear_num_key_heads"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "d_kv"), HEAD_DIM),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD_DIM),
    **dict.fromkeys(("query_pre_attn_scalar", "kv_channels", "hidden_size_per_layer_input"), HEAD_DIM),
    **dict.fromkeys(
        ("state_size", "mamba_d_state", "mamba_d_head", "mamba_headdim", "mamba_dt_rank", "time_step_rank"), HEAD_DIM
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "block_multiple_of"), HEAD_DIM),
    "qk_head_dim": 2 * HEAD_DIM,
    "rotary_dim": HEAD_DIM // 2,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"), 4),
    **dict.fromkeys(LIMITS, POSITIONS),
    "num_nextn_predict_layers": 0,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks",
                "num_decoder_layers", "encoder_layers", "decoder_layers")  # fmt: skip
SPREAD = 0.1  # of the weights, so that distributions are far from uniform
MAX_PARAMETERS = 50_000_000


def small_config(
    config: PretrainedConfig, vocab_size: int, positions: int = POSITIONS, every_layer: bool = False
) -> PretrainedConfig:
    """The configuration with small sizes and special ids in the vocabulary.

    Args:
        every_layer: keep as many layers as it has, rather than one of each kind, but at least two.
    """
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
    changed |= dict.fromkeys(changed.keys() & LIMITS, positions)
    changed |= {name: 1 for name in EXPERTS_PER_TOKEN if given.get(name) == 1}
    changed |= {name: 2 * WIDTH // HEAD_DIM for name in ("mamba_n_heads", "n_mamba_heads") if name in given}
    if "kv_channels" in given and given["kv_channels"] * config.num_attention_heads != config.hidden_size:
        changed["kv_channels"] = 2 * HEAD_DIM  # heads that are wider than their share of the width, as JetMoE's
    if isinstance(wide := given.get("attention_hidden_size"), int):  # Zamba's is twice its width
        changed["attention_hidden_size"] = WIDTH * wide // config.hidden_size
        changed |= (
            {"attention_head_dim": changed["attention_hidden_size"] // HEADS} if "attention_head_dim" in given else {}
        )
    kept, by_layer = _kept_layers(given, every_layer)
    changed |= {name: len(kept) for name in LAYER_COUNTS if name in given and not every_layer}
    changed |= {name: [_small(name, value[index]) for index in kept] for name, value in by_layer.items()}
    if given.get("num_kv_shared_layers") and not every_layer:
        changed["num_kv_shared_layers"] = len(kept) // 2
    if "hybrid_layer_ids" in given:
        changed["hybrid_layer_ids"] = [new for new, old in enumerate(kept) if old in given["hybrid_layer_ids"]]
    if overrides := given.get("per_layer_config"):
        named = {int(index): value for index, value in overrides.items()}
        changed["per_layer_config"] = {
            new: {name: _small(name, size) for name, size in named[old].items()}
            for new, old in enumerate(kept)
            if old in named
        }
    changed |= {
        name: _small_rope(given[name], given) for name in ("rope_parameters", "rope_scaling") if given.get(name)
    }
    changed |= {name: value for name, value in NEUTRAL.items() if name in given}
    changed |= {name: SPREAD for name in ("initializer_range", "init_std") if name in given}
    changed |= {
        name: _small_ids(value, vocab_size)
        for name, value in given.items()
        if name.endswith(("_token_id", "_token_ids"))
    }
    changed |= {
        name: vocab_size for name in ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input") if name in given
    }
    small: PretrainedConfig = type(config).from_dict({**given, **changed, "dtype": "float32"})
    return small


def _kept_layers(given: dict[str, Any], every_layer: bool) -> tuple[list[int], dict[str, list[Any]]]:
    """The layers that the small model has, at least two, and the settings that are lists of one entry per layer."""
    layers = next((given[name] for name in LAYER_COUNTS if isinstance(given.get(name), int)), 0)
    by_layer = {name: value for name, value in given.items() if isinstance(value, list) and len(value) == layers}
    if every_layer:
        return list(range(layers)), by_layer
    kinds = {str(kind): index for index, kind in reversed(list(enumerate(zip(*by_layer.values(), strict=True))))}
    kept = sorted(kinds.values()) or [0, 0]
    shares = given.get("num_kv_shared_layers") or "hybrid" in (given.get("layers_block_type") or [])
    if len(kept) == 1 or shares:
        kept = kept * 2  # layers that share keys and values, or weights, come after those that have them
    kept += kept[:1] * (len(given.get("block_types") or []) - len(kept))  # RecurrentGemma repeats this list
    return kept, by_layer


def _small(name: str, value: Any) -> Any:
    """A setting of one layer."""
    return min(SIZES[name], value) if name in SIZES and type(value) is int else value


def _small_ids(value: Any, vocab_size: int) -> Any:
    """A special id, or a list of them, below the size of the vocabulary."""
    if isinstance(value, list):
        return [_small_ids(each, vocab_size) for each in value]
    return min(value, vocab_size - 1) if isinstance(value, int) else value


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
    config: PretrainedConfig,
    vocab_size: int,
    *,
    seed: int = 0,
    positions: int = POSITIONS,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """A random language model of the architecture, in float32 and evaluation mode. The caller's generator is left alone.

    Args:
        config: of a model of any size; of the language model in it, if it also sees or hears.
        positions: that it has, where its configuration sets a limit.
        settings: for `from_config`, such as `attn_implementation`.

    Raises:
        Exception: whatever transformers raises for a configuration that cannot be reduced.
    """
    text = config.get_text_config()
    small = small_config(text if has_causal_lm(text) else config, vocab_size, positions)
    settings["trust_remote_code"] = trust_remote_code
    auto: Any = AutoModelForSeq2SeqLM if is_encoder_decoder(small) else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(weight.numel() for weight in auto.from_config(small, **settings).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"a small model of this type has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(small, **settings)
    model.eval()
    return model
