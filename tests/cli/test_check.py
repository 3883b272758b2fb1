"""`align check`: what it promises, what it refuses, and its arithmetic of memory."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
)

from align.__main__ import main
from align.cli.check import check
from align.cli.check.engine_memory import Bytes, Layout, engine_bytes
from align.cli.check.memory import (
    Footprint,
    activation_bytes,
    count_parameters,
    count_trained,
    decoding_line,
    load_line,
    moment_bytes,
    skeleton,
)
from align.config.load import load_recipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.runs.launch import run_recipe
from tests.worlds import letter_tokenizer, save_tiny_policy, tiny_llama, unfinished, write_jsonl

# --- arithmetic


@pytest.mark.parametrize(
    ("zero_stage", "float32", "bfloat16"),
    [  # weights, gradients, those in the step, the optimizer's, and what passes: two buckets (from ZeRO 3 one) and weights
        (1, 4 + 4 + 1 + 3 + 8 / 8, 2 + 4 + 1 + 3 + 4 + 8 / 8),
        (2, 4 + 3 + 8 / 8 + 4, 2 + 1 + 1 + 3 + 4 / 8),
        (3, 1 + 1 + 3 + 4 / 8 + 4 + 4 / 8, 0.5 + 1 + 3 + 2 / 8 + 2 + 2 / 8),
    ],
)
def test_bytes_of_a_parameter_that_trains_on_four_gpus(zero_stage, float32, bfloat16):
    """With buckets of an eighth of the weights. At ZeRO 3 gathered weights take more than the gradients in the step, and pass before."""
    layout = Layout(zero_stage, 4, reduced=1024**2 / 8 * (1 if zero_stage == 3 else 2), prefetch=1024**2 / 8)
    assert engine_bytes(1024**2, 1024**2, layout, bf16=False).gpu_peak == 1024**2 * float32
    assert engine_bytes(1024**2, 1024**2, layout, bf16=True).gpu_peak == 1024**2 * bfloat16


def test_bytes_without_zero():
    assert engine_bytes(1000, 1000, Layout(), bf16=False) == Bytes(16000)
    assert engine_bytes(1000, 1000, Layout(), bf16=True) == Bytes(18000)
    assert engine_bytes(1000, 100, Layout(), bf16=True) == Bytes(2000 + 100 * 16)
    # DeepSpeed: gradients in a row; in bfloat16 (2 + 6 + 4 + 12 + 4)
    assert engine_bytes(1000, 1000, Layout(0, 4), bf16=False) == Bytes(16000, passing=4000)
    assert engine_bytes(1000, 1000, Layout(0, 4), bf16=True) == Bytes(20000, passing=8000)


def test_bytes_of_frozen_models():
    found = [engine_bytes(1000, 0, Layout(stage, 4, prefetch=10), bf16=False) for stage in range(4)]
    whole, quarter = Bytes(4000), Bytes(1000, passing=4040)
    assert found == [whole, whole, whole, quarter], "all gathered for a pass, by tens"
    assert engine_bytes(1000, 0, Layout(3, 4, live=100, prefetch=10), bf16=True) == Bytes(500, passing=220)
    assert engine_bytes(1000, 0, Layout(3, 1), bf16=True) == Bytes(2000), "one process gathers nothing"


def test_bytes_of_what_is_offloaded(tmp_path):
    """The files of recipes/deepspeed: weights, gradients and all of the optimizer are on the host; what is gathered, and buckets, are not."""
    path = Path(__file__).parents[2] / "recipes" / "deepspeed" / "zero3_offload.json"
    layout = Layout.from_file(str(path), 4, hidden_size=16)
    found = engine_bytes(1024, 1024, layout, bf16=False)
    assert found == Bytes(host=1024 * (1 + 1 + 3 + 1), passing=256 * 4 + 4 * (1024 + 230))
    assert engine_bytes(1024, 0, replace(layout, processes=1), bf16=False) == Bytes(host=4096, passing=4 * (1024 + 230))
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}}))
    assert Layout.from_file(str(tmp_path / "own.json"), 4, 16).reduced == 1e9, "DeepSpeed's default, twice"
    assert Layout.from_file(None, 1, 16).stage is None


def test_lines_on_decoding_and_loading():
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=8, vocab_size=11, intermediate_size=128,
        dtype="bfloat16",
    )  # fmt: skip
    # In float32: keys and values 2 x 8 layers x 2 heads x 16 of 64 tokens; 12 x 64 + 3 x 128 of 32 prompt tokens; 5 x 11.
    row = 4 * (2 * 8 * 2 * 16 * 64 + 32 * (12 * 64 + 3 * 128) + 5 * 11)
    assert f"{32 * row / 2**20:.1f} MiB for 32 rows at once" in decoding_line(config, 32, 32, 32, bf16=False)
    assert f"1/8 of the GPU's memory, for as many rows of {row / 2**20:.1f} MiB" in decoding_line(
        config, None, 32, 32, bf16=False
    )
    models = [Footprint("policy", 2**20, 2**20), Footprint("reward", 3 * 2**20, 0)]
    assert "up to 6.0 MiB a machine" in load_line(models, config), "the largest, in the precision of its file"


@pytest.mark.parametrize(
    ("optim", "arguments", "moments"),
    [
        ("adamw_torch_fused", {}, 8),
        ("sgd", {}, 0),
        ("sgd", {"momentum": 0.9}, 4),
        ("adagrad", {}, 4),
        ("rmsprop", {}, 4),
        ("rmsprop", {"momentum": 0.9, "centered": True}, 12),
        ("adafactor", {}, 0),
        ("adamw_8bit", {}, 2),
    ],
)
def test_bytes_of_other_optimizers(optim, arguments, moments):
    assert moment_bytes(optim, arguments) == moments
    assert engine_bytes(1000, 1000, Layout(), bf16=False, moments=moments).gpu == 8000 + 1000 * moments


def test_what_passes_is_counted_once():
    """Models take turns: a sum has what stays of all, and the most that passes of one."""
    assert Bytes(5, 1, 3) + Bytes(7, 2, 4) == Bytes(12, 3, 4)
    assert (Bytes(5, 1, 3) + Bytes(7, 2, 4)).gpu_peak == 16


def test_bytes_of_activations():
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=3, vocab_size=11)
    # 2 sequences of 5 tokens: 10 x (17 values x 3 layers x 8 x 4 bytes), and logits 11 x (4 + 4 + 4)
    assert activation_bytes(config, 2, 5, bf16=False, checkpointing=False, vocabulary=False) == 10 * 1632
    assert activation_bytes(config, 2, 5, bf16=False, checkpointing=False, vocabulary=True) == 10 * (1632 + 132)
    # checkpointed: (3 + 17) x 8 x 2 bytes, and logits 11 x (2 + 4 + 4)
    assert activation_bytes(config, 2, 5, bf16=True, checkpointing=True, vocabulary=True) == 10 * (320 + 110)


def test_parameters_are_counted_without_storage():
    config = tiny_llama().config
    bare = skeleton(AutoModelForCausalLM, config)
    assert {parameter.device.type for parameter in bare.parameters()} == {"meta"}
    assert count_parameters(bare) == sum(parameter.numel() for parameter in tiny_llama().parameters())
    tied = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=10)
    # embeddings (20 + 10) x 8, one block 12 x 64 + 13 x 8, final norm 16; the head is the embedding
    assert count_parameters(skeleton(AutoModelForCausalLM, tied)) == 240 + 872 + 16
    one = count_parameters(skeleton(AutoModelForSequenceClassification, config, num_labels=1))
    assert one == count_parameters(bare) - 29 * 32 + 32
    assert getattr(config, "num_labels", 2) == 2  # the caller's configuration is left alone


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # rank x (in + out): four attention layers 8 + 8, three MLP layers 8 + 16, twice; not the head
        ({"method": "lora", "lora_r": 4}, 4 * 2 * (4 * 16 + 3 * 24)),
        ({"method": "lora", "lora_r": 4, "lora_target_modules": ["q_proj"]}, 4 * 2 * 16),
        ({"method": "dora", "lora_r": 4, "lora_target_modules": ["q_proj"]}, 4 * 2 * 16 + 2 * 8),
        ({"method": "head"}, 11 * 8),
        ({"method": "freeze", "freeze_layers": 1}, 4 * 64 + 3 * 128 + 2 * 8 + 8 + 11 * 8),
        ({"method": "freeze", "trainable_pattern": r"layers\.1\..*q_proj"}, 64),
        ({"method": "prompt", "num_virtual_tokens": 5}, 5 * 8),
        ({"method": "prefix", "num_virtual_tokens": 5}, 5 * 2 * 2 * 8),  # a key and a value in each layer
        ({"method": "full"}, 2 * (4 * 64 + 3 * 128 + 16) + 8 + 2 * 11 * 8),
    ],
)  # fmt: skip
def test_what_trains_is_counted(method, expected):
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=11)
    model = skeleton(AutoModelForCausalLM, config)
    recipe = SFTRecipe(output_dir="out", **method)
    assert count_trained(model, recipe, "CAUSAL_LM", model.lm_head)[1] == expected


def test_a_new_head_is_trained_beside_an_adapter():
    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=11)
    scorer = skeleton(AutoModelForSequenceClassification, config, num_labels=1)
    recipe = RewardRecipe(output_dir="out", model_name_or_path="m", method="lora", lora_r=4)
    assert count_trained(scorer, recipe, "SEQ_CLS", scorer.score, ["score"])[1] == 4 * 2 * (4 * 16 + 3 * 24) + 8


# --- a recipe, a folder

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a tiny model, rows and four recipes from a model trained from scratch to PPO."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a wrong path is not looked up for long
    save_tiny_policy(tmp_path / "model")
    names = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    write_jsonl(tmp_path / "r/demos.jsonl", [{"prompt": name, "completion": name[::-1]} for name in names])
    write_jsonl(tmp_path / "r/pairs.jsonl", [{"prompt": name, "chosen": "x" + name, "rejected": "y"} for name in names])
    (tmp_path / "r/truth_of_check.py").write_text(
        "def truth(prompts, completions, **rest): return [1.0] * len(prompts)\n", encoding="utf-8"
    )
    size = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    common = {"eval_fraction": 0.2, "max_length": 40}
    write_recipe(
        "r/0_base.yaml",
        stage="sft",
        output_dir="out/0",
        train_dataset="demos.jsonl",
        model_config=size,
        tokenizer_vocab_size=260,
        **common,
    )
    write_recipe(
        "r/1_sft.yaml",
        stage="sft",
        output_dir="out/1",
        train_dataset="demos.jsonl",
        model_name_or_path="out/0",
        **common,
    )
    write_recipe(
        "r/2_reward.yaml",
        stage="reward",
        output_dir="out/2",
        train_dataset="pairs.jsonl",
        model_name_or_path="out/1",
        eval_reward_funcs="truth_of_check:truth",
        **common,
    )
    write_recipe(
        "r/3_ppo.yaml",
        stage="ppo",
        output_dir="out/3",
        train_dataset="demos.jsonl",
        eval_fraction=0.2,
        sft_model_path="out/1",
        reward_model_path="out/2",
        max_prompt_length=20,
        response_length=20,
        total_episodes=128,
    )
    return tmp_path


def write_recipe(path: str, **keys) -> None:
    Path(path).write_text(yaml.safe_dump(keys), encoding="utf-8")


def outcome(capsys, path: str, *overrides: str, num_gpus: int | None = 1) -> tuple[int, str]:
    code = check.run(path, num_gpus, overrides)
    return code, capsys.readouterr().out


def test_a_folder_whose_models_are_not_made_yet(world, capsys):
    code, said = outcome(capsys, "r", num_gpus=2)
    assert code == 0, said
    assert "error" not in said
    assert said.rstrip().endswith("it would run")
    # 51 of the 64 prompts train; two processes of two micro-batches of 8 rows
    assert "32 sequences per step = 2 x 8 x 2 (processes x micro-batch x accumulation)" in said
    assert (
        "64 sequences per step = 2 x 8 x 4 (processes x micro-batch x accumulation), 2 updates of 2 x 32 responses (processes x responses)"
        in said
    )
    assert "model_name_or_path: out/0 (made by 0_base.yaml)" in said
    assert "reward_model_path: out/2 (made by 2_reward.yaml)" in said
    assert "eval_reward_funcs: truth_of_check:truth" in said
    assert "| reference" in said
    assert not (world / "out").exists()  # nothing was written


def test_a_reward_model_yet_to_be_trained_on_the_policys_weights(world, capsys):
    """Adapters of rank 2 on the seven linear layers of the one block, and the head, which PEFT keeps twice."""
    words = ["--method", "lora", "--lora_r", "2"]
    code, said = outcome(capsys, "r", *words)
    assert code == 0, said
    assert "its adapter and head score on the policy's frozen weights" in said
    adapters = 2 * sum(map(sum, [(16, 16)] * 4 + [(16, 32)] * 3))
    assert f"|reward|{adapters + 2 * 16:,}|" in said.replace(" ", "").split("3_ppo.yaml")[-1]
    write_recipe("r/2_reward.yaml", stage="reward", output_dir="out/2", train_dataset="pairs.jsonl", model_name_or_path="out/0",
                 eval_fraction=0.2)  # fmt: skip
    said = outcome(capsys, "r", *words)[1]
    assert "it has weights of its own, although it has an adapter, since it was not trained from sft_model_path" in said


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "row: ab⟦ba</s>⟧"),
        ({"completion_only_loss": False}, "row: ⟦abba</s>⟧"),
    ],
)
def test_the_sample_row_marks_what_is_trained(world, capsys, changes, shown):
    write_jsonl(world / "one.jsonl", [{"prompt": "ab", "completion": "ba"}])
    write_recipe(
        "r.yaml",
        stage="sft",
        output_dir="out/x",
        train_dataset="one.jsonl",
        eval_fraction=0,
        model_name_or_path="model",
        **changes,
    )
    code, said = outcome(capsys, "r.yaml")
    assert code == 0, said
    assert shown in said.replace(" ", "").replace("row:", "row: ")
    assert "at most 5 tokens in the first 1 rows" in said
    assert "1 to train on, 0 to evaluate on\n" in said
    assert "steps: up to 1 optimizer step\n" in said


def test_a_row_of_each_template_and_the_share_of_each_task(world, capsys):
    """Tasks a and b, of which the second has two templates; one evaluation row stands in the training rows too."""
    names = [a + b for a in "abcdefgh" for b in "abcdefgh"]
    write_jsonl(world / "a.jsonl", [{"prompt": name, "completion": "x"} for name in names[:16]])
    write_jsonl(world / "b.jsonl", [{"text": name, "label": 1} for name in names])
    write_jsonl(world / "e.jsonl", [{"prompt": names[0].upper(), "completion": "x"}])
    templates = [{"prompt": "p{{ text }}", "completion": "{{ label }}p"}, {"prompt": "q{{ text }}", "completion": "q"}]
    write_recipe(
        "r.yaml",
        stage="sft",
        output_dir="out/x",
        train_dataset=[{"path": "a.jsonl"}, {"path": "b.jsonl", "templates": templates, "labels": {1: "good"}}],
        eval_dataset="e.jsonl",
        mixture_temperature=2,
        model_name_or_path="model",
    )
    code, said = outcome(capsys, "r.yaml")
    assert code == 0, said
    flat = said.replace(" ", "")
    # 80 rows in shares of 4 to 8
    assert "tasks: b 66.2% (53 rows), a 33.8% (27 rows) warning " in " ".join(said.split())
    assert "row:aa⟦x</s>⟧" in flat
    assert re.search(r"b,row:p[a-h]{2}⟦goodp</s>⟧", flat)
    assert re.search(r"b,row:q[a-h]{2}⟦q</s>⟧", flat)
    assert "at most 9 tokens in the first 80 rows)" in " ".join(said.split())
    repeated = "warning evaluation rows with duplicates in the training rows: 1 of 1 (1 exact, 0 near; "
    assert repeated in " ".join(said.split())
    code, said = outcome(capsys, "r.yaml", "--max_length", "8")
    assert code == 2
    assert "longer than 8 tokens" in said


def test_evaluation_rows_are_tokenized_and_packed_texts_cut(world, capsys):
    """As the stage does, which refuses a long evaluation row, and takes a text that packing cuts."""
    write_jsonl(world / "texts.jsonl", [{"text": "ab" * 100}])
    write_jsonl(world / "e.jsonl", [{"prompt": "ab", "completion": "b" * 50}])
    keys = {"stage": "sft", "output_dir": "out/x", "train_dataset": "texts.jsonl", "model_name_or_path": "model"}
    write_recipe("r.yaml", **keys, eval_fraction=0, max_length=20, packing=True)
    code, said = outcome(capsys, "r.yaml")
    assert code == 0, said
    assert "at most 20 tokens in the first 1 rows" in said
    assert "1 optimizer step of 11 examples" in said  # 200 letters and EOS
    write_recipe("r.yaml", **keys, eval_dataset="e.jsonl", max_length=20, packing=True)
    code, said = outcome(capsys, "r.yaml")
    assert code == 2
    assert "longer than 20 tokens" in said, said
    code, said = outcome(capsys, "r.yaml", "--max_length", "60")
    assert code == 0, said
    assert "evaluation rows: at most 53 tokens in the first 1" in " ".join(said.split())


def test_no_more_than_a_few_templates_are_shown(world, capsys):
    write_jsonl(world / "a.jsonl", [{"text": a + b} for a in "abcdefghijklm" for b in "abcdefghijklm"])
    templates = [{"prompt": f"{letter}{{{{ text }}}}", "completion": letter} for letter in "abcdefghij"]
    write_recipe(
        "r.yaml",
        stage="sft",
        output_dir="out/x",
        train_dataset={"path": "a.jsonl", "templates": templates},
        eval_fraction=0,
        model_name_or_path="model",
    )
    code, said = outcome(capsys, "r.yaml")
    assert code == 0, said
    assert said.count("row: ") == 6
    assert "rows of 6 of 10 templates" in said
    assert "tasks:" not in said


def test_the_sample_of_a_reward_recipe(world, capsys):
    write_jsonl(world / "one.jsonl", [{"prompt": "ab", "chosen": "c", "rejected": "d"}])
    write_recipe(
        "r.yaml",
        stage="reward",
        output_dir="out/x",
        train_dataset="one.jsonl",
        eval_fraction=0,
        model_name_or_path="model",
    )
    code, said = outcome(capsys, "r.yaml")
    assert code == 0, said
    flat = said.replace(" ", "")
    assert "chosen:abc⟦</s>⟧" in flat
    assert "rejected:abd⟦</s>⟧" in flat


def test_messages_are_rendered(world, capsys):
    (world / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    turns = [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    write_jsonl(world / "one.jsonl", [{"messages": turns}])
    write_recipe(
        "r.yaml",
        stage="sft",
        output_dir="out/x",
        train_dataset="one.jsonl",
        eval_fraction=0,
        model_name_or_path="model",
    )
    code, said = outcome(capsys, "r.yaml")
    assert code == 2
    assert "no chat template" in said
    assert "1 mistake to fix" in said
    code, said = outcome(capsys, "r.yaml", "--chat_template_path", "chat.jinja")
    assert code == 0, said
    assert "row:<s>uba⟦c</s>⟧uda⟦e</s>⟧" in said.replace(" ", "")


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("1_sft", ["--learning_rat", "1"], "--learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("1_sft", ["--seed", "x"], "--seed: expected a whole number"),
        ("1_sft", ["--train_dataset", "gone.jsonl"], "gone.jsonl: no such file"),
        ("1_sft", ["--train_dataset.columns.prompt", "question"], "question"),
        ("1_sft", ["--max_length", "4"], "longer than 4 tokens"),
        ("1_sft", ["--model_name_or_path", "out/gone"], "model_name_or_path: no model at out/gone"),
        ("1_sft", ["--train_batch_size", "5"], "train_batch_size: expected a multiple of the 2 processes, got 5"),
        ("1_sft", ["--output_dir", "r/demos.jsonl/x"], "output_dir: cannot write to r/demos.jsonl/x"),
        ("2_reward", ["--eval_reward_funcs", "truth_of_check:thruth"], "did you mean 'truth'?"),
        ("3_ppo", ["--reward_model_path", "null", "--reward_funcs", "truth_of_check:thruth"], "did you mean 'truth'?"),
        ("3_ppo", ["--reward_model_path", "model"], "reward_model_path: model has no scalar head"),
    ],
)  # fmt: skip
def test_what_would_not_run(world, capsys, recipe, words, said):
    if "--model_name_or_path" not in words and recipe != "3_ppo":
        words = [*words, "--model_name_or_path", "model"]
    if recipe == "3_ppo":
        words = [*words, "--sft_model_path", "model"]
    code, text = outcome(capsys, f"r/{recipe}.yaml", *words, num_gpus=2)
    assert code == 2
    assert said in text
    assert "would run" not in text


def test_all_wrong_values_of_a_recipe_are_told_at_once(world, capsys):
    words = ["--learning_rate", "fast", "--max_length", "1", "--num_train_epoch", "3", "--seed", "1.5"]
    assert main(["check", "r/1_sft.yaml", *words]) == 2
    said = capsys.readouterr().out
    for name in (
        "learning_rate: expected a number,",
        "max_length: expected a number at least 2",
        "num_train_epoch: unknown",
        "seed",
    ):
        assert said.count(f"--{name}") == 1
    assert "4 mistakes" in said
    assert main(["sft", "r/1_sft.yaml", *words]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_all_broken_rules_between_keys_are_told_at_once(world, capsys):
    words = ["--num_generations", "3", "--reward_variance_coef", "0.5", "--accept_changes", "nothing"]
    words += ["--freeze_layers", "2", "--metric_for_best_model", "eval/scores"]
    assert main(["check", "r/3_ppo.yaml", *words]) == 2
    said = capsys.readouterr().out
    for name in words[::2]:
        assert f"error    {name}: " in said, said


def test_a_folder_is_checked_to_its_end(world, capsys):
    Path("r/1_sft.yaml").write_text("stage: sft\nlearning_rat: 1\n", encoding="utf-8")
    code, said = outcome(capsys, "r", "--train_dataset.max_rows", "30")
    assert code == 2
    assert "r/1_sft.yaml:2: learning_rat: unknown key; did you mean 'learning_rate'?" in said
    assert "model_name_or_path: no model at out/1" in said  # which nothing makes any more
    assert "r/1_sft.yaml: output_dir: missing" in said
    assert "4 mistakes to fix" in said  # two in 1_sft, one each in 2_reward and 3_ppo


def test_another_chat_template_than_the_stage_before(world, capsys):
    (world / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    with Path("r/2_reward.yaml").open("a", encoding="utf-8") as file:
        file.write(f"chat_template_path: {world / 'chat.jinja'}\n")
    code, said = outcome(capsys, "r")
    assert code == 2
    assert "model_name_or_path: out/1 (made by 1_sft.yaml) was trained with another chat template" in said


def test_output_folders(world, capsys):
    write_recipe(
        "r.yaml",
        stage="sft",
        output_dir="out/x",
        train_dataset="r/demos.jsonl",
        eval_fraction=0.2,
        model_name_or_path="model",
    )
    from align.runs.manifest import open_stage, write_manifest
    from align.runs.own_files import RUN

    assert "output_dir: out/x, new" in outcome(capsys, "r.yaml")[1]
    recipe = load_recipe("sft", "r.yaml")
    open_stage(recipe)
    assert Path("out/x", RUN).is_file()
    assert "output_dir: out/x, which would be resumed" in outcome(capsys, "r.yaml")[1]
    write_manifest(recipe, letter_tokenizer(), {}, {})
    assert "output_dir: out/x is finished; the stage would be skipped" in outcome(capsys, "r.yaml")[1]
    code, said = outcome(capsys, "r.yaml", "--seed", "1")
    assert code == 2
    assert "holds a finished run that differs in seed" in said


def test_what_an_unfinished_run_would_say(world, capsys):
    keys = {"stage": "sft", "output_dir": "out/x", "train_dataset": "r/demos.jsonl", "model_name_or_path": "model"}
    write_recipe("r.yaml", **keys, eval_fraction=0.2, max_steps=1, save_steps=1, eval_steps=1)
    run_recipe(load_recipe("sft", "r.yaml"))
    unfinished("out/x")
    code, said = outcome(capsys, "r.yaml")
    assert code == 0, said
    assert "output_dir: out/x, which would be resumed" in said
    metrics = Path("out/x/metrics.jsonl").read_bytes()
    Path("out/x/metrics.jsonl").write_bytes(metrics[:-1])
    code, said = outcome(capsys, "r.yaml")
    assert code == 2
    assert (
        f"out/x/metrics.jsonl: has {len(metrics) - 1} bytes, fewer than the {len(metrics)} that it had at checkpoint-1"
        in said
    )
    rows = Path("r/demos.jsonl").read_text().splitlines()
    Path("r/demos.jsonl").write_text("\n".join(rows[::-1]))
    code, said = outcome(capsys, "r.yaml")
    assert code == 2
    assert "holds an unfinished run that differs in train_dataset[0] (r/demos.jsonl has other rows: fingerprint" in said


def test_answers_longer_than_the_model_can_read(world, capsys):
    words = ["--sft_model_path", "model", "--reward_model_path", "null", "--reward_funcs", "truth_of_check:truth"]
    code, said = outcome(capsys, "r/3_ppo.yaml", *words, "--max_tokens_per_device", "4096")
    assert code == 0
    assert "64 sequences per step = 1 x 64 (processes x sequences), in passes of up to 4096 tokens, 2 updates" in said
    assert "more for a pass of 4096 tokens" in said
    code, said = outcome(capsys, "r/3_ppo.yaml", *words, "--response_length", "255")  # after prompts of two letters
    assert code == 2
    assert (
        "response_length: the longest prompt has 2 tokens, which leaves 254 of the 256 that the model reads, got 255"
        in said
    )


def test_an_encoder_reads_its_score_from_the_first_token(world, capsys):
    folder = world / "encoder"
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    encoder = BertModel(BertConfig(vocab_size=29, **size))
    encoder.embeddings.word_embeddings.weight.data.fill_(math.nan)  # a check loads no weights
    encoder.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    code, said = outcome(capsys, "r/2_reward.yaml", "--model_name_or_path", "encoder", "--sft_model_path", "model")
    assert code == 0, said
    assert "chosen: ⟦" in said
    assert "SFT model (to set the zero)" in said


def test_the_recipes_own_zero_stage_has_a_column(world, capsys):
    Path("zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}), encoding="utf-8")
    said = outcome(capsys, "r/1_sft.yaml", "--model_name_or_path", "model", "--deepspeed", "zero.json", num_gpus=8)[1]
    assert "(ZeRO 2)" in said
    assert "(ZeRO 0)" not in said
    assert "Memory per GPU, 8 processes, float32, adamw_torch_fused" in said
    words = ["--model_name_or_path", "model", "--optim", "sgd", "--output_dir", "out/sgd"]
    whole, plain = (
        re.findall(r"([\d.]+) MiB", outcome(capsys, "r/1_sft.yaml", *each)[1])[0] for each in (words[:2], words)
    )
    assert float(plain) == pytest.approx(float(whole) / 2, abs=0.1), "8 of 16 bytes a parameter"


def test_no_recipes_at_all(world):
    (world / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: expected recipes named like 1_sft.yaml, found none"):
        check.run("empty")
    with pytest.raises(UserError, match="no such recipe"):
        check.run("gone.yaml")


def save_encoder(folder: Path) -> None:
    from tests.encoders.test_mlm import save_tiny_encoder

    save_tiny_encoder(folder)
    weights = load_file(folder / "model.safetensors")  # a check loads no weights
    save_file({name: torch.full_like(value, math.nan) for name, value in weights.items()}, folder / "model.safetensors")


def test_a_folder_of_a_masked_language_model_and_a_classifier(world, capsys):
    save_encoder(world / "encoder")
    texts = write_jsonl(world / "t/texts.jsonl", [{"text": "abcdefghijklmnopqrstuvwxyz"}, {"text": "ab"}])
    rows = write_jsonl(world / "t/rows.jsonl", [{"text": "ab", "label": "x"}, {"text": "cd", "label": "y"}])
    numbers = write_jsonl(world / "t/n.jsonl", [{"text": "ab", "text_pair": "c", "label": n} for n in (0.5, 2)])
    common = {"eval_fraction": 0}
    write_recipe("t/0_mlm.yaml", stage="mlm", output_dir="out/m", train_dataset=texts, model_name_or_path="encoder",
                 mlm_probability=0.5, **common)  # fmt: skip
    write_recipe("t/1_classify.yaml", stage="classify", output_dir="out/c", train_dataset=rows,
                 model_name_or_path="out/m", **common)  # fmt: skip
    write_recipe("t/2_scorer.yaml", stage="classify", output_dir="out/n", train_dataset=numbers,
                 model_name_or_path="out/m", **common)  # fmt: skip
    write_recipe("t/3_ppo.yaml", stage="ppo", output_dir="out/p", train_dataset="r/demos.jsonl", sft_model_path="model",
                 reward_model_path="out/n", eval_fraction=0.2, response_length=8)  # fmt: skip
    code, said = outcome(capsys, "t")
    assert code == 0, said
    assert said.rstrip().endswith("it would run")
    flat = said.replace(" ", "")
    assert "⟦<mask>" in flat.split("piece:")[1].splitlines()[0]
    assert "the tokens to predict; 3 pieces; at most 15 tokens in the first 2 rows" in said  # of 16; cut evenly
    assert re.search(r"steps: up to \d+ optimizer steps? of 3 examples", said)
    assert "rowlabeled'x':⟦<s>⟧ab</s>" in flat
    assert "single_label_classification, 2 labels by training rows: x (1), y (1); at most 4 tokens" in said
    assert "rowlabeled0.5:⟦<s>⟧ab</s>c</s>" in flat
    assert "regression, mean label 1.25" in said
    assert "model_name_or_path: out/m (made by 0_mlm.yaml)" in said
    assert "reward_model_path: out/n (made by 2_scorer.yaml)" in said
    config = AutoConfig.from_pretrained("encoder")
    heads = {"maskedlanguagemodel": AutoModelForMaskedLM, "classifier": AutoModelForSequenceClassification}
    for name, auto in heads.items():
        assert f"|{name}|{count_parameters(skeleton(auto, config)):,}|" in flat
    assert not (world / "out").exists()


def test_a_classifier_that_would_not_run(world, capsys):
    save_encoder(world / "encoder")
    rows = write_jsonl(world / "t.jsonl", [{"text": "ab", "label": "x"}, {"text": "cd", "label": "x"}])
    write_recipe("c.yaml", stage="classify", output_dir="out/c", train_dataset=rows, model_name_or_path="encoder",
                 eval_fraction=0)  # fmt: skip
    code, said = outcome(capsys, "c.yaml")
    assert code == 2
    assert "label: all 2 training rows have the same label, x" in said
    assert "not checked: tokens and memory" in said
    code, said = outcome(capsys, "c.yaml", "--train_dataset", "gone.jsonl")
    assert code == 2
    assert "gone.jsonl: no such file" in said


def test_labels_inside_texts_and_answers_from_passages(world, capsys):
    save_encoder(world / "encoder")
    tagged = [{"tokens": ["ab", "c"], "tags": ["B-X", "O"]}, {"tokens": ["d"], "tags": ["O"]}]
    rows = write_jsonl(world / "t/tags.jsonl", tagged)
    asked = [{"question": "q", "context": "abcdefghijklmnop", "answers": {"text": ["cd"], "answer_start": [2]}}]
    questions = write_jsonl(world / "t/questions.jsonl", asked)
    write_recipe("t/1_tags.yaml", stage="token-classification", output_dir="out/t", train_dataset=rows,
                 model_name_or_path="encoder", eval_fraction=0)  # fmt: skip
    write_recipe("t/2_answers.yaml", stage="question-answering", output_dir="out/a", train_dataset=questions,
                 model_name_or_path="encoder", eval_fraction=0, max_length=12, doc_stride=2)  # fmt: skip
    code, said = outcome(capsys, "t")
    assert code == 0, said
    flat = said.replace(" ", "")
    assert "rowwithX:<s>⟦ab⟧<pad>c</s>" in flat
    assert "IOB2, 1 types of entities by their number in training: X (1)" in said
    assert "window:<s>q</s>ab⟦cd⟧efgh</s>" in flat
    assert "1 questions in 3 windows of up to 12 tokens" in said
    assert not (world / "out").exists()
    for recipe, wrong, words in (
        ("t/1_tags.yaml", [{"tokens": ["ab"], "tags": ["I-X"]}], "a word inside an entity"),
        (
            "t/2_answers.yaml",
            [asked[0] | {"answers": {"text": ["cd"], "answer_start": [3]}}],
            "not what the context has",
        ),
    ):
        code, said = outcome(capsys, recipe, "--train_dataset", write_jsonl(world / "wrong.jsonl", wrong))
        assert code == 2
        assert words in said
        assert "wrong.jsonl:1" in said


# --- output that is not read to its end


@pytest.mark.parametrize("argv", [["check", "r.yaml"], ["ppo", "--help"], ["--version"]])
def test_output_that_nobody_reads_ends_the_command_without_a_word(argv, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("stage: sft\n")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", pipe)
        assert main(argv) == 141
    assert capfd.readouterr() == ("", "")
