"""Sequence parallelism in the reward stage: the same run on two processes that share pairs as on one alone."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM

from align.errors import UserError
from align.reward.inputs import check_reward_inputs
from align.reward.train import run
from tests.ranks import run_stage
from tests.reward.test_train import HELD_OUT, recipe
from tests.worlds import assert_same_training, deepspeed_file, letter_tokenizer, save_recipe


@pytest.mark.parametrize(("method", "zero"), [("full", 3), ("lora", None)])
def test_two_processes_do_what_one_does(tmp_path, method, zero):
    """Rows end in either part: scores, losses, accuracies, gradient norms, counts of tokens, weights."""
    common = {"eval_rows": HELD_OUT, "eval_steps": 1, "logging_steps": 1, "adam_epsilon": 1e-3, "method": method,
              "center_rewards_coefficient": 0.1}  # fmt: skip
    alone = recipe(tmp_path, output_dir=str(tmp_path / "alone"), **common)
    split = recipe(tmp_path, output_dir=str(tmp_path / "split"), sequence_parallel_size=2, **common)
    if zero is not None:
        split = dataclasses.replace(split, deepspeed=deepspeed_file(tmp_path / "ds.json", zero))
    run(alone)
    done = run_stage("reward", save_recipe(split, tmp_path / "split.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training(split, alone)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)), "no decoder"),
        (MistralForCausalLM(MistralConfig(vocab_size=29, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32, sliding_window=4)), "sees other tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_split(tmp_path, model, why):
    settings = recipe(tmp_path, model_name_or_path=str(tmp_path / "other"), sequence_parallel_size=2)
    model.save_pretrained(tmp_path / "other")
    letter_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=f"^sequence_parallel_size: .*{why}"):
        check_reward_inputs(settings)
