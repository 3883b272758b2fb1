"""The objectives of the SFT stage: worked out by plain torch, and the same however rows are cut, packed or spread."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, ModernBertDecoderConfig

from align.config.load import load_recipe
from align.config.sft import SFTRecipe
from align.data.batches import ResumableLengthGroupedSampler
from align.data.tokenize import tokenize_demonstrations
from align.errors import UserError
from align.runs.checkpoint import complete_checkpoints
from align.sft.fused_head import HAS_FUSED_HEAD, fused_head_is_exact, token_scores
from align.sft.train import run
from align.sft.trainer import example_mean_weights
from tests.ranks import run_stage
from tests.sft.letter_rows import ROWS, SCRATCH, recipe
from tests.worlds import (
    deepspeed_file,
    letter_ids,
    letter_tokenizer,
    metrics,
    save_recipe,
    save_tiny_policy,
    tiny_llama,
    trained,
    write_jsonl,
)


def row_losses(model, rows) -> list[torch.Tensor]:
    """-log p of each label token of each row alone, without padding."""
    found = []
    for prompt, completion in rows:
        ids = torch.tensor([letter_ids(prompt) + letter_ids(completion) + [2]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        found.append(cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
    return found


OBJECTIVES = {
    "token_mean": lambda losses: torch.cat(losses).mean(),
    "example_mean": lambda losses: torch.stack([row.mean() for row in losses]).mean(),
}


def stepped(rows, objective, model=None) -> dict[str, torch.Tensor]:
    """The weights after one AdamW step with epsilon 1e-3, at which no gradient is too small to tell."""
    model = model or tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-3)
    OBJECTIVES[objective](row_losses(model, rows)).backward()
    optimizer.step()
    return model.state_dict()


def assert_weights(got, expected, tolerance=2e-5) -> None:
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=tolerance, rtol=0)


class TestByHand:
    """Examples of 2, 6 and 4 label tokens that lose 1 and 3, 0.5 each and 2 each."""

    nll = {"A": [1.0, 3.0], "B": [0.5] * 6, "C": [2.0] * 4}  # noqa: RUF012

    def objective(self, names, packed):
        """Sum of shares times losses over the examples' number, as the trainer makes it."""
        losses = [self.nll[name] for name in names]
        if packed:
            labels = torch.cat([torch.tensor([-100, *[1] * len(row)]) for row in losses])[None]
            positions = torch.cat([torch.arange(len(row) + 1) for row in losses])[None]
            batch = {"labels": labels, "position_ids": positions}
            values = torch.cat([torch.tensor([9.0, *row]) for row in losses])[None, 1:]
        else:
            width = max(map(len, losses)) + 1
            batch = {"labels": torch.tensor([[-100, *[1] * len(r), *[-100] * (width - 1 - len(r))] for r in losses])}
            values = torch.tensor([[*r, *[9.0] * (width - 1 - len(r))] for r in losses])
        shares = example_mean_weights(batch)
        return float((shares * values).sum() / shares.sum())

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(("names", "expected"), [("AB", 1.25), ("ABC", 1.5)])
    def test_example_mean(self, names, expected, packed):
        assert self.objective(names, packed) == pytest.approx(expected)

    def test_rows_without_a_label_count_for_nothing(self):
        shares = example_mean_weights({"labels": torch.tensor([[-100, 5, 6], [-100, -100, -100]])})
        assert shares.tolist() == [[0.5, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("objective", OBJECTIVES)
class TestOneStep:
    @pytest.mark.parametrize(
        "cut",
        [
            {"per_device_train_batch_size": 4},
            {"per_device_train_batch_size": 2},
            {"per_device_train_batch_size": 1},
            {"per_device_train_batch_size": 2, "padding_free": True},
            {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
        ],
    )
    def test_is_adamw_on_the_objective(self, tmp_path, objective, cut):
        settings = recipe(tmp_path, ROWS[:4], max_steps=1, loss_normalization=objective, adam_epsilon=1e-3, **cut)
        run(settings)
        expected = float(OBJECTIVES[objective](row_losses(tiny_llama(), ROWS[:4])))
        assert metrics(settings)[0]["train/loss"] == pytest.approx(expected, abs=1e-6)
        assert_weights(trained(settings), stepped(ROWS[:4], objective))

    @pytest.mark.parametrize("size", [1, 2])
    def test_packed_rows_are_the_same_examples(self, tmp_path, objective, size):
        """All eight examples, packed into rows of 16 tokens, in one step."""
        settings = recipe(tmp_path, max_length=16, packing=True, train_batch_size=4, per_device_train_batch_size=size,
                          max_steps=1, loss_normalization=objective, adam_epsilon=1e-3)  # fmt: skip
        run(settings)
        assert_weights(trained(settings), stepped(ROWS, objective))

    def test_two_ranks_do_what_one_does(self, tmp_path, objective):
        settings = recipe(tmp_path, max_length=16, packing=True, train_batch_size=4, per_device_train_batch_size=1,
                          max_steps=1, loss_normalization=objective, adam_epsilon=1e-3,
                          deepspeed=deepspeed_file(tmp_path / "ds.json", 2))  # fmt: skip
        done = run_stage("sft", save_recipe(settings, tmp_path / "sft.yaml"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert_weights(trained(settings), stepped(ROWS, objective))


@pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL 1.14, the last for Python 3.10, has no fused head")
def test_the_head_sees_label_tokens_alone(tmp_path, monkeypatch):
    from trl.trainer import utils

    apply, rows = utils._ChunkedLogProbFunction.apply, []

    def counted(states, *arguments):
        rows.append(len(states))
        return apply(states, *arguments)

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", SimpleNamespace(apply=counted))
    run(recipe(tmp_path))
    tried = rows.pop(0)  # before training, on a small model
    assert tried == 11
    assert sum(rows) == sum(len(completion) + 1 for _, completion in ROWS)  # and end-of-text
    assert not utils._use_triton(torch.device("cpu")), "TRL's own answer is back"


@pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL 1.14, the last for Python 3.10, has no fused head")
@pytest.mark.parametrize(
    ("config", "exact"),
    [(ModernBertDecoderConfig, False), (GraniteConfig, True), (Gemma2Config, True)],
)
def test_a_head_of_more_than_one_layer_is_not_fused(config, exact):
    """Log-probabilities of scaled and capped logits are TRL's own."""
    assert fused_head_is_exact(config()) is exact


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_a_model_whose_head_has_two_layers(tmp_path, objective):
    """ModernBERT's decoder: a linear layer, an activation and a norm before the output embeddings."""
    torch.manual_seed(0)
    config = ModernBertDecoderConfig(
        vocab_size=29, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    settings = recipe(tmp_path, ROWS[:4], max_steps=1, loss_normalization=objective, adam_epsilon=1e-3)
    run(settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert_weights(trained(settings), stepped(ROWS[:4], objective, model))


class TestWholeLogits:
    """What Python 3.10 has in place of TRL's fused head."""

    def test_by_hand(self):
        """Three tokens to predict, of which one counts: p = 3/4 and 1/4 and 0 of a third, of entropy log 4 - 3/4 log 3."""
        row = torch.tensor([0.0, -math.log(3), -math.inf])
        scores = token_scores(row.expand(1, 4, 3), torch.tensor([[1, -100, 0, 1]]))
        assert scores.label_mask.tolist() == [[False, True, True]]
        assert scores.is_top1.tolist() == [[False, True, False]]
        assert scores.log_probs[0].tolist() == pytest.approx([0, math.log(3 / 4), math.log(1 / 4)])
        assert scores.entropy[0].tolist() == pytest.approx([0, *[math.log(4) - 3 / 4 * math.log(3)] * 2])

    @pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL 1.14, the last for Python 3.10, has no fused head")
    def test_is_what_the_fused_head_gives(self):
        from trl.trainer.utils import add_fused_lm_head

        model = tiny_llama()
        ids = torch.tensor([[*letter_ids("abcdef"), 2], [*letter_ids("bca"), 2, 0, 0, 0]])
        labels = torch.where(ids == 0, -100, ids)
        labels[0, :3] = -100
        mine = token_scores(model(input_ids=ids).logits, labels)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        theirs = model(input_ids=ids, labels=labels, fused_lm_head=True)
        for name in ("log_probs", "entropy", "is_top1", "label_mask"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), atol=1e-6, rtol=0)

    def test_the_loss_of_a_mixture_of_experts_has_its_auxiliary_part(self, tmp_path):
        """Its mean over microbatches, by the configuration's coefficient."""
        lines = []
        for coefficient in (0.5, 0.0):
            settings = recipe(
                tmp_path, ROWS[:4], max_steps=1, per_device_train_batch_size=2, output_dir=f"{tmp_path}/{coefficient}",
                model_config={**SCRATCH, "model_type": "mixtral", "num_key_value_heads": 4, "num_local_experts": 4,
                              "router_aux_loss_coef": coefficient},
            )  # fmt: skip
            run(settings)
            lines.append(metrics(settings)[0])
        assert lines[0]["train/loss"] == pytest.approx(
            lines[1]["train/loss"] + 0.5 * lines[0]["train/aux_loss"], abs=1e-5
        )


class TestPacking:
    def test_a_long_text_is_cut_into_pieces_and_nothing_is_lost(self, tmp_path):
        text = "abcdefghijklmnopqrstuvwxyz"
        path = write_jsonl(tmp_path / "text.jsonl", [{"text": text}, {"text": "abc"}])
        save_tiny_policy(tmp_path / "base")
        (tmp_path / "sft.yaml").write_text(
            f"output_dir: {tmp_path}/out\nmodel_name_or_path: {tmp_path}/base\ntrain_dataset: {path}\neval_fraction: 0\n"
            "max_length: 10\npacking: true\ntrain_batch_size: 2\n"
        )
        settings = load_recipe("sft", str(tmp_path / "sft.yaml"))
        assert isinstance(settings, SFTRecipe)
        from align.data.batches import pack
        from align.data.load import DataSettings, load_rows
        from align.data.rows import Demonstration

        texts = load_rows(DataSettings.from_recipe(settings), Demonstration).train
        rows, bad = tokenize_demonstrations(texts, letter_tokenizer(), max_length=10, packing=True)
        assert not bad
        packed = pack(rows, 10)
        assert sorted(map(len, packed["input_ids"]), reverse=True) == [10, 10, 7, 4]  # 27 and 4 tokens
        assert sorted(t for row in packed["input_ids"] for t in row) == sorted(
            [*letter_ids(text), *letter_ids("abc"), 2, 2]
        )
        with pytest.raises(UserError, match=r"longer than 10 tokens \(`max_length`\)"):
            tokenize_demonstrations(texts, letter_tokenizer(), max_length=10)
        run(settings)

    def test_a_long_demonstration_is_still_a_bad_row(self, tmp_path):
        with pytest.raises(UserError, match=r"longer than 5 tokens"):
            run(recipe(tmp_path, packing=True, max_length=5))


class TestRegularisation:
    def test_label_smoothing(self, tmp_path):
        settings = recipe(tmp_path, ROWS[:4], max_steps=1, label_smoothing_factor=0.2, per_device_train_batch_size=2)
        run(settings)
        model = tiny_llama()
        total, count = 0.0, 0
        for prompt, completion in ROWS[:4]:
            ids = torch.tensor([letter_ids(prompt) + letter_ids(completion) + [2]])
            log_p = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            hit = log_p.gather(1, ids[0, len(prompt) :, None])[:, 0]
            total += float((-0.8 * hit - 0.2 * log_p.mean(-1)).sum())
            count += len(hit)
        assert metrics(settings)[0]["train/loss"] == pytest.approx(total / count, abs=1e-5)

    def test_noise_is_in_training_only(self, tmp_path):
        quiet = recipe(tmp_path, ROWS[:4], max_steps=1, eval_rows=[("a", "bc")], output_dir=str(tmp_path / "quiet"))
        noisy = dataclasses.replace(quiet, neftune_noise_alpha=50.0, output_dir=str(tmp_path / "noisy"))
        results = [run(settings) for settings in (quiet, noisy)]
        assert metrics(quiet)[1]["train/loss"] != pytest.approx(metrics(noisy)[1]["train/loss"], abs=1e-3)
        assert results[0].metrics["eval_loss_before"] == pytest.approx(results[1].metrics["eval_loss_before"], abs=1e-6)


class TestByLength:
    def test_rows_of_like_length_share_a_batch(self):
        torch.manual_seed(0)
        lengths = torch.randint(1, 100, (400,)).tolist()
        order = list(ResumableLengthGroupedSampler(lengths, 8, seed=3))
        assert sorted(order) == list(range(400))
        spreads = [
            max(lengths[i] for i in order[k : k + 8]) - min(lengths[i] for i in order[k : k + 8])
            for k in range(0, 400, 8)
        ]
        assert sum(spreads) / len(spreads) < 10, "a random batch of 8 spreads over 77"

    def test_the_order_changes_with_the_epoch_and_not_with_anything_else(self):
        sampler = ResumableLengthGroupedSampler(list(range(50)), 4, seed=3)
        first = list(sampler)
        torch.rand(7)
        assert list(sampler) == first
        sampler.set_epoch(1)
        assert list(sampler) != first

    def test_a_resumed_run_finds_its_place(self, tmp_path):
        """What a kill right after the checkpoint in the middle of the second epoch leaves behind."""
        whole = recipe(tmp_path, num_train_epochs=3, train_sampling_strategy="group_by_length", save_steps=3,
                       train_batch_size=2, per_device_train_batch_size=2, output_dir=str(tmp_path / "whole"))  # fmt: skip
        run(whole)
        cut = dataclasses.replace(whole, output_dir=str(tmp_path / "cut"), save_total_limit=9)
        run(cut)
        out = Path(cut.output_dir)
        for folder in complete_checkpoints(out):
            if folder.name != "checkpoint-6":
                shutil.rmtree(folder)
        manifest = out / "stage.json"
        manifest.rename(out / "run.json")
        run(cut)
        assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(cut).items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            "label_smoothing_factor: 0.1\nloss_normalization: example_mean",
            "label_smoothing_factor: is a mean over tokens",
        ),
        ("packing: true\ntrain_sampling_strategy: group_by_length", "with packing all rows have about the same length"),
        ("loss_normalization: mean", "expected one of token_mean, example_mean"),
        ("group_by_length: true", "called train_sampling_strategy: group_by_length here"),
    ],
)
def test_refused(tmp_path, changes, words):
    (tmp_path / "sft.yaml").write_text(f"output_dir: o\nmodel_name_or_path: m\ntrain_dataset: d.jsonl\n{changes}\n")
    with pytest.raises(UserError, match=words):
        load_recipe("sft", str(tmp_path / "sft.yaml"))
