"""The private names of smaller libraries that the package uses; see `align/compat/__init__.py`."""

from __future__ import annotations

from typing import Any

# torch


def in_place_changes(tensor: Any) -> int:
    """How often a tensor has been changed in place, as autograd counts it."""
    return int(tensor._version)


# bitsandbytes


def keep_differentiable_kernel(module: Any) -> None:
    """Keep a 4-bit layer on a CPU to the one kernel that has a gradient; other modules are left unchanged.

    On a CPU with AVX512-BF16, bitsandbytes repacks a layer in its first evaluation for a bfloat16 kernel without a
    gradient, and training would silently go on with it: the layers below would learn nothing.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


# sacrebleu


def bleu_statistics(metric: Any, predictions: list[str], references: list[str]) -> list[list[float]]:
    """The statistics of each row from which a sacrebleu metric computes its score of a corpus."""
    rows: list[list[float]] = metric._extract_corpus_statistics(predictions, [references])
    return rows


def bleu_score(metric: Any, statistics: list[int]) -> float:
    """A sacrebleu metric's score of a corpus, from the sums of its rows' statistics."""
    return float(metric._compute_score_from_stats(statistics).score)


# huggingface_hub, datasets


def hub_address() -> str:
    """The URL of the hub (`HF_ENDPOINT`)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def hub_is_off() -> bool:
    """Whether only the hub's cache is used (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def set_hub_off(off: bool) -> None:
    """Use only the hub's cache from now on in this process, or the hub again; `HF_HUB_OFFLINE` is read at import alone."""
    from datasets import config
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = off
