"""`align merge ADAPTER OUTPUT`: merge an adapter into the model that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

from align.errors import UserError
from align.models.load import adapter_base
from align.runs.files import new_folder
from align.runs.quiet import quiet

AUTO = {"CAUSAL_LM": AutoPeftModelForCausalLM, "SEQ_CLS": AutoPeftModelForSequenceClassification}


def run(adapter: str, output: str) -> str:
    """Write the merged model and its tokenizer as a plain Hugging Face folder; returns a message.

    Raises:
        UserError: no adapter, one that cannot be merged, a missing base model, or an output folder that exists.
    """
    quiet()
    folder = Path(adapter) / "adapter" if (Path(adapter) / "adapter").is_dir() else Path(adapter)
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{adapter}: no adapter (adapter_config.json is missing); name the folder of an adapter.")
    if Path(output).exists():
        raise UserError(f"{output}: exists already; name a new folder.")
    base = adapter_base(str(folder))
    config = json.loads(file.read_text(encoding="utf-8"))
    auto = AUTO.get(config["task_type"])
    if auto is None:
        raise UserError(f"{folder}: expected an adapter of {' or '.join(AUTO)}, got {config['task_type']}.")
    labels: dict[str, Any] = {"num_labels": 1} if auto is AutoPeftModelForSequenceClassification else {}
    try:
        model = auto.from_pretrained(str(folder), dtype=torch.float32, **labels)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: cannot be loaded on its base {base}: {str(error).splitlines()[0]}") from error
    tokenizer = AutoTokenizer.from_pretrained(str(folder) if (folder / "tokenizer_config.json").is_file() else base)
    with new_folder(Path(output)) as fresh:
        model.merge_and_unload().save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return f"{folder} merged into {base}: {output}"
