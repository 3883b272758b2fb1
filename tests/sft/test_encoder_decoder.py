"""SFT, evaluation and generation of encoder-decoders, against plain transformers on the same text."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    FSMTConfig,
    LEDConfig,
    MBartConfig,
    ProphetNetConfig,
    SwitchTransformersConfig,
    T5Config,
)

from align.cli.check.check import run as run_check
from align.cli.merge import run as merge
from align.config.evaluate import EvaluateRecipe
from align.config.sft import SFTRecipe
from align.data.encoder_decoder import source_ids, tokenize_pairs
from align.data.rows import Demonstration
from align.errors import UserError
from align.evaluate.compare import run as evaluate
from align.generation.encoder_decoder import answer_batch
from align.models.check_files import check_files
from align.models.encoder_decoder import (
    check_answers_fit,
    check_reads_no_padding,
    check_starts_and_ends,
    side_positions,
)
from align.models.load import load_policy
from align.models.small_model import small_model
from align.models.tokenizer import load_tokenizer
from align.models.trainable import freeze
from align.models.virtual_tokens import load_language_model
from align.sft.encoder_decoder import PairCollator
from align.sft.train import run
from tests.ranks import run_stage
from tests.worlds import (
    LETTERS,
    deepspeed_file,
    measured,
    save_recipe,
    save_tiny_pair_model,
    trained,
    training_keys,
    write_jsonl,
)

ROWS = [{"prompt": LETTERS[i : i + 1 + i % 4], "completion": LETTERS[i : i + 1 + i % 3][::-1]} for i in range(12)]
KINDS = ("t5", "bart")


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pair_model(tmp_path_factory.mktemp(request.param) / "base", request.param)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_pair_model(tmp_path_factory.mktemp("one") / "base", "t5")


def recipe(folder: Path, base: str, **changes: Any) -> SFTRecipe:
    keys = training_keys("sft", folder, ROWS[:8], ROWS[8:]) | {"model_name_or_path": base, "learning_rate": 0.1}
    del keys["stage"]
    return SFTRecipe(**keys | changes)


def plain_losses(folder: str, rows: Sequence[dict[str, str]], model: Any = None) -> list[Tensor]:
    """-log p of each token of the completions, its end included, by transformers' own forward pass of each row alone."""
    model = model or AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in rows:
        labels = tokenizer(text_target=row["completion"], return_tensors="pt")["input_ids"]
        logits = model(**tokenizer(row["prompt"], return_tensors="pt"), labels=labels).logits
        losses.append(-logits[0].log_softmax(-1).gather(1, labels[0][:, None])[:, 0])
    return losses


class TestLoss:
    @pytest.mark.parametrize(
        ("kind", "normalization"),
        [
            ("t5", "token_mean"),
            ("bart", "example_mean"),
            pytest.param("t5", "example_mean", marks=pytest.mark.slow),
            pytest.param("bart", "token_mean", marks=pytest.mark.slow),
        ],
    )
    def test_the_update_is_that_of_plain_transformers(self, tmp_path: Path, kind: str, normalization: str) -> None:
        base = save_tiny_pair_model(tmp_path / "base", kind)
        # One step of four microbatches of one and two rows; the gradient of the loss of eight rows, each alone, by hand.
        settings = {"loss_normalization": normalization, "max_steps": 1, "train_batch_size": 8, "learning_rate": 1.0}
        once = recipe(tmp_path, base, per_device_train_batch_size=2, adam_epsilon=1.0, **settings)
        result = run(once)
        model = AutoModelForSeq2SeqLM.from_pretrained(base).eval()
        losses = plain_losses(base, ROWS[:8], model)
        loss = (
            torch.cat(losses).mean()
            if normalization == "token_mean"
            else torch.stack([x.mean() for x in losses]).mean()
        )
        assert measured(once)[1]["train/loss"] == pytest.approx(float(loss), abs=2e-6)
        loss.backward()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, eps=1.0)  # g / (|g| + 1)
        optimizer.step()
        for name, weight in trained(once).items():
            torch.testing.assert_close(weight, model.state_dict()[name], atol=2e-6, rtol=0, msg=name)
        held_out = torch.cat(plain_losses(base, ROWS[8:]))
        assert result.metrics["eval_loss_before"] == pytest.approx(float(held_out.mean()), abs=2e-6)

    def test_label_smoothing(self, tmp_path: Path, t5: str) -> None:
        smoothed = recipe(tmp_path, t5, label_smoothing_factor=0.3, max_steps=1, eval_dataset=[], train_batch_size=8)
        run(smoothed)
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(t5).eval(), AutoTokenizer.from_pretrained(t5)
        sums = []
        for row in ROWS[:8]:
            labels = tokenizer(text_target=row["completion"], return_tensors="pt")["input_ids"]
            logits = model(**tokenizer(row["prompt"], return_tensors="pt"), labels=labels).logits[0]
            sums.append(torch.nn.functional.cross_entropy(logits, labels[0], label_smoothing=0.3, reduction="none"))
        assert measured(smoothed)[0]["train/loss"] == pytest.approx(float(torch.cat(sums).mean()), abs=2e-6)


