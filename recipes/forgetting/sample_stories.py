"""Sample stories from a model, as JSONL rows for `retention`.

    python recipes/forgetting/sample_stories.py MODEL stories.jsonl --count 1000 --seed 0

Sampled at temperature 1 from the begin-of-text token alone, without top-k or top-p. The model's expected loss on such text is
its entropy, and the excess loss of another model is KL(model || other), in nats per token. Stories that do not end within
`--max_new_tokens`, and duplicates, are dropped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH_SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("file", type=Path, help="where to write")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_new_tokens", type=int, default=480)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    begin = tokenizer.bos_token_id
    ends = {begin, tokenizer.eos_token_id}  # llama2.c trains on texts that end in the next text's begin-of-text token
    torch.manual_seed(arguments.seed)
    stories: dict[str, None] = {}
    while len(stories) < arguments.count:
        sampled = model.generate(
            torch.full((BATCH_SIZE, 1), begin),
            attention_mask=torch.ones(BATCH_SIZE, 1, dtype=torch.long),
            do_sample=True,
            top_k=0,
            max_new_tokens=arguments.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.eos_token_id,
        )
        for ids in sampled[:, 1:].tolist():
            end = next((place for place, token in enumerate(ids) if token in ends), None)
            if end is not None and (text := tokenizer.decode(ids[:end]).strip()):
                stories[text] = None
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in list(stories)[: arguments.count]]
    arguments.file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
