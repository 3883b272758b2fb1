"""Continued pre-training of T5-like models by span corruption."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from align.cli.check.check import run as run_check
from align.config.encoders import MLMRecipe
from align.encoders.mlm import run
from align.encoders.span_corruption import SpanCorruption, noise_spans, sentinel_ids, span_counts
from align.encoders.text_infilling import TextInfilling, poisson_spans
from align.errors import UserError
from align.models.tokenizer import load_tokenizer
from tests.ranks import run_stage
from tests.worlds import LETTERS, deepspeed_file, measured, save_recipe, save_tiny_pair_model, trained, training_keys

SENTINELS = range(29, 39)  # <extra_id_9> is the first, as in T5's own vocabulary
TEXTS = [(LETTERS * 2)[i : i + 12 + i % 5] for i in range(12)]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("spans") / "base"
    save_tiny_pair_model(folder, "t5", vocab_size=39)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<extra_id_{number}>" for number in range(9, -1, -1)], special_tokens=True)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(t5: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(t5)


def recipe(folder: Path, base: str, **changes: Any) -> MLMRecipe:
    rows = [{"text": text} for text in TEXTS]
    keys = training_keys("mlm", folder, rows[:8], rows[8:]) | {"model_name_or_path": base, "max_length": 32}
    del keys["stage"]
    return MLMRecipe(**keys | changes)


def filled_in(source: list[int], target: list[int]) -> list[int]:
    """The text: each sentinel of the source replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    return [token for each in source for token in (spans[each] if each in SENTINELS else [each])]


class TestSpans:
    def test_the_code_of_t5(self) -> None:
        """Its numbers: round(n density) tokens in round(that / mean) spans, the last of which ends the text."""
        assert span_counts(512, 0.15, 3.0) == (77, 26)
        generator = np.random.default_rng(0)
        found = [noise_spans(512, 0.15, 3.0, generator) for _ in range(300)]
        for spans in found:
            assert len(spans) == 26
            assert sum(end - first for _, first, end in spans) == 77
            assert all(kept < first < end for kept, first, end in spans)
            assert [kept for kept, _, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
            assert spans[-1][2] == 512
        lengths = np.array([end - first for spans in found for _, first, end in spans])
        # All cuts are equally likely: a span is longer than one token with probability 1 - (25 / 76).
        assert lengths.mean() == pytest.approx(77 / 26)
        assert (lengths > 1).mean() == pytest.approx(1 - 25 / 76, abs=0.02)

    @pytest.mark.parametrize("length", [2, 3, 5, 17])
    @pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 1.0), (0.9, 2.0)])
    def test_short_texts(self, length: int, density: float, mean: float) -> None:
        spans = noise_spans(length, density, mean, np.random.default_rng(1))
        assert spans[-1][2] == length
        assert 1 <= sum(end - first for _, first, end in spans) <= length - 1

    def test_source_and_target_give_the_text_back(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert sentinel_ids(tokenizer) == list(SENTINELS)[::-1]
        spans = SpanCorruption(tokenizer, 0.5, 2.0, 0, 0)
        for piece, text in enumerate(TEXTS):
            ids = tokenizer(text)["input_ids"]
            source, target = spans.corrupt(ids, piece, 0)
            assert filled_in(source, target) == ids
            assert [token for token in target if token in SENTINELS] == [
                token for token in source if token in SENTINELS
            ]
            assert source[-1] == target[-1] == 2
            assert spans.corrupt(ids, piece, 0) == (source, target)
            assert spans.corrupt(ids, piece, 1) != (source, target)
        assert spans.corrupt([5, 2], 0, 0) == ([5, 2], [])

    def test_a_batch(self, tokenizer: PreTrainedTokenizerBase) -> None:
        spans = SpanCorruption(tokenizer, 0.3, 2.0, 0, 0)
        rows = [{"input_ids": tokenizer(text)["input_ids"], "row": i, "weight": i != 2} for i, text in enumerate(["abcdefghij", "kl", "mnop", "q"])]  # fmt: skip
        batch = spans(rows)
        for number in (0, 1):
            target = spans.corrupt(rows[number]["input_ids"], number, 0)[1]
            assert batch["labels"][number, : len(target)].tolist() == target
            assert batch["decoder_input_ids"][number, : len(target)].tolist() == [0, *target[:-1]]
        assert batch["weight"].tolist() == [*((batch["labels"][:2] != -100).sum(1).tolist()), 0, 0]


def test_the_loss_is_that_of_plain_transformers(tmp_path: Path, t5: str, tokenizer: PreTrainedTokenizerBase) -> None:
    settings = recipe(tmp_path, t5, max_steps=2, train_batch_size=8, per_device_train_batch_size=3, learning_rate=1e-3)
    result = run(settings)
    spans = SpanCorruption(tokenizer, 0.15, 3.0, settings.seed, 0)

    def loss(texts: list[str], draw: int | str) -> float:
        model, losses = AutoModelForSeq2SeqLM.from_pretrained(t5).eval(), []
        for piece, text in enumerate(texts):
            source, target = spans.corrupt(tokenizer(text)["input_ids"], piece, draw)
            logits = model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="none"))
        return float(torch.cat(losses).mean())

    assert result.metrics["eval_loss_before"] == pytest.approx(loss(TEXTS[8:], "evaluation"), abs=2e-6)
    assert measured(settings)[1]["train/loss"] == pytest.approx(loss(TEXTS[:8], 0), abs=2e-6)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


