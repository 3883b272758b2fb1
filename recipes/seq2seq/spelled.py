"""A translation with a known answer: whole numbers below 10,000 to English words."""

from __future__ import annotations

import random
from collections.abc import Iterator

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
LIMIT = 10_000


def in_words(number: int) -> str:
    """`1042` to `one thousand forty two`."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f" {ONES[number % 10]}" if number % 10 else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    return f"{in_words(number // size)} {name}" + (f" {in_words(number % size)}" if number % size else "")


def rows(num_rows: int, seed: int, held_out: bool = False) -> Iterator[dict[str, str]]:
    """Numbers without repetition, `prompt` in digits and `completion` in words; a tenth of all is held out."""
    numbers = list(range(LIMIT))
    random.Random(0).shuffle(numbers)
    numbers = numbers[: LIMIT // 10] if held_out else numbers[LIMIT // 10 :]
    for number in random.Random(seed).sample(numbers, num_rows):
        yield {"prompt": " ".join(str(number)), "completion": in_words(number)}
