"""Silence the log messages, warnings and progress bars of other libraries, except errors."""

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
    """Silence the log messages, warnings and progress bars of other libraries, except errors.

    Best called before they are imported, since some print while they are. A variable that is set in the environment
    (`TRANSFORMERS_VERBOSITY=info`), or Python's `-W default`, takes precedence.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its level and handler when it is imported; a filter put here before stays.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    # Libraries that are already imported have read their environment variables.
    if (transformers_logging := sys.modules.get("transformers.utils.logging")) is not None:
        transformers_logging.disable_progress_bar()
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.disable_progress_bars()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
