"""The keys that every stage has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from align.config.keys import BATCH, SEED, key, required


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Keys that every stage has. A stage declares those again that mean something of their own there."""

    output_dir: str = required("Folder for what the stage writes.")
    stage: str | None = key(None, "Which stage this recipe is for; `align run` and `align check` need it.")
    accept_changes: list[str] = key(
        [], "Keys whose files or rows may have changed since the results in `output_dir` were made."
    )
    seed: int = key(42, "Seed of all random choices.", SEED)
    on_bad_row: Literal["error", "skip"] = key(
        "error", "What to do with rows that cannot be used: raise an error, or skip and count them."
    )
    chat_template_path: str | None = key(None, "Jinja file with the chat template, for tokenizers that have none.")
    chat_template_kwargs: dict[str, Any] = key(
        {},
        "Values for variables that the chat template reads, such as {enable_thinking: false}; the same in all stages.",
    )
    per_device_eval_batch_size: int = key(
        16, "Maximum sequences in one forward pass without gradients per device.", BATCH
    )
    bf16: bool = key(False, "Run the models in bfloat16.")
    tf32: bool = key(
        True,
        "Float32 matrix products in TF32 on GPUs that have it (Ampere and later), which rounds their inputs to 11 bits of precision (10 are stored).",
    )
    attn_implementation: str | None = key(
        None, "Attention kernel, as in `from_pretrained`: sdpa, flash_attention_2, eager."
    )
    trust_remote_code: bool = key(False, "Allow code from the model's repository to run.")