class TestRows:
    def test_source_and_target_are_those_of_the_tokenizer(self, base: str) -> None:
        tokenizer = load_tokenizer(base)
        rows = [Demonstration(row["prompt"], row["completion"], "f:1") for row in ROWS]
        data, _ = tokenize_pairs(rows, tokenizer, max_length=8)
        for row, ids in zip(ROWS, data, strict=True):
            assert ids["input_ids"] == tokenizer(row["prompt"])["input_ids"]
            assert ids["labels"] == tokenizer(text_target=row["completion"])["input_ids"]
            assert ids["labels"].index(2) == len(ids["labels"]) - 1

    def test_a_completion_gets_one_end_where_the_tokenizer_adds_none(self, t5: str) -> None:
        tokenizer = load_tokenizer(t5)
        tokenizer.backend_tokenizer.post_processor = None
        rows = [Demonstration("ab", "c", "f:1"), Demonstration("ab", "c</s>", "f:2")]
        data, _ = tokenize_pairs(rows, tokenizer, max_length=8)
        assert data["labels"][:] == [[5, 2], [5, 2]]

    def test_a_prompt_that_begins_with_bos_itself_has_one(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(save_tiny_pair_model(tmp_path, "bart"))
        assert source_ids(tokenizer, "<s>ab") == source_ids(tokenizer, "ab") == [1, 3, 4, 2]

    def test_messages_by_the_template_else_as_plain_text(self, t5: str) -> None:
        tokenizer = load_tokenizer(t5)
        user, first, more = ({"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"})  # fmt: skip
        dialogue = Demonstration([user, first, more], [{"role": "assistant", "content": "e"}], "f:1", trained_turns=2)
        short = Demonstration([user], [first], "f:1")
        assert tokenize_pairs([short], tokenizer, max_length=8)[0][0] == {"input_ids": [3, 4, 2], "labels": [5, 2]}
        tokenizer.chat_template = (
            "{% for m in messages %}{{ 'u' if m.role == 'user' else 'v' }}{{ m.content }}{{ eos_token if m.role != 'user' }}"
            "{% endfor %}{% if add_generation_prompt %}v{% endif %}"
        )
        data, _ = tokenize_pairs([dialogue], tokenizer, max_length=9)  # each trained turn is an example
        u, v = (3 + LETTERS.index(letter) for letter in "uv")
        assert data["input_ids"][:] == [[u, 3, 4, v], [u, 3, 4, v, 5, 2, u, 6, v]]
        assert data["labels"][:] == [[5, 2], [7, 2]]

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"text": "abc"}, "no prompt for the encoder to read; .* mlm stage"),
            ({"prompt": "abcdefgh", "completion": "a"}, r"longer than 8 tokens \(`max_length`\)"),
            ({"prompt": "a", "completion": "abcdefgh"}, r"longer than 8 tokens \(`max_length`\)"),
            ({"prompt": "a", "completion": "b</s>c"}, "the text of the end-of-text token </s> inside the response"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, t5: str, row: dict[str, str], reason: str) -> None:
        bad = recipe(tmp_path, t5, max_length=8)
        write_jsonl(tmp_path / "train.jsonl", [row])
        with pytest.raises(UserError, match=reason):
            run(bad)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"packing": True}, "packing: the model is an encoder-decoder"),
        ({"padding_free": True}, "padding_free: the model is an encoder-decoder"),
        ({"completion_only_loss": False}, "completion_only_loss: the model is an encoder-decoder"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: the model is an encoder-decoder"),
        ({"max_length": 100, "eval_dataset": []}, "the longest prompt has 71 tokens, and the model reads at most 64"),
    ],
)  # fmt: skip
def test_keys_that_cannot_apply_are_refused_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], said: str
) -> None:
    base = save_tiny_pair_model(tmp_path / "bart", "bart")
    refused = recipe(tmp_path, base, **keys)
    if "max_length" in keys:
        write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a" * 69, "completion": "b"}])
    with pytest.raises(UserError, match=said):
        run(refused)
    file = save_recipe(refused, tmp_path / "recipe.yaml")
    file.write_text("stage: sft\n" + file.read_text())
    assert run_check(str(file)) == 2
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_model_that_reads_padding_is_refused() -> None:
    with pytest.raises(UserError, match="model: p: a model of type prophetnet reads the padding of a batch"):
        check_reads_no_padding(ProphetNetConfig(), "model", "p")
    check_reads_no_padding(MBartConfig(), "model", "p")


