"""Silence for the chatter of other libraries; their errors still come through."""

from __future__ import annotations

import logging
import os
import sys
import warnings

QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_LOGS": "-all",  # errors only
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
NOISY_LOGGERS = ("transformers", "trl", "accelerate", "datasets", "evaluate", "peft", "huggingface_hub")


def quiet() -> None:
    """Silence the chatter of other libraries; their errors still come through.

    Best called before they are imported, since some speak while they are. Whoever wants to hear one sets its own
    switch in the environment (`TRANSFORMERS_VERBOSITY=info`) or Python's (`-W default`), which are left alone.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its level and handler when it is imported; a filter put here before stays.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    # What is imported already has read its environment.
    if (transformers_logging := sys.modules.get("transformers.utils.logging")) is not None:
        transformers_logging.disable_progress_bar()
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.disable_progress_bars()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
