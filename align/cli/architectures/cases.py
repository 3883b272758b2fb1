"""The architectures of the matrix, each as a small random model with a byte-level tokenizer, and models of the user's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from align.compat.transformers import causal_lm_types, seq2seq_lm_types
from align.config.paths import expand
from align.errors import UserError, nearest, reason
from align.models.from_scratch import SPECIAL_TOKENS, train_tokenizer
from align.models.inspect_folder import inspect_folder
from align.models.model_types import is_encoder_decoder
from align.models.small_model import POSITIONS, small_model

ATTENTION = "full_attention"
# Model types of transformers, with the settings that differ from the defaults of their configurations.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "qwen3_5_text": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {},
    "opt": {},
    "bloom": {},
    "falcon": {"alibi": True},
    "mpt": {},
    "olmo2": {},
    "olmo3": {},
    "cohere2": {},
    "granite": {},
    "granitemoehybrid": {"layer_types": ["linear_attention", ATTENTION], "num_hidden_layers": 2},
    "mixtral": {},
    "gpt_oss": {},
    "mamba": {},
    "mamba2": {},
    "falcon_mamba": {},
    "rwkv": {},
    "recurrent_gemma": {},
    "jamba": {},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", ATTENTION], "num_hidden_layers": 2},
    "deepseek_v3": {},
    "t5": {},
    "bart": {},
    "plbart": {},
}
TOKENS = 256 + len(SPECIAL_TOKENS)
VOCABULARY = TOKENS + 5  # padded, as is usual
END_TOKENS = range(3, 27)  # of a random model, so that some of its responses end early


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One row of the matrix: a model type, or the folder of a model."""

    name: str
    folder: str | None = None


def make_cases(names: Sequence[str] | None, folder: str | None) -> list[Case]:
    """The architectures named, all of the matrix if the list is empty and none if it is None, and the model in `folder`.

    Raises:
        UserError: transformers has no causal language model of a name, or there is no model in the folder.
    """
    for name in names or ():
        known = {*causal_lm_types(), *seq2seq_lm_types()}
        if name not in known:
            raise UserError(
                f"--architectures: transformers has no language model of type {name!r}{nearest(name, known)}; the types are those of `model_type` in config.json."
            )
    chosen = [] if names is None else list(dict.fromkeys(names)) or list(ARCHITECTURES)
    cases = [Case(name) for name in chosen]
    if folder is not None:
        folder = expand(folder, "--model")
        if inspect_folder(folder, "--model") is None:
            raise UserError(f"--model: {folder}: expected the folder of a model; download it first.")
        cases.append(Case(Path(folder).name or folder, folder))
    return cases


def write_small_model(name: str, folder: Path, positions: int = POSITIONS, **settings: Any) -> None:
    """Write a small random model of a type, and a byte-level tokenizer, as a user's folder.

    Args:
        positions: that it has, where its configuration sets a limit.
        settings: of its configuration, in place of those of ARCHITECTURES.

    Raises:
        UserError: no small model of this type can be made.
    """
    try:
        config = AutoConfig.for_model(name, **(settings or ARCHITECTURES.get(name, {})))
        model = small_model(config, VOCABULARY, positions=positions)
    except Exception as error:  # whatever transformers raises for a configuration
        raise UserError(f"{name}: no small model of this type can be made. {reason(error)}") from error
    pad, bos, eos = range(len(SPECIAL_TOKENS))
    ids = {"pad_token_id": pad, "bos_token_id": bos}
    pairs = is_encoder_decoder(model.config)
    ids |= {"decoder_start_token_id": eos if name == "bart" else pad} if pairs else {}
    model.config.update({**ids, "eos_token_id": eos})
    model.generation_config = GenerationConfig(**ids, eos_token_id=[eos, *END_TOKENS])
    model.save_pretrained(folder)
    train_tokenizer([], TOKENS, pairs=pairs).save_pretrained(folder)


def random_prompts(vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of random ids, the same for a vocabulary of one size."""
    generator = torch.Generator().manual_seed(1)
    first = min(len(SPECIAL_TOKENS), vocabulary - 1)
    return [torch.randint(first, vocabulary, (length,), generator=generator).tolist() for length in lengths]
