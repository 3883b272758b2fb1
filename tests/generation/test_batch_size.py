"""How many rows are decoded at once where the recipe does not say."""

from __future__ import annotations

from transformers import AutoConfig, LlamaConfig

from align.generation.batch_size import decoding_rows, row_bytes
from tests.generation.test_architectures import ARCHITECTURES, PLAIN

LLAMA = LlamaConfig(
    vocab_size=1000, hidden_size=64, intermediate_size=100, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2
)  # fmt: skip


def test_the_bytes_of_a_row():
    # keys and values 2 x 3 layers x 2 heads x 8 numbers of 30 tokens, in 2 bytes; 10 prompt tokens; 5 x 1000 logits in 4 bytes
    assert row_bytes(LLAMA, 10, 20, 2) == 2 * 3 * 2 * 8 * 30 * 2 + 10 * (12 * 64 + 3 * 100) * 2 + 5 * 1000 * 4
    for kind, _, changes in ARCHITECTURES.values():
        settings = {key: value for key, value in (PLAIN | changes).items() if value is not None}
        assert row_bytes(AutoConfig.for_model(kind, **settings), 10, 20, 2) > 5 * 29 * 4


def test_a_gpu_decodes_what_an_eighth_of_its_memory_holds():
    assert decoding_rows(1000, 8 * 100 * 1000, 16) == 100
    assert decoding_rows(1000, 8 * 100 * 1000, 128) == 128
    assert decoding_rows(1000, None, 16) == 16
