"""Encoder-decoders: losses, answers and scores against plain transformers, and the recipes of the stages that take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from align.cli.architectures.cases import random_prompts
from align.cli.architectures.stages import ANSWERS, PROMPTS, RECIPES, write_recipes
from align.data.collate import pad_right
from align.data.encode import encode_pair
from align.data.tokenize import IGNORE_INDEX
from align.generation.encoder_decoder import answer_batch
from align.maths.losses import token_logprobs
from align.models.load import load_config, load_policy
from align.models.tokenizer import load_tokenizer
from align.sft.encoder_decoder import PairCollator
from reward_models.heads import score_sequences
from reward_models.load import load_reward_model

SOURCES, TARGETS = (5, 11, 2, 8), (3, 9, 1, 12)  # tokens of each
LENGTH = 8  # of an answer


@torch.no_grad()
def measure_pairs(folder: str) -> tuple[dict[str, float], int]:
    """Largest gaps of log-probabilities, nats, of a padded batch as SFT makes it: of any token, and of its mean.

    Returns:
        the gaps `padded` and `loss`, and the number of the model's parameters.
    """
    tokenizer = load_tokenizer(folder)
    model = load_policy(folder, auto=AutoModelForSeq2SeqLM).train()  # nothing is dropped out
    ids = random_prompts(len(tokenizer), SOURCES + TARGETS)
    rows = [{"input_ids": source, "labels": target} for source, target in zip(ids[:4], ids[4:], strict=True)]
    batch = PairCollator(tokenizer, model, example_mean=False)(rows)
    labels, _ = batch.pop("labels"), batch.pop("weight")
    if "decoder_input_ids" not in batch:
        batch["labels"] = labels
    logprobs = token_logprobs(model(**batch).logits, labels.clamp(min=0), 1.0)
    parameters = sum(weight.numel() for weight in model.parameters())
    del model

    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    found, expected = [], []
    for row, label, logprob in zip(rows, labels, logprobs, strict=True):
        logits = plain(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).logits[0]
        expected.append(logits.float().log_softmax(-1).gather(1, torch.tensor(row["labels"])[:, None])[:, 0])
        found.append(logprob[label != IGNORE_INDEX])
    ours, alone = torch.cat(found), torch.cat(expected)
    return {"padded": _gap(ours, alone), "loss": abs(float(ours.mean() - alone.mean()))}, parameters


def write_pair_recipes(base: str, folder: Path) -> None:
    """Write the recipes of the stages that take an encoder-decoder, and their rows."""
    write_recipes(base, folder, packs=False, positions=None)
    (folder / RECIPES["ppo"]).unlink()


@torch.no_grad()
def check_answers(folder: str) -> None:
    """Check that plain transformers' greedy answers from a saved folder are those of the stages.

    Raises:
        ValueError: they are not.
    """
    tokenizer = load_tokenizer(folder)
    sources = random_prompts(len(tokenizer), SOURCES)
    model = load_policy(folder, auto=AutoModelForSeq2SeqLM).eval()
    ours = answer_batch(model, tokenizer, sources, torch.zeros(len(sources), LENGTH), 0.0)
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    for source, answer in zip(sources, ours, strict=True):
        ids = torch.tensor([source])
        settings = {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": LENGTH,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
        }
        found = plain.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, 1:].tolist()
        if found[: len(answer)] != answer:
            raise ValueError(f"transformers answers {source} by {found}, the stages by {answer}")


@torch.no_grad()
def measure_pair_scores(folder: str) -> dict[str, float]:
    """Largest gap of the scores of a padded batch, in units of the score."""
    tokenizer = load_tokenizer(folder)
    rows = [encode_pair(tokenizer, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    ids, mask = pad_right(rows, 0)
    ours = score_sequences(load_reward_model(folder), ids, mask)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    mean = float(getattr(load_config(folder, "--model", encoder_decoder=True), "score_mean", 0.0))
    alone = torch.tensor([float(plain(input_ids=torch.tensor([row])).logits) - mean for row in rows])
    return {"scores": _gap(ours, alone)}


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().max())
