"""Models, prompts and responses with a known amount of work, the same for every program that runs them.

A token is a word of a vocabulary of V and a count, its id modulo 1024. The policy follows each token by the one with the
next lower count, and count 0 by end-of-text, with a probability of nearly 1: the last token of a prompt sets the length
of the response. Apart from this the models are Llamas with random weights, with the cost of any of their size.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

COUNTS = 1024  # tokens of the longest response
PAD, BOS, EOS = 0, 1, 2  # the words of these three ids are never part of a countdown
SIZES = {  # hidden size, layers, heads, intermediate size, vocabulary: as of Pythia's small models, and Qwen2.5's smallest
    "1M": (64, 8, 4, 172, 4096),
    "10M": (128, 8, 4, 344, 32768),
    "60M": (512, 8, 8, 1376, 32768),
    "160M": (768, 12, 12, 3072, 50304),
    "0.5B": (896, 24, 14, 4864, 151936),
}
LOGIT = 40.0  # of the next token; the others' are about 0, the highest of them half of it


def config(size: str, positions: int) -> LlamaConfig:
    hidden, layers, heads, intermediate, vocabulary = SIZES[size]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=intermediate, max_position_embeddings=positions,
        tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip


def make_models(folder: Path, size: str, positions: int = 2048) -> dict[str, str]:
    """Write policy, value and reward model as Hugging Face folders; returns their paths by role."""
    torch.manual_seed(0)
    settings = config(size, positions)
    policy = LlamaForCausalLM(settings)
    with torch.no_grad():
        for layer in policy.model.layers:  # the residual branches must not drown the token embedding
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
        words = torch.nn.functional.normalize(torch.randn(settings.vocab_size, settings.hidden_size), dim=1)
        policy.model.embed_tokens.weight.copy_(words)
        policy.lm_head.weight.zero_()
        scale = LOGIT / settings.hidden_size**0.5  # the last norm gives the state a length of sqrt(hidden_size)
        after = torch.arange(COUNTS, settings.vocab_size)
        follower = torch.where(after % COUNTS == 0, EOS, after - 1)
        # Only one word of each count 0 can speak through the row of EOS: their average direction does.
        policy.lm_head.weight.index_add_(0, follower, words[after] * scale)
        ends = words[after[after % COUNTS == 0]]
        policy.model.embed_tokens.weight[after[after % COUNTS == 0]] = words[EOS] + 0.05 * ends
        policy.lm_head.weight[EOS] = words[EOS] * scale
    paths = {name: str(folder / name) for name in ("policy", "value", "reward")}
    tokenizer = make_tokenizer(settings.vocab_size, positions)
    policy.save_pretrained(paths["policy"])
    settings.num_labels = 1
    for name in ("value", "reward"):
        LlamaForSequenceClassification(settings).save_pretrained(paths[name])
    for path in paths.values():
        tokenizer.save_pretrained(path)
    return paths


def make_tokenizer(size: int, positions: int) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"w{i}": i for i in range(3, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=positions
    )


def write_prompts(
    path: Path, size: str, count: int, lengths: tuple[int, int], responses: tuple[int, int], seed: int = 0
) -> None:
    """JSON lines of `prompt`, with lengths of prompts and responses evenly distributed over the two ranges."""
    draw = random.Random(seed)
    vocabulary = SIZES[size][-1]
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            share = (row + 0.5) / count
            wanted = round(responses[0] + share * (responses[1] - responses[0]))
            last = draw.randrange(1, vocabulary // COUNTS) * COUNTS + (wanted - 1) % COUNTS
            body = [draw.randrange(COUNTS, vocabulary) for _ in range(draw.randint(*lengths) - 1)]
            file.write(json.dumps({"prompt": " ".join(f"w{i}" for i in [*body, last])}) + "\n")


def make_untrained(folder: Path, size: str, positions: int = 2048) -> None:
    """Write random models to train, `sft` and `reward`, as Hugging Face folders in this one."""
    settings = config(size, positions)
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(folder / "sft")
    settings.num_labels = 1
    LlamaForSequenceClassification(settings).save_pretrained(folder / "reward")
    for stage in ("sft", "reward"):
        make_tokenizer(settings.vocab_size, positions).save_pretrained(folder / stage)


def write_rows(
    path: Path,
    stage: str,
    size: str,
    count: int,
    prompts: tuple[int, int] = (16, 64),
    answers: tuple[int, int] = (8, 64),
) -> int:
    """JSON lines of demonstrations (`stage` sft) or pairs of random words; returns their number of tokens.

    Lengths are drawn evenly from the range of `prompts`; those of `answers` are log-uniform, so that most answers are short.
    """
    draw = random.Random(0)
    tokens = 0

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(3, SIZES[size][-1])}" for _ in range(length))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = draw.randint(*prompts)
            row = {"prompt": text(prompt)}
            for name in ("completion",) if stage == "sft" else ("chosen", "rejected"):
                length = round(answers[0] * (answers[1] / answers[0]) ** draw.random())
                row[name] = " " + text(length - 1)  # training appends EOS
                tokens += prompt + length
            file.write(json.dumps(row) + "\n")
    return tokens
