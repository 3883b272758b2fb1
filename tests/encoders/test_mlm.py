"""Masked language modeling with tiny encoders: masks, loss and a step worked out with plain torch, pieces, and what follows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
)

from align.config.data_source import DataSource
from align.config.encoders import MLM_METRICS, ClassifyRecipe, MLMRecipe
from align.config.reward import RewardRecipe
from align.data.rows import Passage
from align.encoders.masking import Masking
from align.encoders.mlm import mlm_results, run
from align.encoders.tokenize import tokenize_passages
from align.errors import UserError
from align.runs.manifest import read_manifest
from align.runs.own_files import MANIFEST
from align.runs.results import MLMResult
from tests.documented_metrics import undocumented
from tests.ranks import run_stage, stop_after_checkpoint
from tests.worlds import (
    deepspeed_file,
    letter_ids,
    letter_tokenizer,
    measured,
    metrics,
    save_recipe,
    save_tiny_policy,
    trained,
    training_keys,
    write_jsonl,
)

MASK = 29
TEXTS = ["abcabcabcabc", "xyzxyz", "abcab", "zzyyxx", "bcabc", "mnopqrstuvw", "ccbbaa"]
HELD_OUT = ["cabcabcab", "yzxyzxyzx", "aabbcc", "mmnnoopp", "abc"]


def masking_tokenizer():
    """The letters, and <mask> 29; a text stands between <s> and </s>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = letter_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def save_tiny_encoder(folder: Path, cls=BertForMaskedLM) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    cls(config).save_pretrained(folder)
    masking_tokenizer().save_pretrained(folder)
    return str(folder)


def recipe(folder: Path, texts=TEXTS, eval_texts=(), **changes) -> MLMRecipe:
    """Two steps of four pieces each, without evaluation unless `eval_texts` are given."""
    settings = training_keys("mlm", folder, *([{"text": text} for text in some] for some in (texts, eval_texts)))
    settings |= {"adam_epsilon": 1e-3, "mlm_probability": 0.4}
    if not (folder / "base").exists():
        save_tiny_encoder(folder / "base")
    return MLMRecipe(**{**settings, **changes})


def ids_of(text: str) -> list[int]:
    return [1, *letter_ids(text), 2]


def drawn(settings: MLMRecipe, texts, draw) -> list[tuple[torch.Tensor, torch.Tensor]]:
    masking = Masking(masking_tokenizer(), settings.mlm_probability, settings.seed)
    return [masking.mask(ids_of(text), place, draw) for place, text in enumerate(texts)]


def sums(model, pieces) -> tuple[torch.Tensor, int, int]:
    """Loss, hits and number of the tokens to predict, one piece at a time without padding."""
    total, hits, count = torch.zeros(()), 0, 0
    for ids, labels in pieces:
        logits, there = model(input_ids=ids[None]).logits[0], labels != -100
        total = total + cross_entropy(logits[there], labels[there], reduction="sum")
        hits += int((logits.argmax(dim=-1) == labels).sum())
        count += int(there.sum())
    return total, hits, count


def test_one_step_is_adamw_on_the_mean_over_masked_tokens(tmp_path):
    """Three pieces in a batch of four, in two microbatches: padding row and padding tokens count for nothing."""
    settings = recipe(tmp_path, TEXTS[:3], max_steps=1, per_device_train_batch_size=2)
    run(settings)
    model = BertForMaskedLM.from_pretrained(settings.model_name_or_path).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    pieces = drawn(settings, TEXTS[:3], 0)
    total, hits, count = sums(model, pieces)
    loss = total / count
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    logged = metrics(settings)[0]
    assert count > 4
    assert logged["train/loss"] == pytest.approx(float(loss), abs=1e-5)
    assert logged["train/accuracy"] == pytest.approx(hits / count)
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert logged["train/num_tokens"] == sum(len(ids) for ids, labels in pieces if (labels != -100).any())
    for name, weight in trained(settings).items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), atol=2e-5, rtol=0)


def test_cutting_the_batch_up_changes_nothing(tmp_path):
    weights = []
    for size in (4, 2, 1):
        settings = recipe(
            tmp_path, per_device_train_batch_size=size, output_dir=str(tmp_path / f"out{size}"), num_train_epochs=2
        )
        run(settings)
        weights.append(trained(settings))
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, atol=5e-6, rtol=0)


