"""What every case gets a copy of: tiny models, rows, functions, and a recipe for each stage, with relative paths.

The recipes train four steps with a checkpoint after each, so that checkpoints are also rotated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

FUNCTIONS = '''
"""Functions beside the recipes."""

import os
import sys
import time

NUMBER = 5


def count_a(prompts, completions, **columns):
    return [text.count("a") / max(len(text), 4) for text in completions]


def constant(prompts, completions, **columns):
    return [0.5] * len(completions)


def grade(prompts, completions, **columns):
    return [float("a" in text) for text in completions]


def rows(count=8):
    yield from ({"prompt": "ab", "completion": "cde"[: 1 + i % 3]} for i in range(count))


def no_rows():
    return []


def not_iterable():
    return 5


def not_mappings():
    return [1, 2, 3]


def failing_rows():
    yield {"prompt": "ab", "completion": "c"}
    raise RuntimeError("the source is down")


def exiting_rows():
    yield {"prompt": "ab", "completion": "c"}
    sys.exit(0)


def endless_rows():
    while True:
        yield {"prompt": "ab", "completion": "c"}


def raises(prompts, completions, **columns):
    raise RuntimeError("stumbled")


def raises_later(prompts, completions, calls=[], **columns):
    calls.append(1)
    if len(calls) > 2:
        raise RuntimeError("stumbled later")
    return [0.5] * len(completions)


def raises_on_rank_1(prompts, completions, **columns):
    if os.environ.get("RANK") == "1":
        raise RuntimeError("stumbled on rank 1")
    return [0.5] * len(completions)


def exits(prompts, completions, **columns):
    sys.exit(0)


def hangs(prompts, completions, **columns):
    time.sleep(3600)


def hangs_on_rank_1(prompts, completions, **columns):
    if os.environ.get("RANK") == "1":
        time.sleep(3600)
    return [0.5] * len(completions)


def empties(prompts, completions, completion_ids, **columns):
    scores = [0.5] * len(completions)
    for each in (prompts, completions, completion_ids, *columns.values()):
        each.clear()
    return scores


def too_few(prompts, completions, **columns):
    return [0.5]


def nan(prompts, completions, **columns):
    return [float("nan")] * len(completions)


def text(prompts, completions, **columns):
    return ["good"] * len(completions)


def nothing(prompts, completions, **columns):
    return None


def huge(prompts, completions, **columns):
    return [10**400] * len(completions)


def shouts(prompts, completions, **columns):
    raise RuntimeError("\\x1b[31mred\\x1b[0m\\x07")
'''

WORDS = [("ab", "c"), ("a", "bcd"), ("xyz", "zy"), ("k", "l"), ("mn", "opq"), ("q", "rs"), ("cc", "d"), ("b", "a")]
HELD_OUT = [("st", "uv"), ("w", "xyz"), ("ef", "h"), ("ij", "kl")]


def _rows(kind: str, words: list[tuple[str, str]]) -> list[dict[str, Any]]:
    if kind == "pairs":
        return [{"prompt": prompt, "chosen": f"{word}z", "rejected": word} for prompt, word in words]
    if kind == "prompts":
        return [{"prompt": prompt} for prompt, _ in words]
    if kind == "labels":
        return [{"text": prompt, "label": "yes" if i % 2 else "no"} for i, (prompt, _) in enumerate(words)]
    if kind == "tags":
        return [
            {"tokens": [prompt, word], "tags": ["B-X", "O"] if i % 2 else ["O", "B-Y"]}
            for i, (prompt, word) in enumerate(words)
        ]
    if kind == "questions":
        answers = [{"text": [word], "answer_start": [len(prompt)]} for prompt, word in words]
        return [
            {"question": "q", "context": f"{prompt}{word}", "answers": each}
            for (prompt, word), each in zip(words, answers, strict=True)
        ]
    if kind == "texts":
        return [{"text": f"{prompt}{word}" * 2} for prompt, word in words]
    return [{"prompt": prompt, "completion": word} for prompt, word in words]


ROWS_OF = {"sft": "answers", "reward": "pairs", "ppo": "prompts", "classify": "labels", "mlm": "texts",
           "token-classification": "tags", "question-answering": "questions"}  # fmt: skip
STAGES = (*ROWS_OF, "evaluate", "bon", "judge-reward")
_SAVING = {"save_steps": 1, "save_total_limit": 2, "eval_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
_TRAINER = {**_SAVING, "train_batch_size": 4, "per_device_train_batch_size": 2, "num_train_epochs": 2}


def recipe(stage: str) -> dict[str, Any]:
    """The keys of a stage's recipe."""
    rows = ROWS_OF.get(stage, "answers")
    keys: dict[str, Any] = {"stage": stage, "output_dir": "out", "eval_dataset": f"data/{rows}_eval.jsonl"}
    if stage == "evaluate":
        return {**keys, "models": ["base", "other"], "metrics": ["perplexity", "exact_match"], "max_new_tokens": 3}
    if stage == "bon":
        return {
            "stage": stage, "output_dir": "out", "model_name_or_path": "base", "train_dataset": "data/prompts.jsonl",
            "reward_funcs": ["functions:count_a"], "num_generations": 3, "response_length": 3, "per_device_eval_batch_size": 4,
        }  # fmt: skip
    if stage == "judge-reward":
        return {
            "stage": stage, "output_dir": "out", "reward_model_path": "scorer", "second_reward_funcs": ["functions:count_a"],
            "train_dataset": "data/pairs.jsonl", "eval_dataset": "data/pairs_eval.jsonl", "policy_path": "base", "num_prompts": 3,
            "num_generations": 2, "response_length": 3, "bootstrap_iters": 10, "per_device_eval_batch_size": 4,
        }  # fmt: skip
    keys["train_dataset"] = f"data/{rows}.jsonl"
    if stage == "ppo":
        return {
            **keys, **_SAVING, "sft_model_path": "base", "reward_funcs": ["functions:count_a"], "total_episodes": 16,
            "rollout_batch_size": 4, "minibatch_size": 4, "num_ppo_epochs": 1, "response_length": 3,
            "per_device_train_batch_size": 2, "ema_decay": 0.8, "kl_target": 0.05, "normalize_scores": True,
            "num_sample_rows": 2, "skip_self_checks": True,
        }  # fmt: skip
    if stage == "reward":
        return {**keys, **_TRAINER, "model_name_or_path": "base", "normalize_prompts": 4, "response_length": 3}
    if stage == "question-answering":
        keys |= {"max_length": 8, "doc_stride": 2, "max_answer_length": 3}
    return {**keys, **_TRAINER, "model_name_or_path": "base" if stage == "sft" else "encoder"}


