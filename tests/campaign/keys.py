"""Bad values of recipe keys: out of range, of another type, absurdly large, or at odds with another key."""

# fmt: off
from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from tests.campaign.cases import MISSING, Case, Refusal

# stage, keys; the error has to name the first of them
TABLE: list[tuple[str, dict[str, Any]]] = [
    *[("sft", {"seed": value}) for value in (-1, 2**32, 2**63, 10**30, 1.5, True, "x", [1], None, {}, float("nan"))],
    *[("sft", {"train_batch_size": value}) for value in (0, -4, 3.5, "four", 10**12, 2**63, 10**30)],
    *[("sft", {"num_train_epochs": value}) for value in (0, -1, float("inf"), float("nan"), 1e300, "1e999", "all")],
    *[("sft", {"max_steps": value}) for value in (0, -2, 10**30)],
    *[("sft", {"max_length": value}) for value in (0, 1, -5, "long", [8])],
    *[("sft", {"learning_rate": value}) for value in (0, -1, float("nan"), float("inf"), "1e999", "fast", False, 10**400)],
    *[("sft", {"warmup_steps": value}) for value in (-1, float("nan"), "few")],
    *[("sft", {name: value}) for name, value in (("weight_decay", -1), ("adam_beta1", 1), ("adam_beta2", -0.1), ("adam_epsilon", 0), ("max_grad_norm", -1))],
    *[("sft", {"eval_fraction": value}) for value in (1, -0.1, float("nan"), "half")],
    *[("sft", {name: 0}) for name in ("max_eval_rows", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "per_device_train_batch_size")],
    ("sft", {"mixture_temperature": 0.5}),
    ("sft", {"mixture_temperature": float("inf")}),
    *[("sft", {"lr_scheduler_type": value}) for value in ("warp", 5, ["linear"])],
    *[("sft", {"method": value}) for value in ("magic", "bottleneck", None, ["lora"], 5)],
    *[("sft", {name: value, "method": "lora"}) for name, value in (("lora_r", 0), ("lora_r", 10**12), ("lora_alpha", 0), ("lora_target_modules", ["nosuch"]), ("lora_target_modules", [5]), ("lora_target_modules", "("))],
    ("sft", {"freeze_layers": 99, "method": "freeze"}),
    ("sft", {"freeze_layers": 10**30, "method": "freeze"}),
    ("sft", {"trainable_pattern": "(", "method": "freeze"}),
    ("sft", {"trainable_pattern": "nothing_has_this_name", "method": "freeze"}),
    ("sft", {"num_virtual_tokens": 10**12, "method": "prompt"}),
    *[("sft", {"output_dir": value}) for value in ("", " ", None, 5, ["out"], {"a": 1}, "notes.txt", "notes.txt/out", "n" * 300, "a\0b", "/proc/out", "/dev/null/out", ".", "..", "data", "base", "base/out", "./base/../base")],
    *[("sft", {"model_name_or_path": value}) for value in ("", "no/such/model", "notes.txt", "data", 5, ["base"], "a\0b", "m" * 300, "a//b", "-", "..", "../" * 50, "/", "/dev/null", "\x1b[31mbase", MISSING)],
    *[("sft", {"train_dataset": value}) for value in ("", "no_such.jsonl", [], {}, [None], 5, {"path": ""}, {"path": "data/answers.jsonl", "generator": "functions:rows"}, {"generator": "nomodule:rows"},
      {"generator": "functions:nosuch"}, {"generator": "functions"}, {"generator": "functions:NUMBER"}, {"generator": "functions:"}, {"generator": ""}, "data", "data/*.nothing", "notes.txt", "a\0b.jsonl", "\x1b[31mx.jsonl",
      {"path": "data/answers.jsonl", "columns": {"prompt": "nosuch"}}, {"path": "data/answers.jsonl", "columns": {"promt": "prompt"}}, {"path": "data/answers.jsonl", "weight": 0}, {"path": "data/answers.jsonl", "weight": -1},
      {"path": "data/answers.jsonl", "weight": float("inf")}, {"path": "data/answers.jsonl", "weight": 1e12}, {"path": "data/answers.jsonl", "weight": 1e300}, {"path": "data/answers.jsonl", "max_rows": 0},
      {"path": "data/answers.jsonl", "nosuch": 1}, {"path": "data/answers.jsonl", "labels": {"0": "no"}}, {"path": ["data/answers.jsonl"]}, "http://127.0.0.1:9/rows.jsonl")],
    *[("sft", {name: value}) for name, value in (("bf16", "maybe"), ("bf16", 1), ("gradient_checkpointing", "yes please"), ("packing", 2), ("trust_remote_code", "base"))],
    ("sft", {"attn_implementation": "magic"}),
    ("sft", {"attn_implementation": "flash_attention_2"}),
    *[("sft", {"report_to": value}) for value in ("tensorboard", ["wandb"], 5)],
    *[("sft", {"chat_template_path": value}) for value in ("no.jinja", "data", "base/model.safetensors", 5)],
    ("sft", {"label_smoothing_factor": 0.1, "loss_normalization": "example_mean"}),
    ("sft", {"train_sampling_strategy": "group_by_length", "packing": True}),
    ("sft", {"early_stopping_patience": 1, "eval_steps": None}),
    ("sft", {"metric_for_best_model": "eval_nosuch", "load_best_model_at_end": True, "save_steps": 2}),
    ("sft", {"eval_metrics": ["nosuch"]}),
    ("sft", {"eval_metrics": ["bleu", "bleu"]}),
    ("sft", {"eval_metrics": ["no_such_file.py"]}),
    ("sft", {"replay_fraction": 1, "retention": "data/answers_eval.jsonl"}),
    ("sft", {"retention": "data/none.jsonl"}),
    ("sft", {"max_forgetting": 5}),
    ("sft", {"retention": "data/answers_eval.jsonl", "eval_dataset": [], "eval_fraction": 0}),
    *[("sft", {"model_config": value, "model_name_or_path": None}) for value in (
        {"hidden_size": 8}, {"model_type": "nosuch"}, {"model_type": "t5"}, {"model_type": "bert"}, {"model_type": 5}, {"model_type": "llama", "hidden_size": 0},
        {"model_type": "llama", "hidden_size": -8}, {"model_type": "llama", "hidden_size": "big"}, {"model_type": "llama", "hidden_size": 10**9}, {"model_type": "llama", "num_hidden_layers": "two"}, {"model_type": "llama", "num_hidden_layers": -1},
        {"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}, {"model_type": "llama", "num_attention_heads": 0}, {"model_type": "llama", "auto_map": {"AutoConfig": "mine.Config"}}, {"model_type": "llama", "vocab_size": -1}, 5, ["llama"])],
    ("sft", {"tokenizer_vocab_size": 5, "model_config": {"model_type": "llama"}, "model_name_or_path": None}),
    ("sft", {"tokenizer_vocab_size": 10**12, "model_config": {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}, "model_name_or_path": None}),
    *[("reward", {"normalize_prompts": value}) for value in (0, "all")],
    *[("reward", {"response_length": value}) for value in (0, 10**12)],
    *[("reward", {"model_name_or_path": value}) for value in ("no/such/model", "data", MISSING)],
    ("reward", {"eval_reward_funcs": ["functions"]}),
    ("reward", {"eval_reward_funcs": ["functions:nosuch"]}),
    ("reward", {"train_dataset": {"path": "data/pairs.jsonl", "templates": [{"prompt": "a", "completion": "b"}]}}),
    *[("ppo", {"total_episodes": value}) for value in (0, 1, -5, 10**15, 10**30, "many")],
    *[("ppo", {"rollout_batch_size": value}) for value in (0, 10**15)],
    ("ppo", {"minibatch_size": 3}),
    ("ppo", {"num_generations": 3}),
    ("ppo", {"num_ppo_epochs": 0}),
    *[("ppo", {"response_length": value}) for value in (0, 10**9, "short")],
    *[("ppo", {"temperature": value}) for value in (0, -1, float("inf"), float("nan"))],
    *[("ppo", {name: value}) for name, value in (("kl_coef", -1), ("cliprange", 0), ("gamma", 2), ("lam", -1), ("dual_clip", 0.5), ("ema_decay", 1), ("score_clip", 0), ("num_sample_rows", -1), ("max_kl", 0), ("kl_horizon", 0))],
    *[("ppo", {"reward_funcs": value}) for value in (["functions"], ["functions:"], [":count_a"], ["functions:nosuch"], ["nomodule:f"], ["functions:NUMBER"], ["functions.sub:f"], [5], {"a": "b"}, ["functions:\x1b[31mx"], [None])],
    *[("ppo", {"reward_weights": value}) for value in ([1, 2], [float("inf")], ["x"], 5.5e400)],
    ("ppo", {"missing_eos_score": 1, "missing_eos_penalty": 1}),
    ("ppo", {"top_k": 5}),
    *[("ppo", {"sft_model_path": value}) for value in ("no/such/model", "encoder", MISSING)],
    *[("ppo", {"reward_model_path": value}) for value in ("base", "no/such/model", "encoder", "data")],
    ("ppo", {"value_model_path": "encoder"}),
    ("ppo", {"value_model_path": "no/such/model"}),
    ("ppo", {"advantage_estimator": "magic"}),
    ("ppo", {"num_generations": 1, "advantage_estimator": "grpo"}),
    ("ppo", {"kl_estimator": "k1", "use_kl_loss": True}),
    ("ppo", {"ptx_dataset": "data/none.jsonl"}),
    ("ppo", {"ptx_batch_size": 0}),
    *[("classify", {"problem_type": value}) for value in ("nosuch", "regression", 5)],
    ("classify", {"max_length": 1}),
    ("classify", {"model_name_or_path": "data"}),
    *[("mlm", {"mlm_probability": value}) for value in (0, 1, float("nan"), "some")],
    ("mlm", {"model_name_or_path": "base"}),
    *[("evaluate", {"models": value}) for value in ([], {}, 5, [5], None, ["base", "base"], ["no/such/model"], {"a": 5}, {5: "base"}, ["encoder"], ["notes.txt"], MISSING)],
    *[("evaluate", {"metrics": value}) for value in (["nosuch"], [], 5, ["no_such.py"])],
    *[("evaluate", {"num_shots": value}) for value in ([-1], [1, 1], [], [10**9], ["x"], [4])],
    *[("evaluate", {"max_new_tokens": value}) for value in (0, 10**12)],
    *[("evaluate", {"bootstrap_iters": value}) for value in (0, 10**15)],
    *[("evaluate", {"temperature": value}) for value in (-1, float("nan"), float("inf"))],
    ("evaluate", {"stop_strings": [""]}),
    *[("evaluate", {"grader": value}) for value in ("functions", "functions:nosuch", "nomodule:f")],
    *[("evaluate", {"output_dir": value}) for value in ("", "base", "base/out", "data", "notes.txt", "a\0b")],
    ("evaluate", {"eval_dataset": "data/none.jsonl"}),
]  # fmt: skip


def cases() -> Iterator[Case]:
    for stage, keys in TABLE:
        first, *others = keys
        value = keys[first]
        shown = "missing" if value is MISSING else ascii(value)[:60]
        shown += "".join(f", {name} {str(keys[name])[:12]}" for name in others)
        # What a key holds may be named instead of the key: a path, a function.
        inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        held = [each for each in inner if isinstance(each, str) and each.strip()]
        says = [first, f"{stage}.yaml:", *(each[:40] for each in held), *(os.path.normpath(each)[:40] for each in held if "/" in each)]
        says += [ascii(each)[1:-1][:40] for each in held]  # control characters come escaped
        if first == "num_shots":
            says.append("examples")
        yield Case("keys", f"{stage} {first}: {shown}", Refusal(stage, keys=keys, says=says))
