"""Next-sentence prediction (BERT, arXiv 1810.04805): pairs of pieces of text, and a Trainer that adds its loss.

Each text is cut into an even number of pieces, which are paired in order, so that every token is in one pair. In half of
the pairs the second pieces then change places among each other: there it is of another text. The seed decides which, once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, List, Value
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from align.compat.trl import pending_metrics
from align.data.rows import Passage
from align.data.tokenize import IGNORE_INDEX
from align.encoders.mlm_trainer import MaskedTrainer
from align.encoders.tokenize import BATCH, even_parts, in_memory, word_numbers
from align.errors import UserError

FOLLOWS, OTHER_TEXT = 0, 1  # as transformers' `next_sentence_label`
TRIES = 100


class PairFormat:
    """A tokenizer's special tokens around a pair of texts, and the type of each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a", "a", return_token_type_ids=True)
        ids, types = whole["input_ids"], whole["token_type_ids"]
        starts = [place for place in range(len(ids)) if ids[place : place + len(bare)] == bare]
        first, second = starts[0], starts[-1]
        self.ends = (ids[:first], ids[first + len(bare) : second], ids[second + len(bare) :])
        self.types = (types[first], types[second])
        self.end_types = (types[:first], types[first + len(bare) : second], types[second + len(bare) :])

    def join(self, first: list[int], second: list[int], between: tuple[Sequence[int], ...]) -> list[int]:
        """Two lists with what stands before, between and after them."""
        return [*between[0], *first, *between[1], *second, *between[2]]


def tokenize_pairs(
    rows: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, length: int, seed: int, key: str, whole_words: bool
) -> Dataset:
    """`input_ids`, `token_type_ids`, `next_sentence_label`, `row`, `weight` (1) and perhaps `words` of pairs of pieces.

    A text of one token makes no pair.

    Args:
        length: maximum tokens of a pair, special tokens included.
        key: of the recipe, which names the texts, for errors.

    Raises:
        UserError: there is no room for two pieces, or too few texts of two tokens to take pieces of others from.
    """
    form = PairFormat(tokenizer)
    room = (length - sum(map(len, form.ends))) // 2
    if room < 1:
        raise UserError(
            f"max_length: {length} tokens leave no room for two pieces beside the special tokens; raise it."
        )
    firsts: list[tuple[int, list[int], list[int]]] = []
    seconds: list[tuple[int, list[int], list[int]]] = []
    for start in range(0, len(rows), BATCH):
        encoded = tokenizer([row.text for row in rows[start : start + BATCH]], add_special_tokens=False, verbose=False)
        for index, ids in enumerate(encoded["input_ids"]):
            if len(ids) < 2:
                continue
            words = word_numbers(encoded, index)
            parts = even_parts(len(ids), 2 * -(-len(ids) // (2 * room)))
            for place, part in enumerate(parts):
                (seconds if place % 2 else firsts).append((start + index, ids[part], words[part]))
    order, labels = draw_seconds([text for text, *_ in firsts], seed, key)

    def records() -> Iterator[dict[str, Any]]:
        for number, (_, ids, words) in enumerate(firsts):
            _, other_ids, other_words = seconds[order[number]]
            types = ([form.types[0]] * len(ids), [form.types[1]] * len(other_ids))
            record = {
                "input_ids": form.join(ids, other_ids, form.ends),
                "token_type_ids": form.join(*types, form.end_types),
                "next_sentence_label": labels[number],
                "row": number,
                "weight": 1,
            }
            if whole_words:
                shift = max(words, default=-1) + 1
                others = [word if word < 0 else word + shift for word in other_words]
                record["words"] = form.join(words, others, tuple([-1] * len(each) for each in form.ends))
            yield record

    features = {"input_ids": List(Value("int32")), "token_type_ids": List(Value("int8"))}
    features |= {"next_sentence_label": Value("int64"), "row": Value("int64"), "weight": Value("int32")}
    return in_memory(records(), features | ({"words": List(Value("int32"))} if whole_words else {}))


def draw_seconds(texts: Sequence[int], seed: int, key: str) -> tuple[list[int], list[int]]:
    """For each pair, which pair's second piece it gets, and the label: every second of the pairs gets one of another text.

    Args:
        texts: the text of each pair.

    Raises:
        UserError: most of the pairs are of one text.
    """
    generator = random.Random(f"{seed} next sentence")
    order = list(range(len(texts)))
    for _ in range(TRIES if len(texts) > 3 else 0):
        changed = generator.sample(order, len(texts) // 2)
        taken = generator.sample(changed, len(changed))
        for _ in range(TRIES):
            wrong = [
                place
                for place, (pair, other) in enumerate(zip(changed, taken, strict=True))
                if texts[pair] == texts[other]
            ]
            if not wrong:
                moved = dict(zip(changed, taken, strict=True))
                return [moved.get(pair, pair) for pair in order], [
                    OTHER_TEXT if pair in moved else FOLLOWS for pair in order
                ]
            for place in wrong:
                other = generator.randrange(len(taken))
                taken[place], taken[other] = taken[other], taken[place]
    raise UserError(
        f"{key}: next_sentence_prediction takes the second piece of half of the {len(texts)} pairs from other texts, and there are "
        "too few texts of two tokens or more for that; give more texts, or leave it out."
    )


class SentencePairTrainer(MaskedTrainer):
    """`MaskedTrainer` with the mean loss of next-sentence prediction added, exact over all pairs and ranks."""

    step_pairs: Tensor  # of the global batch
    pair_sums: Tensor  # of the evaluation: [loss, correct, pairs]

    def logits_of(self, output: Any) -> Tensor:
        logits: Tensor = output.prediction_logits
        return logits

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        pairs = torch.stack([_real(batch) for batch in batches]).sum().to(items.device)
        self.step_pairs = self.accelerator.reduce(pairs, "sum")
        return batches, items

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        following = batch.pop("next_sentence_label")
        loss, output = super().compute_loss(model, batch, True, num_items_in_batch)
        logits = output.seq_relationship_logits.float()
        total = cross_entropy(logits, following, ignore_index=IGNORE_INDEX, reduction="sum")
        pairs = self.step_pairs if self.model.training else _real(inputs)
        if not self.model.training:
            correct = (logits.argmax(dim=-1) == following).sum()
            self.pair_sums += torch.stack([total, correct, pairs]).double()
        loss = loss + total * self.accelerator.num_processes / (pairs + (pairs == 0))
        return (loss, output) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.pair_sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        return super().evaluate(*args, **kwargs)

    def add_exact_metrics(self, logs: dict[str, float]) -> None:
        super().add_exact_metrics(logs)
        loss, correct, pairs = self.accelerator.reduce(self.pair_sums, "sum").tolist()
        found = {"next_sentence_loss": [loss / pairs], "next_sentence_accuracy": [correct / pairs]}
        pending_metrics(self, "eval").update(found)


def _real(batch: Mapping[str, Tensor]) -> Tensor:
    """The number of pairs in a batch, without padding rows."""
    return (batch["next_sentence_label"] != IGNORE_INDEX).sum()