class TestTextInfilling:
    def test_spans_have_the_share_and_poissons_lengths_and_lie_anywhere(self) -> None:
        generator, sizes, hidden, expected = np.random.default_rng(0), list[int](), np.zeros(40), 0.0
        for _ in range(2000):
            spans = poisson_spans(40, 0.3, 3.0, generator)
            assert sum(end - first for first, end in spans) == 12
            assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
            assert 0 <= spans[0][0] <= spans[-1][1] <= 40
            assert len(spans) <= 12
            sizes += [end - first for first, end in spans[1:-1]]  # the first is not empty, and the last is cut
            expected += len(spans) / (
                28 + len(spans)
            )  # that a span is the first, or the last, of 28 tokens and the spans
            for first, end in spans:
                hidden[first:end] += 1
        assert hidden[[0, -1]] == pytest.approx(expected, abs=5 * 15)  # the standard error is 15
        # The lengths between are Poisson's, of spans that ended before the 12 were reached: shorter than its mean of 3.
        assert min(sizes) == 0
        assert 1.5 < np.mean(sizes) < 3
        long = poisson_spans(100_000, 0.3, 3.0, generator)[:-1]
        lengths = np.bincount([end - first for first, end in long]) / len(long)
        for count in range(7):  # e^-3 3^k / k!, of about 10,000 spans
            assert lengths[count] == pytest.approx(math.exp(-3) * 3**count / math.factorial(count), abs=0.02)

    @pytest.mark.parametrize(("length", "mean", "count"), [(2, 1.0, 1), (3, 1.0, 2), (30, 1.0, 15), (2, 9.0, 1)])
    def test_what_is_read_is_no_longer_than_the_text(self, length: int, mean: float, count: int) -> None:
        for seed in range(50):
            spans = poisson_spans(length, 0.5, mean, np.random.default_rng(seed))
            assert len(spans) <= sum(end - first for first, end in spans) == count

    def test_a_bart_writes_the_whole_text(self, tmp_path: Path) -> None:
        base = save_tiny_pair_model(tmp_path / "base", "bart", vocab_size=30)
        tokenizer = load_tokenizer(base)
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        tokenizer.save_pretrained(base)
        settings = recipe(tmp_path, base, max_steps=1, mlm_probability=0.3)
        result = run(settings)
        infilling = TextInfilling(tokenizer, 0.3, 3.0, settings.seed, 2)
        model, losses = AutoModelForSeq2SeqLM.from_pretrained(base).eval(), []
        for piece, text in enumerate(TEXTS[8:]):
            ids = tokenizer(text)["input_ids"]
            source, target = infilling.corrupt(ids, piece, "evaluation")
            assert target == ids
            kept = iter(ids)
            assert all(token in kept for token in source if token != 29)  # in the order of the text
            assert source.count(29) >= 1
            labels = torch.tensor([target])
            logits = model(input_ids=torch.tensor([source]), labels=labels).logits[0]  # which starts from </s>
            losses.append(torch.nn.functional.cross_entropy(logits, labels[0], reduction="none"))
        assert result.metrics["eval_loss_before"] == pytest.approx(float(torch.cat(losses).mean()), abs=2e-6)
        assert "by text infilling" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_two_ranks_train_the_same_model(tmp_path: Path, t5: str) -> None:
    settings = recipe(tmp_path, t5, max_steps=4, per_device_train_batch_size=1, save_steps=2)
    run(settings)
    file = deepspeed_file(tmp_path / "zero2.json", 2)
    shared = dataclasses.replace(settings, output_dir=str(tmp_path / "shared"), deepspeed=file)
    done = run_stage("mlm", save_recipe(shared, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mlm_probability": 0.9, "mean_noise_span_length": 1.0, "max_length": 40}, "a piece of 39 tokens has 4 spans, and the tokenizer 3 sentinels"),
        ({"model": "bart"}, "is an encoder-decoder whose tokenizer has neither sentinels"),
    ],
)  # fmt: skip
def test_models_without_enough_sentinels_are_refused_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], said: str
) -> None:
    base = save_tiny_pair_model(tmp_path / "base", keys.pop("model", "t5"), vocab_size=39)
    if "bart" not in said and "mlm_probability" in keys:
        few = load_tokenizer(base)
        few.add_tokens([f"<extra_id_{number}>" for number in range(3)], special_tokens=True)
        few.save_pretrained(base)
    refused = recipe(tmp_path, base, **keys)
    with pytest.raises(UserError, match=said):
        run(refused)
    file = save_recipe(refused, tmp_path / "recipe.yaml")
    file.write_text("stage: mlm\n" + file.read_text())
    assert run_check(str(file)) == 2
    assert said in " ".join(capsys.readouterr().out.split())
