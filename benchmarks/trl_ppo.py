"""A PPO run with TRL 1.12 in its own environment; prints one JSON line per update with the seconds of its phases.

    outputs/trl-1.12/bin/python benchmarks/trl_ppo.py SPEC.json > updates.jsonl

SPEC.json: paths of the models and prompts, and sizes; `benchmarks/ppo.py` writes it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

SECONDS: dict[str, float] = {}


def timed(name: str, function: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        SECONDS[name] = SECONDS.get(name, 0.0) + time.perf_counter() - began
        return result

    return wrapper


class Updates(TrainerCallback):
    """Prints the seconds of each update. All time outside sampling and scoring counts as update, as in TRL's loop."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        phases = {"generate": SECONDS.pop("generate"), "score": SECONDS.pop("score")}
        total = now - self.began
        print(json.dumps({**phases, "update": total - sum(phases.values()), "total": total}), flush=True)
        SECONDS.clear()
        self.began = time.perf_counter()


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    tokenizer = AutoTokenizer.from_pretrained(spec["policy"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(spec["policy"], dtype=torch.float32) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(spec[role], num_labels=1, dtype=torch.float32)
        for role in ("value", "reward")
    )
    rows = load_dataset("json", data_files=spec["prompts"], split="train", cache_dir=spec["folder"])
    rows = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=rows.column_names)
    ppo_trainer.batch_generation = timed("generate", ppo_trainer.batch_generation)
    score = timed("score", ppo_trainer.forward)
    ppo_trainer.get_reward = timed("score", ppo_trainer.get_reward)

    update = ppo_trainer.forward
    ppo_trainer.forward = lambda model, *args: (score if model is reference else update)(model, *args)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=spec["folder"],
            total_episodes=spec["episodes"],
            per_device_train_batch_size=spec["micro_batch"],
            gradient_accumulation_steps=spec["batch"] // spec["micro_batch"],
            num_mini_batches=1,
            num_ppo_epochs=spec["epochs"],
            local_rollout_forward_batch_size=spec["batch"],
            response_length=spec["response_length"],
            stop_token="eos",
            temperature=1.0,
            learning_rate=spec["learning_rate"],
            num_sample_generations=0,
            bf16=spec["bf16"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(spec["batch"])),
        callbacks=[Updates()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train()


if __name__ == "__main__":
    main()
