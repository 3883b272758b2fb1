"""Data sets from scored samples: the best responses for SFT, random responses as a control, and preference pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.best_of_n.progress import Sample
from align.config.data_source import ROW_COLUMNS
from align.data.end_tokens import without_end
from align.data.reasoning import split_sampled, with_marks
from align.data.rows import Prompt, as_response
from align.data.token_ids import decode_response

BEST, RANDOM, PAIRS, RESPONSES = "best.jsonl", "random.jsonl", "pairs.jsonl", "responses.jsonl"
# Columns of the prompts' rows that would have another meaning in a row with a response.
RESERVED_COLUMNS = {*ROW_COLUMNS, "weight"} - {"tools"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A sample with its text. `usable`: it ends and has an answer, so that a stage can train on it."""

    sample: Sample
    text: str
    usable: bool


def data_sets(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[Prompt, list[int]]],
    groups: Sequence[Sequence[Sample]],
    rejected: str,
    seed: int,
) -> dict[str, list[str]]:
    """The lines of each data set, by file.

    A prompt has a row in `best.jsonl` and `random.jsonl` if one of its responses is usable; of equal scores, the first is the
    best. It has a pair in `pairs.jsonl` if another usable response has a lower score. Other columns of the prompts are kept,
    except those that would name a response.

    Args:
        groups: the samples of each prompt.
        rejected: "worst" or "random".
    """
    lines: dict[str, list[str]] = {BEST: [], RANDOM: [], PAIRS: [], RESPONSES: []}
    for index, ((prompt, prompt_ids), group) in enumerate(zip(prompts, groups, strict=True)):
        choices = [_choice(tokenizer, prompt, prompt_ids, sample) for sample in group]
        lines[RESPONSES] += [
            _line(prompt, {"completion": as_response(prompt.prompt, each.text), **_measures(each.sample, each.usable)})
            for each in choices
        ]
        if not (usable := [each for each in choices if each.usable]):
            continue
        best = max(usable, key=lambda each: each.sample.score)
        drawn = random.Random(f"{seed} control {index}").choice(usable)
        for name, each in ((BEST, best), (RANDOM, drawn)):
            row = {"completion": as_response(prompt.prompt, each.text), "score": each.sample.score}
            lines[name].append(_line(prompt, row))
        if worse := [each for each in usable if each.sample.score < best.sample.score and each.text != best.text]:
            other = min(worse, key=lambda each: each.sample.score)
            if rejected == "random":
                other = random.Random(f"{seed} rejected {index}").choice(worse)
            pair = {
                "chosen": as_response(prompt.prompt, best.text),
                "rejected": as_response(prompt.prompt, other.text),
                "score_chosen": best.sample.score,
                "score_rejected": other.sample.score,
            }
            lines[PAIRS].append(_line(prompt, pair))
    return lines


def count_left_out(lines: dict[str, list[str]], size: int) -> dict[str, int]:
    """The number of prompts without a row in `best.jsonl` and `random.jsonl`, or in `pairs.jsonl`, by reason.

    Args:
        lines: from `data_sets`.
        size: responses to a prompt.
    """
    responses = [json.loads(line) for line in lines[RESPONSES]]
    groups = [responses[start : start + size] for start in range(0, len(responses), size)]
    unused = [group for group in groups if not any(each["usable"] for each in group)]
    endless = sum(not any(each["ended"] for each in group) for group in unused)
    reasons = {
        f"{BEST}, {RANDOM}, {PAIRS}: no response ended by itself within response_length": endless,
        f"{BEST}, {RANDOM}, {PAIRS}: no response that ended has an answer": len(unused) - endless,
        f"{PAIRS} only: no second usable response with a lower score": len(lines[BEST]) - len(lines[PAIRS]),
    }
    return {reason: count for reason, count in reasons.items() if count}


def _choice(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, prompt_ids: list[int], sample: Sample) -> Choice:
    text = decode_response(tokenizer, prompt.prompt, prompt_ids, sample.ids)
    _, answer = split_sampled(tokenizer, text, prompt_ids, sample.ids)
    whole = with_marks(tokenizer, text, without_end(tokenizer, sample.ids))
    return Choice(sample, whole, sample.ended and bool(answer.strip()))


def _measures(sample: Sample, usable: bool) -> dict[str, Any]:
    return {
        "score": sample.score,
        "judge": sample.judge,
        "source_scores": sample.sources,
        "length": len(sample.ids),
        "ended": sample.ended,
        "usable": usable,
    }


def _line(prompt: Prompt, columns: dict[str, Any]) -> str:
    kept = {name: value for name, value in prompt.extra.items() if name not in RESERVED_COLUMNS}
    return json.dumps({**kept, "prompt": prompt.prompt, **columns}, ensure_ascii=False, default=str) + "\n"
