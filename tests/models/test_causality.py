"""Models that read later tokens are refused from their configuration."""

from __future__ import annotations

import pytest
from transformers import (
    BertConfig,
    CpmAntConfig,
    FalconConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    XLNetConfig,
)

from align.errors import UserError
from align.models.causality import check_causal
from align.models.load import load_config


@pytest.mark.parametrize("config", [BertConfig(), Gemma3TextConfig(use_bidirectional_attention=True)])
def test_one_that_reads_later_tokens(config):
    with pytest.raises(
        UserError, match=f"sft_model_path: m: a model of type {config.model_type} with this config.json reads"
    ):
        check_causal(config, "sft_model_path", "m")


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(is_decoder=True),
        Gemma3TextConfig(),
        LlamaConfig(),
        MixtralConfig(),
        FalconConfig(alibi=True),
        MambaConfig(),
        ModernBertDecoderConfig(),
    ],
)
def test_a_causal_one(config):
    check_causal(config, "sft_model_path", "m")


@pytest.mark.parametrize("config", [XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16), CpmAntConfig()])
def test_one_of_a_type_that_no_stage_supports(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"reward_model_path: .*: no stage supports models of type {config.model_type}"
    ):
        load_config(str(tmp_path), "reward_model_path")
