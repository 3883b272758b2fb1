"""Small models and tokenizers for the tests, and the real `deepspeed` launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter_tokenizer(pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """One token per letter: <pad> 0, <s> 1, </s> 2, a 3, b 4, ..."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="</s>" if pad_is_eos else "<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def tiny_llama(
    seed: int = 0, hidden_size: int = 32, layers: int = 2, vocab_size: int = 29, spread: float = 0.2
) -> LlamaForCausalLM:
    """A random model whose distribution is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=spread,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_policy(folder: Path, seed: int = 0, **kwargs) -> str:
    tiny_llama(seed, **kwargs).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def deepspeed_file(path: Path, stage: int) -> str:
    """A DeepSpeed file that shards even tiny models."""
    zero = {"stage": stage}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    sizes = dict.fromkeys(
        ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"],
        "auto",
    )
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}, **sizes}), encoding="utf-8")
    return str(path)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launched(*command: str, ranks: int = 2, module: bool = True) -> dict[str, Any]:
    """`args` and `env`, for subprocess, of a module (or a script) under the real `deepspeed` launcher on CPU."""
    launcher = Path(sys.executable).with_name("deepspeed")
    words = [sys.executable, str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    words += ["--module"] if module else []
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    return {"args": [*words, *command], "env": environment}


def launch(
    *command: str, ranks: int = 2, module: bool = True, cwd: Path | None = None, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run a module (or a script) under the real `deepspeed` launcher on CPU."""
    return subprocess.run(
        **launched(*command, ranks=ranks, module=module),
        capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False,
    )  # fmt: skip
