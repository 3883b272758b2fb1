"""What the server of tests/ranks.py imports before it forks: the libraries of every stage, then the stages."""

# ruff: noqa: F401
import gc
import importlib
import sys
from pathlib import Path

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # every DeepSpeed engine imports it, and with it torch's compiler
import evaluate
import peft
import psutil
import pytest
import rich.progress
import sacrebleu
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

sys.path.insert(0, str(Path(__file__).parents[2]))
from align.config.stages import STAGES  # noqa: E402

for stage in STAGES.values():
    importlib.import_module(stage.module)

gc.collect()
gc.freeze()  # or each full collection of a fork would walk through all of it