def test_a_padding_row_of_a_model_whose_decoder_starts_from_the_last_label(t5: str) -> None:
    tokenizer = load_tokenizer(t5)
    collate = PairCollator(tokenizer, small_model(MBartConfig(pad_token_id=0), 29), example_mean=False)
    batch = collate([{"input_ids": [3, 2], "labels": [4, 5, 2]}, {"input_ids": [3, 2], "labels": [-100, -100]}])
    assert batch["weight"].tolist() == [3, 0]
    assert batch["labels"].tolist() == [[4, 5, 2], [-100] * 3]
    assert batch["decoder_input_ids"][0].tolist() == [2, 4, 5]


def test_the_losses_of_a_router_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for config, said in ((SwitchTransformersConfig(), True), (T5Config(), False)):
        check_files(AutoModelForSeq2SeqLM, "on/the_hub", "model", config, trained_by=recipe(tmp_path, "on/the_hub"))
        assert (
            "note: model: on/the_hub: the losses of the router of this switch_transformers" in capsys.readouterr().err
        ) == said


def test_starts_ends_and_lengths(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tiny_pair_model(tmp_path, "t5"))
    with pytest.raises(UserError, match=r"model: p: its config.json has no decoder_start_token_id"):
        check_starts_and_ends(T5Config(), tokenizer, "model", "p")
    check_starts_and_ends(MBartConfig(), tokenizer, "model", "p")
    with pytest.raises(UserError, match="model: p: transformers' fsmt has two vocabularies"):
        check_starts_and_ends(FSMTConfig(), tokenizer, "model", "p")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="model: p: the tokenizer has no end-of-text token"):
        check_starts_and_ends(MBartConfig(), tokenizer, "model", "p")
    assert side_positions(LEDConfig()) == (16384, 1024)
    assert side_positions(T5Config()) == (None, None)
    with pytest.raises(
        UserError, match="response_length: the decoder writes at most 1024 tokens, got 1025; lower it, or x"
    ):
        check_answers_fit([[5] * 2000], 1025, LEDConfig(), "x")


