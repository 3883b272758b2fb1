"""SFT recipes on rows of letters, and the loss of these rows by plain torch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from align.config.sft import SFTRecipe
from tests.worlds import letter_ids, save_tiny_policy, training_keys

# Prompt and completion; a letter is a token. Lengths differ, so that means of means are wrong.
ROWS = [
    ("ab", "c"),
    ("a", "bcdefgh"),
    ("xyz", "zy"),
    ("k", "l"),
    ("mn", "opqrst"),
    ("q", "rs"),
    ("cc", "d"),
    ("b", "a"),
]
SCRATCH = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def recipe(folder: Path, rows=ROWS, eval_rows=(), **changes) -> SFTRecipe:
    """Two steps of four rows each, without evaluation unless `eval_rows` are given."""
    named = ([dict(zip(("prompt", "completion"), row, strict=True)) for row in some] for some in (rows, eval_rows))
    settings = training_keys("sft", folder, *named)
    if "model_config" in changes:
        del settings["model_name_or_path"]
    elif not (folder / "base").exists():
        save_tiny_policy(folder / "base")
    return SFTRecipe(**{**settings, **changes})


def nll(model, rows, completion_only=True) -> tuple[torch.Tensor, int]:
    """Sum of -log p over the label tokens of each row alone, without padding, and their number."""
    total, count = torch.zeros(()), 0
    for prompt, completion in rows:
        ids = torch.tensor([letter_ids(prompt) + letter_ids(completion) + [2]])
        first = len(prompt) if completion_only else 1
        logits = model(input_ids=ids).logits[0, first - 1 : -1]
        total = total + cross_entropy(logits, ids[0, first:], reduction="sum")
        count += ids.shape[1] - first
    return total, count
