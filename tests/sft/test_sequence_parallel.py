"""Sequence parallelism in SFT: the same run on processes that share rows as on one alone."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    T5Config,
)

from align.cli.check.memory import activations_line
from align.config.ppo import PPORecipe
from align.config.sequence_parallel import check_sequence_parallel_rules
from align.engine.batch_plan import batch_plan
from align.errors import UserError
from align.models.split_sequences import check_heads, check_splits
from align.sft.inputs import check_kind_of_model
from align.sft.train import run
from tests.ranks import run_stage, stop_after_checkpoint
from tests.sft.letter_rows import recipe
from tests.worlds import (
    assert_same_training,
    deepspeed_file,
    letter_tokenizer,
    save_recipe,
    tiny_llama,
    trained,
)

# Rows of 4, 9, 6, 3, 9, 4, 4 and 3 tokens: batches of odd and of even lengths, with labels in both parts or in one.
HELD_OUT = [("ab", "ba"), ("c", "defghij"), ("klm", "n")]
CASES = {  # keys, ZeRO stage, ranks
    "two groups": ({"label_smoothing_factor": 0.1}, 2, 4),
    "packed": (
        {
            "packing": True,
            "max_length": 15,
            "train_batch_size": 2,
            "per_device_train_batch_size": 1,
            "loss_normalization": "example_mean",
            "gradient_checkpointing": True,
            "eval_metrics": ["exact_match"],
        },
        None,
        2,
    ),
    "lora": (
        {
            "method": "lora",
            "padding_free": True,
            "train_sampling_strategy": "group_by_length",
        },
        3,
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_rows_do_what_one_does(tmp_path, case):
    """Losses of training and evaluation, gradient norms, counts of tokens, weights."""
    changes, zero, ranks = CASES[case]
    if case == "lora":  # both processes of the group need the one head of keys and values
        torch.manual_seed(0)
        config = LlamaConfig(**{**tiny_llama().config.to_dict(), "num_key_value_heads": 1})
        LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
        letter_tokenizer().save_pretrained(tmp_path / "base")
    common = {"eval_rows": HELD_OUT, "eval_steps": 1, "adam_epsilon": 1e-3, "logging_steps": 1, **changes}
    alone = recipe(tmp_path, output_dir=str(tmp_path / "alone"), **common)
    split = recipe(tmp_path, output_dir=str(tmp_path / "split"), sequence_parallel_size=2, **common)
    if zero is not None:
        split = dataclasses.replace(split, deepspeed=deepspeed_file(tmp_path / "ds.json", zero))
    run(alone)
    done = run_stage("sft", save_recipe(split, tmp_path / "split.yaml"), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(groups of 2 processes x micro-batch x accumulation)" in done.stderr
    assert_same_training(split, alone)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_whole_rows(tmp_path):
    common = {
        "max_steps": 8,
        "save_steps": 2,
        "adam_epsilon": 1e-3,
        "deepspeed": deepspeed_file(tmp_path / "ds.json", 2),
    }
    alone = recipe(tmp_path, output_dir=str(tmp_path / "alone"), **{**common, "deepspeed": None})
    run(alone)
    split = recipe(tmp_path, output_dir=str(tmp_path / "split"), sequence_parallel_size=2, **common)
    path = save_recipe(split, tmp_path / "split.yaml")
    stop_after_checkpoint("sft", path, Path(split.output_dir), ranks=2)
    assert not (tmp_path / "split" / "stage.json").exists()
    done = run_stage("sft", path, "--sequence_parallel_size", "1", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = trained(alone)
    for name, weight in trained(split).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)


class TestWhatCannotBeSplit:
    @pytest.mark.parametrize(
        ("config", "why"),
        [
            (MistralConfig(sliding_window=4), "sees other tokens"),
            (MambaConfig(), "sees other tokens"),
            (Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "sees other tokens"),
            (Gemma2Config(), "softcap"),
            (BloomConfig(), "AttentionInterface"),
        ],
    )
    def test_by_architecture(self, config, why):
        with pytest.raises(UserError, match=rf"^sequence_parallel_size: .* type {config.model_type} .*{why}.*leave"):
            check_splits(config, 2)

    @pytest.mark.parametrize(
        "config", [LlamaConfig(), MistralConfig(sliding_window=None), GPT2Config(), OPTConfig(), DeepseekV3Config()]
    )
    def test_others_can(self, config):
        """Rotary and learned positions, keys wider than values."""
        check_splits(config, 2)

    @pytest.mark.parametrize(
        ("changes", "config", "why"),
        [
            ({}, T5Config(), "the model is an encoder-decoder"),
            ({}, MixtralConfig(), "a loss of its router"),
            ({"sequence_parallel_size": 3}, LlamaConfig(), "32 attention heads.*use 2 or 4 or 8 or 16 or 32"),
        ],
    )
    def test_by_kind_of_model(self, tmp_path, changes, config, why):
        settings = recipe(tmp_path, **{"sequence_parallel_size": 2, **changes})
        with pytest.raises(UserError, match=rf"^sequence_parallel_size: .*{why}"):
            check_kind_of_model(settings, config)

    def test_heads_of_keys_may_be_fewer_than_processes(self):
        check_heads(8, 2, 4)
        with pytest.raises(
            UserError, match=r"12 attention heads, 3 of keys and values, which 2 .* use 3 or 6 or 12, or"
        ):
            check_heads(12, 3, 2)

    @pytest.mark.parametrize(
        "changes", [{"attn_implementation": "eager"}, {"method": "prompt"}, {"neftune_noise_alpha": 5.0}]
    )
    def test_by_keys(self, tmp_path, changes):
        for size in (1, 2):
            settings = recipe(tmp_path, sequence_parallel_size=size, **changes)
            refused = pytest.raises(UserError, match=f"^{next(iter(changes))}: .*sequence_parallel_size: 2")
            with refused if size == 2 else contextlib.nullcontext():
                check_sequence_parallel_rules(settings, str)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("objective", "path_consistency", "ppo"),
            ("value_method", "shared", "full or lora"),
            ("max_tokens_per_device", 4096, "to be left out"),
        ],
    )
    def test_by_keys_of_ppo(self, name, value, expected):
        settings = PPORecipe(output_dir="out", sft_model_path="m", sequence_parallel_size=2, **{name: value})
        with pytest.raises(UserError, match=f"^{name}: expected {expected} with sequence_parallel_size: 2, got"):
            check_sequence_parallel_rules(settings, str)

    def test_by_processes(self, tmp_path):
        settings = recipe(tmp_path, sequence_parallel_size=2, train_batch_size=6)
        with pytest.raises(UserError, match=r"^sequence_parallel_size: .* divides the 3 processes, got 2"):
            batch_plan(settings, 3)
        plan = batch_plan(settings, 4)
        assert (plan.world_size, plan.processes, plan.micro_batch_size, plan.accumulation) == (2, 4, 3, 1)
        with pytest.raises(UserError, match=r"^train_batch_size: .* 4 groups of processes, got 6"):
            batch_plan(settings, 8)


def test_check_divides_the_activations(tmp_path):
    lines = [activations_line(LlamaConfig(), 1, 2048, recipe(tmp_path, sequence_parallel_size=n), True) for n in (1, 4)]
    sizes = [float(line.split("roughly ")[1].split()[0]) for line in lines]
    assert sizes[1] == pytest.approx(sizes[0] / 4, rel=0.01)
    assert lines[1].endswith("split over 4 processes (sequence_parallel_size)")
