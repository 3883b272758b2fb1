"""Small models, tokenizers and files for the tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from align.config.base import StageRecipe
from align.config.data_source import DataSource

R = TypeVar("R", bound=StageRecipe)
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


def manifest(stage: str, **keys: Any) -> dict[str, Any]:
    """What `stage.json` must hold of a finished stage, by the version that had no `schema_version`."""
    tokenizer = {"vocabulary": "0", "bos_token_id": 1, "eos_token_id": 2, "chat_template": None}
    return {"stage": stage, "recipe": {}, "inputs": {}, "tokenizer": tokenizer, "results": {}, **keys}


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def training_keys(stage: str, folder: Path, rows: list[dict], eval_rows: list[dict]) -> dict[str, Any]:
    """Keys of a recipe with steps of four rows each and a plain optimizer, without evaluation unless there are `eval_rows`."""
    return {
        "stage": stage,
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(folder / "base"),
        "train_dataset": [DataSource(path=write_jsonl(folder / "train.jsonl", rows))],
        "eval_dataset": [DataSource(path=write_jsonl(folder / "eval.jsonl", eval_rows))] if eval_rows else [],
        "eval_fraction": 0.0,
        "train_batch_size": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }


def claimed(recipe: R) -> R:
    """The recipe, after its output folder has been claimed, and its lock given back for the test to run something there."""
    from align.runs.manifest import open_stage  # here: the campaign makes its world on older trees too
    from align.runs.output_folder import release

    open_stage(recipe)
    release(Path(recipe.output_dir))
    return recipe


def unfinished(output_dir: str | Path) -> Path:
    """The output folder of a finished run as a SIGKILL just before its last line leaves it."""
    (Path(output_dir) / "stage.json").rename(Path(output_dir) / "run.json")
    return Path(output_dir)


def metrics(recipe: StageRecipe) -> list[dict]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]


def measured(recipe: StageRecipe) -> list[dict]:
    """Those lines without time and memory, which no two runs have alike."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time", "memory/"))}
        for line in metrics(recipe)
    ]


def trained(recipe: StageRecipe) -> dict[str, torch.Tensor]:
    """The weights that a run has written."""
    return load_file(Path(recipe.output_dir) / "model.safetensors")


def assert_same_training(ours: StageRecipe, theirs: StageRecipe) -> None:
    """Every line of metrics, counts of tokens among them, and the weights, to the rounding of sums in another order."""
    for mine, other in zip(measured(ours), measured(theirs), strict=True):
        assert mine == pytest.approx(other, abs=1e-5, rel=1e-6), mine["step"]
    assert any("train/num_tokens" in line for line in measured(ours))
    expected = trained(theirs)
    for name, weight in trained(ours).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0)


def letter_ids(text: str) -> list[int]:
    """Its ids by `letter_tokenizer`, without special tokens."""
    return [ord(letter) - ord("a") + 3 for letter in text]


def save_recipe(recipe: StageRecipe, path: Path) -> Path:
    """Write a recipe object as the file that a user would write."""
    path.write_text(yaml.safe_dump({k: v for k, v in dataclasses.asdict(recipe).items() if v is not None}))
    return path


def deepspeed_file(path: Path, stage: int, fetch_ahead: bool = False) -> str:
    """A DeepSpeed file that shards even tiny models.

    Args:
        fetch_ahead: at ZeRO 3, gather the parameters of several modules at once and keep them until the backward pass,
            as DeepSpeed does by default and which takes less time, instead of those of one module for its forward pass.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
        if fetch_ahead:
            zero |= {"stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": 1e7}
    sizes = dict.fromkeys(
        ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"],
        "auto",
    )
    path.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}, **sizes}), encoding="utf-8")
    return str(path)


def save_tiny_pair_model(folder: Path, kind: str = "t5", seed: int = 0, **changes: Any) -> str:
    """A random T5 (untied) or BART of the letters, whose tokenizer ends texts with </s>; BART's begins them with <s> too."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 29}
    sizes = {"d_model": 32, "dropout_rate": 0.1, "tie_word_embeddings": False, "initializer_factor": 0.5}
    model: Any
    if kind == "t5":
        heads = {"num_heads": 4, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2}
        config = T5Config(**{**ids, **sizes, **heads, "decoder_start_token_id": 0, **changes})
        model = T5ForConditionalGeneration(config)
        model.lm_head.weight.data.mul_(0.2)
    else:
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
        own = {"d_model": 32, "init_std": 0.2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
        model = BartForConditionalGeneration(BartConfig(**{**ids, **layers, **heads, **own, **changes}))
    model.eval().save_pretrained(folder)
    tokenizer = letter_tokenizer()
    begins = "<s> " * (kind == "bart")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begins}$A </s>", pair=f"{begins}$A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    return str(folder)
