"""Accuracy of an encoder as reward model beside that of words alone, by five-fold cross-validation: each pair is judged by a model that
has not seen its dialogue or article.

    python recipes/trust/cross_validate.py PAIRS MODEL [--learning_rate 5e-5] [--epochs 3] [--response_only] [--help]

PAIRS is a JSONL file (may be gzipped) of `prompt`, `chosen` and `rejected`, each text or messages; MODEL is a folder, such as MiniLM's.
Prints a line after each epoch. The loss is Bradley-Terry's, the score a linear layer on the encoder's pooled output, the optimizer AdamW
with linear warm-up and decay. Meant for a GPU: there, all folds of 1,900 pairs take half a minute.
"""

import argparse
import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModel, AutoTokenizer

from align.data.rows import Preference
from align.judge.baselines import words_margins

FOLDS = 5
Row = dict[str, str]


def read(path: str) -> list[Row]:
    """Rows of text: the prompt, both responses, and the opening turn, which tells dialogues and articles apart."""
    rows = []
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            turns = [{"role": "user", "content": row["prompt"]}] if isinstance(row["prompt"], str) else row["prompt"]
            names = {"user": "Human: ", "assistant": "Assistant: "}
            prompt = "\n".join(names.get(turn["role"], "") + turn["content"] for turn in turns)
            sides = {
                side: row[side] if isinstance(row[side], str) else row[side][-1]["content"]
                for side in ("chosen", "rejected")
            }
            rows.append({"prompt": prompt, **sides, "opening": " ".join(turns[0]["content"].lower().split())})
    return rows


def folds(rows: list[Row]) -> np.ndarray:
    """The fold of each row: openings, in the order of their hashes, to the fold with the fewest rows so far."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["opening"]] += 1
    filled, fold = [0] * FOLDS, {}
    for opening in sorted(counts, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        fold[opening] = filled.index(min(filled))
        filled[fold[opening]] += counts[opening]
    return np.array([fold[row["opening"]] for row in rows])


def right(margins: np.ndarray) -> np.ndarray:
    return (margins > 0) + 0.5 * (margins == 0)


def compared(margins: np.ndarray, words: np.ndarray, rows: list[Row]) -> str:
    """Both accuracies and their paired difference; its standard error counts openings, not pairs."""
    differences = right(margins) - right(words)
    mean = differences.mean()
    sums: dict[str, float] = defaultdict(float)
    for row, difference in zip(rows, differences, strict=True):
        sums[row["opening"]] += difference - mean
    error = np.sqrt(sum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)) / len(rows)
    return (
        f"accuracy {right(margins).mean():.4f}, words alone {right(words).mean():.4f}, difference {mean:+.4f} with standard error "
        f"{error:.4f} ({len(rows)} pairs of {len(sums)} openings)"
    )


class Encoder:
    """The model and its tokenizer, from its folder for each fold."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(self, row: Row, side: str) -> list[int]:
        """[CLS] prompt [SEP] response [SEP]; the prompt is cut at its left, the response at its right."""
        cls, sep, room = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.args.max_length - 3
        plain = [
            self.tokenizer(row[name], add_special_tokens=False, verbose=False)["input_ids"] for name in ("prompt", side)
        ]
        response = plain[1][:room]
        prompt = [] if self.args.response_only else plain[0][max(len(plain[0]) - room + len(response), 0) :]
        return [cls, *prompt, sep, *response, sep] if prompt else [cls, *response, sep]

    def scores(self, rows: list[list[int]]) -> torch.Tensor:
        """[B] float32."""
        width = -(-max(map(len, rows)) // 32) * 32
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        mask = (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).long().to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            hidden = self.model(input_ids=ids, attention_mask=mask)
            weights = mask[..., None].to(hidden.last_hidden_state.dtype)
            mean = (hidden.last_hidden_state * weights).sum(1) / weights.sum(1)
            pooled = mean if self.args.pooling == "mean" else hidden.pooler_output
        return self.head(pooled.float()).squeeze(-1)

    def fit(self, training: list[list[list[int]]], judged: list[list[list[int]]], seed: int) -> Iterator[np.ndarray]:
        """Margins of the judged pairs after each epoch."""
        args, generator = self.args, np.random.default_rng(seed)
        self.model = AutoModel.from_pretrained(args.model, dtype=torch.float32).to(self.device).eval()  # no dropout
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(self.model.config.hidden_size, 1).to(self.device)
        torch.nn.init.normal_(self.head.weight, std=0.02)
        torch.nn.init.zeros_(self.head.bias)
        weights = [*self.model.parameters(), *self.head.parameters()]
        optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
        steps, step = args.epochs * -(-len(training) // args.batch), 0
        warmup = max(1, round(0.06 * steps))
        for _ in range(args.epochs):
            order = generator.permutation(len(training))
            for first in range(0, len(order), args.batch):
                pairs = [training[index] for index in order[first : first + args.batch]]
                chosen, rejected = self.scores([side for sides in zip(*pairs, strict=True) for side in sides]).chunk(2)
                (-logsigmoid(chosen - rejected).mean()).backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = args.learning_rate * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
            sides = [ids for pair in judged for ids in pair]
            order = np.argsort([len(ids) for ids in sides], kind="stable")
            scores = np.zeros(len(sides))
            with torch.no_grad():
                for some in np.array_split(order, -(-len(order) // 256)):
                    scores[some] = self.scores([sides[index] for index in some]).cpu().numpy()
            yield scores[0::2] - scores[1::2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs")
    parser.add_argument("model")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="pairs in an optimizer step")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of prompt and response")
    parser.add_argument("--pooling", choices=("cls", "mean"), default="cls")
    parser.add_argument("--response_only", action="store_true", help="leave the prompt out")
    args = parser.parse_args()
    rows = read(args.pairs)
    fold, words = folds(rows), np.zeros(len(rows))
    pairs = [Preference(prompt=row["prompt"], chosen=row["chosen"], rejected=row["rejected"], where="") for row in rows]
    encoder, margins = Encoder(args), np.zeros((args.epochs, len(rows)))
    ids = [[encoder.encode(row, side) for side in ("chosen", "rejected")] for row in rows]
    for held_out in range(FOLDS):
        training, judged = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        found = words_margins([pairs[i] for i in judged], None, [pairs[i] for i in training], seed=0)
        words[judged] = 0.0 if found is None else found[0]
        for epoch, found in enumerate(encoder.fit([ids[i] for i in training], [ids[i] for i in judged], held_out)):
            margins[epoch, judged] = found
    for epoch, found in enumerate(margins, start=1):
        print(f"epoch {epoch}: {compared(found, words, rows)}")


if __name__ == "__main__":
    main()
