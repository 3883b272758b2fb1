"""What the server of tests/ranks.py imports before it forks: the stages, and the libraries that they import later."""

# ruff: noqa: E402, F401
import gc
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
imported: list[
    list[str]
] = []  # of the libraries of metrics, after each of some imports: for tests/evaluate/test_statistics.py


def look(*more: str) -> None:
    imported.append(sorted({"evaluate", "sklearn", "nltk", "sacrebleu", "rouge_score", *more} & set(sys.modules)))


import align.evaluate.statistics

look("datasets", "numpy", "torch")

from align.config.stages import STAGES

for stage in STAGES.values():
    importlib.import_module(stage.module)
look()

from align.evaluate.metrics import load_metric

for name in ("exact_match", "bleu"):
    load_metric(name).compute(predictions=["a"], references=["a"])
    look()

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # every DeepSpeed engine imports it, and with it torch's compiler
import peft
import psutil
import pytest
import rich.progress
import setuptools
import sklearn.metrics
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama
import trl.trainer.reward_trainer
import trl.trainer.sft_trainer
import wandb
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

# Tables that each process would build at its first model.
deepspeed.ops.__compatible_ops__  # noqa: B018
get_checkpoint_conversion_mapping("llama")

deepspeed.utils.nvtx.enable_nvtx = False  # a call to the profiler of GPUs around each of ZeRO's functions

gc.collect()
gc.freeze()  # or each full collection of a fork would walk through all of it
