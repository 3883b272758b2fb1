"""SFT or a reward model with plain TRL; prints one JSON line per optimizer step with its seconds, loss and tokens so far.

    python benchmarks/trl_trainers.py SPEC.json > steps.jsonl

SPEC.json: stage, paths and sizes; `benchmarks/trainers.py` writes it. Settings are TRL's defaults, except those set here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


class Steps(TrainerCallback):  # type: ignore[misc]
    """Prints each step when it is logged, which is when align's stage writes its line."""

    began = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            found = {"step": state.global_step, "seconds": now - self.began}
            print(json.dumps({**found, "loss": logs["loss"], "tokens": logs["num_tokens"]}), flush=True)
            self.began = now


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    rows = load_dataset("json", data_files=spec["rows"], split="train", cache_dir=spec["folder"])
    settings: dict[str, Any] = {
        "output_dir": spec["folder"],
        "num_train_epochs": spec["epochs"],
        "per_device_train_batch_size": spec["micro_batch"],
        "gradient_accumulation_steps": spec["batch"] // spec["micro_batch"],
        "learning_rate": spec["learning_rate"],
        "seed": spec["seed"],
        "bf16": False,  # on by default
        "gradient_checkpointing": False,  # on by default
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    if spec["stage"] == "sft":
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
        if spec["padding_free"]:
            settings |= {"padding_free": True, "max_length": None}  # TRL rejects padding_free with max_length
        trainer_class, arguments = SFTTrainer, SFTConfig(**settings)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(spec["model"], dtype=torch.float32, num_labels=1)
        trainer_class, arguments = RewardTrainer, RewardConfig(**settings)
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Steps()]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