class TestMethods:
    @pytest.mark.parametrize(
        "method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "ia3"))]
    )
    def test_merged_equals_unmerged(self, tmp_path: Path, t5: str, method: str) -> None:
        run(recipe(tmp_path, t5, method=method, max_steps=3))
        unmerged = PeftModel.from_pretrained(
            AutoModelForSeq2SeqLM.from_pretrained(t5), str(tmp_path / "out" / "adapter")
        )
        found, merged = (
            torch.cat(plain_losses(str(tmp_path / "out"), ROWS, model)) for model in (unmerged.eval(), None)
        )
        torch.testing.assert_close(merged, found, atol=1e-5, rtol=0)
        assert (merged - torch.cat(plain_losses(t5, ROWS))).abs().max() > 0.01
        merge(str(tmp_path / "out" / "adapter"), str(tmp_path / "merged"))
        torch.testing.assert_close(torch.cat(plain_losses(str(tmp_path / "merged"), ROWS)), merged, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("kind", [pytest.param("t5", marks=pytest.mark.slow), "bart"])
    @pytest.mark.parametrize("method", ["prompt", "prefix"])
    def test_virtual_tokens(self, tmp_path: Path, kind: str, method: str) -> None:
        base, out = save_tiny_pair_model(tmp_path / "base", kind), str(tmp_path / "out")
        result = run(recipe(tmp_path, base, method=method, max_steps=4, num_virtual_tokens=3))
        model: Any = load_language_model(out).eval()
        tokenizer = load_tokenizer(out)
        plain = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), out).eval()
        losses = torch.cat(plain_losses(base, ROWS[8:], plain))
        assert result.metrics["eval_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
        assert abs(float(losses.mean()) - result.metrics["eval_loss_before"]) > 1e-3
        # Its greedy responses are those of the forward pass that was trained, token by token.
        sources = [tokenizer(row["prompt"])["input_ids"] for row in ROWS[:4]]
        answers = answer_batch(model, tokenizer, sources, torch.zeros(4, 6), 0.0)
        for source, answer in zip(sources, answers, strict=True):
            labels = torch.tensor([answer])
            best = plain(input_ids=torch.tensor([source]), labels=labels).logits[0].argmax(-1)
            assert best.tolist() == answer

    def test_frozen_layers_are_the_lowest_of_both_sides(self, t5: str) -> None:
        model = load_policy(t5, auto=AutoModelForSeq2SeqLM)
        freeze(model, model.get_output_embeddings(), "freeze", freeze_layers=1)
        frozen = {
            name.rpartition(".layer.")[0] for name, weight in model.named_parameters() if not weight.requires_grad
        }
        assert frozen == {"encoder.block.0", "decoder.block.0"}  # the embedding is the head, too
        with pytest.raises(UserError, match="freeze_layers: expected at most 2"):
            freeze(model, model.get_output_embeddings(), "freeze", freeze_layers=3)


class TestAnswers:
    def test_greedy_ones_are_those_of_transformers(self, base: str) -> None:
        model = load_policy(base, auto=AutoModelForSeq2SeqLM).eval()
        tokenizer = load_tokenizer(base)
        sources = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
        expected = [
            model.generate(torch.tensor([ids]), do_sample=False, num_beams=1, max_new_tokens=7)[0, 1:].tolist()
            for ids in sources
        ]
        model.generation_config.update(num_beams=3, no_repeat_ngram_size=1, min_length=6, length_penalty=2.0)
        assert answer_batch(model, tokenizer, sources, torch.zeros(len(sources), 7), 0.0) == expected
        assert model.generation_config.num_beams == 3

    def test_sampled_ones_depend_on_their_own_noise_alone(self, base: str) -> None:
        model = load_policy(base, auto=AutoModelForSeq2SeqLM).eval()
        tokenizer = load_tokenizer(base)
        sources = [tokenizer(row["prompt"])["input_ids"] for row in ROWS]
        noise = torch.rand(len(sources), 7, generator=torch.Generator().manual_seed(1))
        together = answer_batch(model, tokenizer, sources, noise, 0.8)
        alone = [answer_batch(model, tokenizer, [ids], noise[i : i + 1], 0.8)[0] for i, ids in enumerate(sources)]
        assert together == alone != answer_batch(model, tokenizer, sources, noise, 0.0)
        for source, answer, draws in zip(sources, together, noise, strict=True):  # by inverse transform sampling
            logits = model(input_ids=torch.tensor([source]), labels=torch.tensor([answer])).logits[0] / 0.8
            below = logits.softmax(-1).cumsum(-1) <= draws[: len(answer), None]
            assert below.sum(-1).tolist() == answer


@pytest.mark.parametrize("kind", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_evaluate_scores_and_answers_as_transformers(tmp_path: Path, kind: str) -> None:
    base = save_tiny_pair_model(tmp_path / "base", kind)
    rows = recipe(tmp_path, base).eval_dataset
    keys: dict[str, Any] = {"models": {"m": base}, "metrics": ["perplexity", "exact_match"], "max_new_tokens": 5}
    compared = evaluate(
        EvaluateRecipe(output_dir=str(tmp_path / "e"), eval_dataset=rows, per_device_eval_batch_size=3, **keys)
    )
    assert compared is not None
    losses = torch.cat(plain_losses(base, ROWS[8:]))
    assert compared.value("perplexity", model="m") == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    lines = [json.loads(line) for line in (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()]
    for row, line in zip(ROWS[8:], lines, strict=True):
        ids = model.generate(**tokenizer(row["prompt"], return_tensors="pt"), max_new_tokens=5, do_sample=False)
        assert line["prediction"] == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_a_run_resumes_to_the_same_weights_to_the_bit(tmp_path: Path, t5: str) -> None:
    settings = recipe(tmp_path, t5, max_steps=5, save_steps=2, eval_metrics=["exact_match"], response_length=4)
    results, weights = run(settings), trained(settings)
    lines = measured(settings)
    for name in ("stage.json", "model.safetensors"):
        (tmp_path / "out" / name).rename(tmp_path / "out" / {"stage.json": "run.json"}.get(name, "../gone"))
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert run(settings) == results
    assert measured(settings) == lines
    assert all(torch.equal(weight, trained(settings)[name]) for name, weight in weights.items())


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_train_the_same_model(tmp_path: Path, t5: str, zero: int) -> None:
    settings = recipe(
        tmp_path, t5, max_steps=3, per_device_train_batch_size=1, per_device_eval_batch_size=2, max_grad_norm=1.0,
        eval_metrics=["exact_match"], response_length=4, learning_rate=1e-2,
    )  # fmt: skip
    results = run(settings)
    file = deepspeed_file(tmp_path / "zero.json", zero)
    shared = dataclasses.replace(settings, output_dir=str(tmp_path / "shared"), deepspeed=file)
    done = run_stage("sft", save_recipe(shared, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=2e-5, rtol=0)
    assert measured(shared)[-1]["eval/loss"] == pytest.approx(results.metrics["eval_loss"], abs=1e-5)
    assert [line["train/num_tokens"] for line in measured(shared) if "train/num_tokens" in line] == [
        line["train/num_tokens"] for line in measured(settings) if "train/num_tokens" in line
    ]


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_from_scratch_it_learns_to_reverse(tmp_path: Path, kind: str) -> None:
    sizes = {"t5": {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 64}, "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}}  # fmt: skip
    config = {"model_type": kind, **sizes[kind]}
    scratch = recipe(tmp_path, "", model_name_or_path=None, model_config=config, tokenizer_vocab_size=270, max_steps=4)
    result = run(scratch)
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    losses = torch.cat(plain_losses(str(tmp_path / "out"), ROWS[8:]))
    assert result.metrics["eval_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