def test_masks_belong_to_seed_epoch_and_piece():
    ids = ids_of("abcdefghijklmnopqrstuvwxyz" * 3)
    masking = Masking(masking_tokenizer(), 0.3, 7)
    once = masking.mask(ids, 5, 1)
    masking.mask(ids, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(once, masking.mask(ids, 5, 1), strict=True))
    for other in (
        masking.mask(ids, 6, 1),
        masking.mask(ids, 5, 2),
        Masking(masking_tokenizer(), 0.3, 8).mask(ids, 5, 1),
    ):
        assert not torch.equal(once[1], other[1])
    assert ids == ids_of("abcdefghijklmnopqrstuvwxyz" * 3)  # the row is left alone


def test_of_the_tokens_to_predict_80_percent_are_masked_and_10_replaced():
    ids = torch.tensor(ids_of("abcdefghijklmnopqrstuvwxyz" * 800))
    masked, labels = Masking(masking_tokenizer(), 0.15, 0).mask(ids.tolist(), 0, 0)
    there = labels != -100
    assert torch.equal(labels[there], ids[there])
    assert torch.equal(masked[~there], ids[~there])
    assert not there[0]  # special tokens are never asked for
    assert not there[-1]
    count = int(there.sum())
    assert count / (len(ids) - 2) == pytest.approx(0.15, abs=0.01)
    assert float((masked[there] == MASK).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((masked[there] == ids[there]).float().mean()) == pytest.approx(0.1, abs=0.03)


def test_each_epoch_is_masked_anew_and_padding_rows_are_nothing():
    masking = Masking(masking_tokenizer(), 0.4, 0)
    rows = [
        {"input_ids": ids_of("abcdefghij"), "row": 3, "weight": 1},
        {"input_ids": ids_of("ab"), "row": 0, "weight": 0},
    ]
    first = masking(rows)
    assert first["attention_mask"].tolist() == [[1] * 12, [1] * 4 + [0] * 8]
    assert first["input_ids"][1, 4:].tolist() == [0] * 8
    assert first["weight"].tolist() == [int((first["labels"][0] != -100).sum()), 0]
    assert first["labels"][1].tolist() == [-100] * 12
    assert torch.equal(first["labels"][0], masking.mask(rows[0]["input_ids"], 3, 0)[1])
    masking.epoch = 1
    assert torch.equal(masking(rows)["labels"][0], masking.mask(rows[0]["input_ids"], 3, 1)[1])
    assert not torch.equal(masking(rows)["labels"], first["labels"])


def test_training_goes_through_the_epochs_draws(tmp_path):
    """One piece, one step an epoch: each step's loss is on that epoch's mask."""
    settings = recipe(
        tmp_path,
        ["abcdefghijkl"],
        num_train_epochs=3,
        train_batch_size=1,
        per_device_train_batch_size=1,
        learning_rate=1e-12,
    )
    run(settings)
    model = BertForMaskedLM.from_pretrained(settings.model_name_or_path).eval()
    losses = []
    for epoch in range(3):
        total, _, count = sums(model, drawn(settings, ["abcdefghijkl"], epoch))
        losses.append(float(total) / count)
    assert [line["train/loss"] for line in metrics(settings)] == pytest.approx(losses, abs=1e-5)


def test_long_texts_are_cut_into_even_pieces_and_nothing_is_lost():
    tokenizer = masking_tokenizer()
    texts = ["abcdefghijklmnopqrstuvwxyz", "abcdef", "a" * 9, "z"]
    data = tokenize_passages([Passage(text, "x") for text in texts], tokenizer, 10)
    pieces = [tokenizer.decode(ids[1:-1]) for ids in data["input_ids"]]
    assert pieces == ["abcdef", "ghijklm", "nopqrs", "tuvwxyz", "abcdef", "aaaa", "aaaaa", "z"]
    assert all((ids[0], ids[-1]) == (1, 2) and len(ids) <= 10 for ids in data["input_ids"])
    assert data["row"][:] == list(range(8))
    with pytest.raises(UserError, match="max_length: 2 tokens leave no room for text"):
        tokenize_passages([Passage("a", "x")], tokenizer, 2)


def test_the_model_limits_the_pieces(tmp_path):
    settings = recipe(tmp_path, ["abcdefghijklmnopqrstuvwxyz", "b"], max_steps=1)  # the model reads 16
    run(settings)
    assert read_manifest(settings.output_dir)["data"]["pieces"] == 3


@pytest.mark.parametrize("batch", [2, 16])
def test_evaluation_is_exact_and_its_masks_are_fixed(tmp_path, batch, capsys):
    settings = recipe(
        tmp_path, eval_texts=HELD_OUT, eval_steps=2, num_train_epochs=20, per_device_eval_batch_size=batch
    )
    results = run(settings)
    pieces = drawn(settings, HELD_OUT, "evaluation")
    ends = [
        (results.metrics["eval_loss_before"], results.metrics["eval_accuracy_before"], settings.model_name_or_path),
        (results.metrics["eval_loss"], results.metrics["eval_accuracy"], settings.output_dir),
    ]
    for loss, accuracy, folder in ends:
        total, hits, count = sums(AutoModelForMaskedLM.from_pretrained(folder).eval(), pieces)
        assert loss == pytest.approx(float(total) / count, abs=1e-5)
        assert accuracy == pytest.approx(hits / count)
    assert results.metrics["eval_loss"] < results.metrics["eval_loss_before"]
    assert (
        f"held-out loss (nats/masked token) | {results.metrics['eval_loss_before']:.4g} | {results.metrics['eval_loss']:.4g} |"
        in (capsys.readouterr().err)
    )
    assert results.table[0] == (
        "held-out loss (nats/masked token)",
        results.metrics["eval_loss_before"],
        results.metrics["eval_loss"],
    )
    logged = metrics(settings)
    assert [line["step"] for line in logged if "eval/perplexity" in line] == list(range(0, 41, 2))
    first = {name for name in logged[0] if name.startswith("eval/")}
    assert first == {f"eval/{name}" for name in (*MLM_METRICS, "perplexity")}
    assert undocumented(name for line in logged for name in line if name not in ("step", "time")) == []
    for phase, metric in (("training", "train/loss"), ("evaluation", "eval/loss")):
        assert all(0.05 < line[f"memory/{phase}"] < 1000 for line in logged if metric in line), "GiB"


def test_an_encoder_without_a_head_gets_one_by_the_seed_and_other_stages_go_on_from_there(tmp_path):
    save_tiny_encoder(tmp_path / "base", BertModel)
    first, second = (recipe(tmp_path, output_dir=str(tmp_path / name), max_steps=1) for name in ("first", "second"))
    run(first)
    torch.manual_seed(123)
    run(second)
    assert all(torch.equal(weight, trained(second)[name]) for name, weight in trained(first).items())
    model = AutoModelForMaskedLM.from_pretrained(first.output_dir)
    assert type(model) is BertForMaskedLM

    from align.encoders import classify
    from align.reward import train as reward

    sources = {
        "classify": [{"text": "ab", "label": "x"}, {"text": "cd", "label": "y"}],
        "reward": [{"prompt": "ab", "chosen": "x", "rejected": "y"}],
    }
    for name, stage, kind in (("classify", classify, ClassifyRecipe), ("reward", reward, RewardRecipe)):
        common = {
            "model_name_or_path": first.output_dir, "eval_fraction": 0.0, "max_steps": 1, "train_batch_size": 2,
            "learning_rate": 1e-12, "train_dataset": [DataSource(path=write_jsonl(tmp_path / f"{name}.jsonl", sources[name]))],
        }  # fmt: skip
        outputs = []
        for number in range(2):
            settings = kind(output_dir=str(tmp_path / f"{name}{number}"), **common)
            torch.manual_seed(number)
            stage.run(settings)
            outputs.append(trained(settings))
        assert all(torch.equal(weight, outputs[1][name]) for name, weight in outputs[0].items())  # the new pooler too
        layer = "bert.encoder.layer.1.output.dense.weight"
        torch.testing.assert_close(outputs[0][layer], trained(first)[layer])
        AutoModelForSequenceClassification.from_pretrained(settings.output_dir)


def test_bottleneck_adapters_beside_a_new_head(tmp_path):
    """Of BERT's head one bias has two names."""
    save_tiny_encoder(tmp_path / "base", BertModel)
    settings = recipe(tmp_path, eval_texts=HELD_OUT, method="bottleneck", bottleneck_size=4)
    results = run(settings)
    again = recipe(
        tmp_path, eval_texts=HELD_OUT, method="bottleneck", bottleneck_size=4, max_steps=1,
        model_name_or_path=settings.output_dir, output_dir=str(tmp_path / "again"),
    )  # fmt: skip
    found = run(again).metrics["eval_loss_before"]
    assert found == pytest.approx(results.metrics["eval_loss"], abs=1e-6)
    assert found != pytest.approx(results.metrics["eval_loss_before"], abs=1e-3)


def test_inputs_that_do_not_fit_are_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("align.encoders.mlm.load_masked_lm", lambda *_, **__: pytest.fail("weights were loaded"))

    def refused(message: str, **changes) -> None:
        with pytest.raises(UserError, match=message):
            run(recipe(tmp_path, output_dir=str(tmp_path / f"out-{len(list(tmp_path.iterdir()))}"), **changes))

    llama = save_tiny_policy(tmp_path / "llama")
    refused(
        r"is not an encoder with a masked language model in transformers; .* decoder with the sft stage",
        model_name_or_path=llama,
    )
    refused("model_name_or_path: no model at", model_name_or_path=str(tmp_path / "nowhere"))
    refused("no token of the 1 held-out pieces of text is masked", eval_texts=["q"], mlm_probability=1e-9)
    refused("`text` is not text: 1", texts=["ab", 7])
    refused("empty `text`: 1", texts=["ab", " "])
    letter_tokenizer().save_pretrained(tmp_path / "base")
    refused("the tokenizer has no mask token")


def test_a_killed_run_ends_with_the_same_weights_to_the_bit(tmp_path):
    settings = recipe(
        tmp_path, eval_texts=HELD_OUT, num_train_epochs=20, save_steps=3, eval_steps=6, max_grad_norm=1.0, train_batch_size=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    folder = Path(settings.output_dir)
    stop_after_checkpoint("mlm", save_recipe(settings, tmp_path / "recipe.yaml"), folder)
    assert not (folder / MANIFEST).exists()
    run(settings)
    whole = dataclasses.replace(settings, output_dir=str(tmp_path / "whole"), save_steps=None)
    results = run(whole)
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(settings).items())
    assert MLMResult.from_json(whole.output_dir, read_manifest(folder)["results"]) == results
    assert measured(settings) == measured(whole)


def test_two_processes_with_zero2_train_the_same_model(tmp_path):
    settings = recipe(tmp_path, eval_texts=HELD_OUT, max_grad_norm=1.0, per_device_train_batch_size=1, save_steps=2)
    results = run(settings)
    shared = dataclasses.replace(
        settings, output_dir=str(tmp_path / "shared"), deepspeed=deepspeed_file(tmp_path / "zero2.json", 2)
    )
    done = run_stage("mlm", save_recipe(shared, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=2e-5, rtol=0)
    together = read_manifest(shared.output_dir)["results"]
    assert together["eval_loss"] == pytest.approx(results.metrics["eval_loss"], abs=1e-4)
    for mine, theirs in zip(metrics(settings), metrics(shared), strict=True):
        for name in ("step", "train/loss", "train/accuracy", "train/num_tokens"):
            assert theirs.get(name) == pytest.approx(mine.get(name), abs=1e-4)


def test_a_finished_stage_is_a_plain_model_folder(tmp_path, capsys):
    settings = recipe(tmp_path, eval_texts=HELD_OUT, bf16=True, gradient_checkpointing=True)
    results = run(settings)
    folder = Path(settings.output_dir)
    assert all(weight.dtype == torch.float32 for weight in trained(settings).values())
    assert not (folder / "untrained").exists()
    names: dict = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    assert names["tokenizer"].padding_side == "right"
    assert names["tokenizer"].mask_token_id == AutoTokenizer.from_pretrained(folder).mask_token_id == MASK
    assert run(settings) == results
    assert "finished already" in capsys.readouterr().err


def test_a_diverged_model_has_a_finite_perplexity():
    log = {"eval_loss": 800.0, "eval_accuracy": 0.0}
    table = {name: numbers for name, *numbers in mlm_results(log, log, 1)["table"]}
    assert table["held-out perplexity of masked tokens"] == pytest.approx([1.0142320547350045e304] * 2)
