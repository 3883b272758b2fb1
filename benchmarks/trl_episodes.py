"""PPO of TRL 1.12 on the language of `episodes.py`, in its own environment: saves the policies, and prints their seconds.

    outputs/trl-1.12/bin/python benchmarks/trl_episodes.py SPEC.json

SPEC.json: paths and settings; `benchmarks/episodes.py --against-trl` writes it.
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
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class PaddingHead(nn.Module):
    """A head whose last token, the padding, is never sampled. The language has one token for padding and end-of-text, and TRL
    takes what follows the last token that is not padding for the end of a response."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, states: Tensor) -> Tensor:
        logits = self.head(states)
        return torch.cat([logits, torch.full_like(logits[..., :1], -1e4)], dim=-1)


class Score(nn.Module):
    """Stands for a reward model: `get_reward` below calls the function instead."""


def causal(path: str) -> Any:
    """The model with one more token, for padding."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    old = model.get_input_embeddings()
    embeddings = nn.Embedding(old.num_embeddings + 1, old.embedding_dim, old.padding_idx)
    embeddings.weight.data.zero_()[:-1] = old.weight.data
    model.set_input_embeddings(embeddings)
    model.lm_head = PaddingHead(model.lm_head)
    return model


def save(model: Any, path: str) -> None:
    """Save it without that token."""
    embeddings = model.get_input_embeddings()
    shorter = nn.Embedding(embeddings.num_embeddings - 1, embeddings.embedding_dim, embeddings.padding_idx)
    shorter.weight.data.copy_(embeddings.weight.data[:-1])
    model.set_input_embeddings(shorter)
    model.lm_head = model.lm_head.head
    model.save_pretrained(path)


def train(spec: dict[str, Any], settings: dict[str, Any], output: str) -> dict[str, float]:
    """A run; returns its seconds."""
    began, worked = time.perf_counter(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(spec["start"], padding_side="left")
    end = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    pad = tokenizer.pad_token_id
    letters = {index: token for token, index in tokenizer.get_vocab().items() if index < end}
    sys.path.insert(0, spec["folder"])
    reward = getattr(__import__(spec["module"]), spec["reward"])
    stand_in = Score()

    def get_reward(model: Any, ids: Tensor, pad_token_id: int, context_length: int) -> Any:
        if model is not stand_in:
            return values(model, ids, pad_token_id, context_length)
        prompts = [
            "".join(letters[token] for token in row if token in letters) for row in ids[:, :context_length].tolist()
        ]
        responses = [[token for token in row if token != pad] for row in ids[:, context_length:].tolist()]
        return None, torch.tensor(reward(prompts=prompts, completion_ids=responses)), None

    values, ppo_trainer.get_reward = ppo_trainer.get_reward, get_reward
    policy, reference = causal(spec["start"]), causal(spec["start"])
    value = AutoModelForSequenceClassification.from_pretrained(spec["start"], num_labels=1, dtype=torch.float32)
    nn.init.zeros_(value.score.weight)  # as the stage's value model starts
    rows = Dataset.from_list([{"input_ids": ids} for ids in tokenizer(spec["prompts"])["input_ids"]])
    batch = spec["batch"]
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=f"{spec['folder']}/trl",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=batch,
            response_length=spec["response_length"],
            stop_token="eos",
            temperature=1.0,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **settings,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=stand_in,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    ppo_trainer.get_reward = values
    seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    save(policy, output)
    return seconds


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    for settings, output in zip(spec["runs"], spec["outputs"], strict=True):
        print(json.dumps(train(spec, settings, output)), flush=True)


if __name__ == "__main__":
    main()
