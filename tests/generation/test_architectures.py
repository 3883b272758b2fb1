"""Decoding of every kind of cache: left-padded prompts of different lengths, and rows that end early.

The truth is transformers' forward pass over one whole row, without padding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.compat.transformers import keeps_exact_cache
from align.data.collate import pad_left
from align.data.end_tokens import set_model_ends
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.responses import respond_to_batch
from align.generation.sampling import uniforms
from align.models.forward import response_logits, response_logprobs
from tests.worlds import letter_tokenizer

EOS = 2
PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 3, 4, 5, 6, 7, 8, 9, 10, 11], [1], [1, 28, 27, 26], [1, 20, 21]]
PLAIN: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": EOS,
}  # fmt: skip
DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 1, "linear_num_value_heads": 2,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
SSD = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 4}
MAMBA2 = {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "chunk_size": 4}
HYBRID = {"mamba_d_state": 4, "mamba_expand": 2, "use_mamba_kernels": False}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Whether each decodes with its cache, and how its configuration differs.
ARCHITECTURES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "Mistral, sliding window": ("mistral", True, {"sliding_window": 4}),
    "Gemma-3": ("gemma3_text", True, {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "Llama-4, chunks": ("llama4_text", True, {"attention_chunk_size": 4, "no_rope_layers": [1, 0], **EXPERTS}),
    "gpt-oss": ("gpt_oss", True, {"sliding_window": 4, **EXPERTS}),
    "GPT-2": ("gpt2", True, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "OPT": ("opt", True, {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BLOOM": ("bloom", True, {"n_layer": 2, "n_head": 2}),
    "MPT": ("mpt", True, {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}),
    "Falcon, ALiBi": ("falcon", True, {"head_dim": None, "alibi": True, "new_decoder_architecture": False}),
    "Mamba": ("mamba", True, {"state_size": 4}),
    "Falcon-Mamba": ("falcon_mamba", True, {"state_size": 4}),
    "Mamba-2": ("mamba2", True, MAMBA2),
    "Mamba-2, clamped": ("mamba2", False, {**MAMBA2, "time_step_limit": (0.9, 1.0)}),
    "Qwen3-Next": ("qwen3_next", True, {**DELTA, "num_experts": 2, "num_experts_per_tok": 1,
                   "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    "Qwen3.5": ("qwen3_5_text", True, DELTA),
    "LFM2": ("lfm2", True, {"layer_types": ["conv", "full_attention"]}),
    "Jamba": ("jamba", True, {**HYBRID, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1,
              "mamba_dt_rank": 4}),
    "Bamba": ("bamba", True, {**SSD, "attn_layer_indices": [1]}),
    "Granite-4-H": ("granitemoehybrid", True, {**SSD, **EXPERTS, "layer_types": ["mamba", "attention"],
                    "shared_intermediate_size": 16}),
    "Falcon-H1": ("falcon_h1", True, {**SSD, "mamba_d_ssm": 32}),
    "TrOCR, which counts padding": ("trocr", False, {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2,
                                    "decoder_ffn_dim": 24}),
    "DeepSeek-V4, compressed keys": ("deepseek_v4", False, {"hidden_size": 32, "num_attention_heads": 4}),
    "GPT-1, without a cache": ("openai-gpt", False, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "RWKV": ("rwkv", False, {"attention_hidden_size": 16, "context_length": 64}),
    "RecurrentGemma": ("recurrent_gemma", False, {"lru_width": 16, "attention_window_size": 6, "num_hidden_layers": 3}),
    "Zamba-2": ("zamba2", False, {**HYBRID, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 8, "chunk_size": 4,
                "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "adapter_rank": 4}),
    "Nemotron-H": ("nemotron_h", False, {"hybrid_override_pattern": "M*-", "num_hidden_layers": 3, "mamba_num_heads": 4,
                   "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 4}),
}  # fmt: skip


def build(architecture: str) -> tuple[torch.nn.Module, bool]:
    kind, cached, changes = ARCHITECTURES[architecture]
    settings = {key: value for key, value in (PLAIN | changes).items() if value is not None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32).eval()
    with torch.no_grad():  # far from uniform, and biases far from 0, so that padding would be felt
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, cached


def forward(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Log-probabilities after each token of one row, without padding and without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampling_knows_what_an_unpadded_forward_pass_gives(architecture):
    model, cached = build(architecture)
    assert keeps_exact_cache(model.config) == cached
    prompt_ids, prompt_mask = pad_left(PROMPTS, 0)
    tokenizer = letter_tokenizer()
    set_model_ends(tokenizer, range(EOS, 9))  # a quarter of all tokens, so that rows end early
    noise = uniforms(5, "test", range(6), 8)
    responses, mask, logprobs = generate(model, prompt_ids, prompt_mask, noise, 1.0, Ending(tokenizer), batch_size=4)
    lengths = set(mask.sum(1).tolist())
    assert len(lengths) > 2, "rows end at different lengths"
    ids, real = torch.cat([prompt_ids, responses], 1), torch.cat([prompt_mask, mask], 1)
    trained = response_logprobs(model, ids, real, responses.shape[1], 1.0)
    evaluated = response_logits(model, ids, real, responses.shape[1]).log_softmax(-1)
    for row, prompt in enumerate(PROMPTS):
        said = responses[row, mask[row]].tolist()
        distributions = forward(model, prompt + said)[len(prompt) - 1 : -1]
        torch.testing.assert_close(evaluated[row, mask[row]], distributions, atol=1e-5, rtol=0)
        expected = distributions.gather(1, torch.tensor(said)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[row, mask[row]], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(trained[row, mask[row]], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Gemma-3", "Mamba", "Qwen3.5", "RWKV", "RecurrentGemma"])
def test_greedy_responses_are_those_of_transformers(architecture):
    """One prompt at a time there, all in a batch here; any of several tokens ends a response in both."""
    model, _ = build(architecture)
    tokenizer = letter_tokenizer()
    set_model_ends(tokenizer, range(EOS, 9))
    said = respond_to_batch(model, tokenizer, PROMPTS, torch.zeros(6, 8), 0.0)
    for prompt, response in zip(PROMPTS, said, strict=True):
        ids = torch.tensor([prompt])
        # RecurrentGemma keeps its state in its layers, from where it leaks into the next prompt if that is one token long.
        settings = {"use_cache": architecture != "RecurrentGemma", "max_new_tokens": 8, "do_sample": False}
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=[*range(EOS, 9)], **settings)
        assert plain[0, len(prompt) :].tolist() == response
    assert len({len(response) for response in said}) > 1
