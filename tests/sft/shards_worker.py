"""Run by the ranks of test_train.py: a stage, and what each rank holds of its model as soon as that is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

from align.config.load import load_recipe
from align.sft import train


def train_and_count(recipe: str, found: Path) -> None:
    """Run SFT; the elements of weights that this rank held after loading go to the file `found` with its number."""
    keep_ends = train.keep_ends

    def count(model: Any, tokenizer: Any) -> Any:
        held = sum(parameter.numel() for parameter in model.parameters())
        Path(f"{found}{os.environ['RANK']}").write_text(str(held))
        return keep_ends(model, tokenizer)

    with mock.patch.object(train, "keep_ends", count):
        train.run(load_recipe("sft", recipe))