def make(folder: Path) -> None:
    """Fill an empty folder. Imports torch and transformers."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, LlamaForSequenceClassification

    from tests.worlds import letter_tokenizer, save_tiny_pair_model, save_tiny_policy, tiny_llama, write_jsonl

    for seed, name in enumerate(("base", "other")):
        save_tiny_policy(folder / name, seed=seed, hidden_size=16, layers=1)
    save_tiny_pair_model(folder / "pair", d_model=16, num_layers=1, num_decoder_layers=1)
    config = tiny_llama(hidden_size=16, layers=1).config
    config.num_labels = 1
    for seed, name in enumerate(("scorer", "second_scorer", "judge"), 2):
        torch.manual_seed(seed)
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
        letter_tokenizer().save_pretrained(folder / name)
    (folder / "link_to_scorer").symlink_to("scorer")
    (folder / "members" / "member_mine").mkdir(parents=True)
    encoder = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    BertForMaskedLM(encoder).save_pretrained(folder / "encoder")
    tokenizer = letter_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(folder / "encoder")
    for kind in ("answers", *ROWS_OF.values()):
        write_jsonl(folder / "data" / f"{kind}.jsonl", _rows(kind, WORDS))
        write_jsonl(folder / "data" / f"{kind}_eval.jsonl", _rows(kind, HELD_OUT))
    (folder / "functions.py").write_text(FUNCTIONS)
    (folder / "notes.txt").write_text("Mine.\n")
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    sizes = {
        name: "auto"
        for name in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
    }
    for zero in (0, 2, 3):
        settings: dict[str, Any] = {"stage": zero}
        if zero == 3:
            settings |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        (folder / f"zero{zero}.json").write_text(json.dumps({"zero_optimization": settings, **sizes}))
    for stage in STAGES:
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe(stage), sort_keys=False))
