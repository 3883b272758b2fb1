"""Stage 1 with tiny models: losses, gradients and steps worked out with plain torch, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from align.config.data_source import DataSource
from align.errors import UserError
from align.runs.checkpoint import complete_checkpoints
from align.runs.manifest import read_manifest
from align.runs.own_files import MANIFEST
from align.runs.results import SFTResult
from align.sft.train import run
from tests import ranks
from tests.ranks import run_stage, stop_after_checkpoint
from tests.sft.letter_rows import ROWS, SCRATCH, nll, recipe
from tests.sft.shards_worker import train_and_count
from tests.worlds import (
    deepspeed_file,
    letter_ids,
    letter_tokenizer,
    manifest,
    measured,
    metrics,
    save_recipe,
    save_tiny_policy,
    tiny_llama,
    trained,
    unfinished,
    write_jsonl,
)


@pytest.mark.parametrize("completion_only", [True, False])
def test_one_step_is_adamw_on_the_mean_over_label_tokens(tmp_path, completion_only):
    settings = recipe(tmp_path, ROWS[:4], max_steps=1, completion_only_loss=completion_only)
    run(settings)
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    total, count = nll(model, ROWS[:4], completion_only)
    (total / count).backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    optimizer.step()
    logged = metrics(settings)[0]
    assert logged["train/loss"] == pytest.approx(float(total / count), abs=1e-6)
    assert logged["train/grad_norm"] == pytest.approx(float(norm), abs=1e-5)
    for name, weight in trained(settings).items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), atol=2e-5, rtol=0)


def test_cutting_the_batch_up_changes_nothing(tmp_path):
    """Four rows at once, two by two, one by one: lengths differ, so a mean of means would differ too."""
    weights = []
    for size in (4, 2, 1):
        settings = recipe(
            tmp_path, per_device_train_batch_size=size, adam_epsilon=1e-3, output_dir=str(tmp_path / f"out{size}")
        )
        run(settings)
        weights.append(trained(settings))
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, atol=5e-6, rtol=0)


def test_every_row_counts_once_an_epoch_though_padding_fills_the_last_batch(tmp_path):
    """Five rows in batches of four: the second step sees one row (and three without weight) or the first one less."""
    settings = recipe(tmp_path, ROWS[:5], num_train_epochs=1.0)
    run(settings)
    tokens = [len(prompt) + len(completion) + 1 for prompt, completion in ROWS[:5]]
    padding = 3 * tokens[0]  # copies of the first row without labels
    assert metrics(settings)[-1]["train/num_tokens"] == sum(tokens) + padding
    assert read_manifest(settings.output_dir)["results"]["steps"] == 2
    losses = [line["train/loss"] for line in metrics(settings)]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_end_of_text_is_learnt_when_it_is_the_padding_too(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    letter_tokenizer(pad_is_eos=True).save_pretrained(tmp_path / "base")
    settings = recipe(tmp_path, [("ab", "cd"), ("abc", "d")] * 4, num_train_epochs=15)
    run(settings)
    model = AutoModelForCausalLM.from_pretrained(settings.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(settings.output_dir)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    logits = model(input_ids=torch.tensor([letter_ids("abcd")])).logits[0, -1]
    assert logits.softmax(-1)[2] > 0.9


def test_evaluation_is_the_mean_over_held_out_tokens_before_and_after(tmp_path):
    """Three rows in batches of two: TRL's mean of batch means would weigh the long row's tokens less."""
    held_out = [("ac", "d"), ("e", "fghijkl"), ("qc", "da")]
    settings = recipe(tmp_path, eval_rows=held_out, per_device_eval_batch_size=2, eval_steps=9, num_train_epochs=10)
    results = run(settings)
    expected = []
    for model in (tiny_llama(), AutoModelForCausalLM.from_pretrained(settings.output_dir)):
        with torch.no_grad():
            total, count = nll(model, held_out)
            right = 0
            for prompt, completion in held_out:
                ids = torch.tensor([letter_ids(prompt) + letter_ids(completion) + [2]])
                guesses = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
                right += int((guesses == ids[0, len(prompt) :]).sum())
        expected.append((float(total / count), right / count))
    (loss_before, accuracy_before), (loss_after, accuracy_after) = expected
    assert 0 < accuracy_after < 1
    assert results.table[:3] == [
        ("held-out loss (nats/token)", pytest.approx(loss_before, abs=1e-5), pytest.approx(loss_after, abs=1e-5)),
        (
            "held-out perplexity",
            pytest.approx(math.exp(loss_before), rel=1e-5),
            pytest.approx(math.exp(loss_after), rel=1e-5),
        ),
        ("held-out token accuracy", pytest.approx(accuracy_before), pytest.approx(accuracy_after)),
    ]
    lines = [line for line in metrics(settings) if "eval/loss" in line]
    assert [line["step"] for line in lines] == [0, 9, 18, 20]
    assert lines[-1]["eval/loss"] == pytest.approx(loss_after, abs=1e-5)


def test_a_finished_stage_is_a_plain_model_folder_and_is_not_trained_again(tmp_path, capsys):
    settings = recipe(tmp_path, eval_rows=[("ee", "f")], save_steps=1)
    results = run(settings)
    folder = Path(settings.output_dir)
    assert all(weight.dtype == torch.float32 for weight in trained(settings).values())
    top = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "stage.json", "metrics.jsonl"} <= top
    assert not [name for name in top if name.endswith((".bin", ".pt", ".pkl"))]
    assert not (folder / "untrained").exists()
    assert not (folder / "run.json").exists()
    card = (folder / "README.md").read_text()
    assert "held-out loss" in card
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)  # what the card says is what was trained
    assert all(torch.equal(names["model"].get_parameter(name), weight) for name, weight in trained(settings).items())
    assert names["tokenizer"]("ab")["input_ids"] == letter_ids("ab")
    manifest = read_manifest(folder)
    assert SFTResult.from_json(settings.output_dir, manifest["results"]) == results
    assert manifest["data"]["train_rows"] == len(ROWS)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert run(settings) == results
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert "finished already" in capsys.readouterr().err


def test_from_scratch_with_a_tokenizer_that_knows_every_text(tmp_path):
    texts = [("once upon a time", " there was a fox."), ("once more", " a time of foxes")] * 4
    settings = recipe(tmp_path, texts, model_config=SCRATCH, tokenizer_vocab_size=300, output_dir=str(tmp_path / "one"))
    run(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.output_dir)
    model = AutoModelForCausalLM.from_pretrained(settings.output_dir)
    assert model.config.vocab_size == len(tokenizer) <= 300
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    ids = tokenizer("zoë 漢字\n\t.")["input_ids"]
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert tokenizer.decode(ids[1:]) == "zoë 漢字\n\t."
    assert len(tokenizer("once upon a time")["input_ids"]) < 16  # it has merged what it saw
    again = dataclasses.replace(settings, output_dir=str(tmp_path / "two"))
    run(again)
    assert all(torch.equal(weight, trained(again)[name]) for name, weight in trained(settings).items())


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        ({**SCRATCH, "hiden_size": 32}, 300, "no key 'hiden_size' to set; did you mean 'hidden_size'"),
        ({**SCRATCH, "vocab_size": 32}, 300, "no key 'vocab_size'"),
        ({**SCRATCH, "model_type": "lama"}, 300, "cannot make this lama"),
        ({**SCRATCH, "model_type": "vit"}, 300, "no key"),
        ({"model_type": "clip_text_model"}, 300, "clip_text_model is no language model; use llama or gpt2, or t5"),
        ({**SCRATCH, "hidden_size": 30}, 300, "not a multiple of the number of attention heads"),
        (SCRATCH, 258, "expected at least 259"),
    ],
)
def test_a_wrong_model_config_is_named(tmp_path, config, size, message):
    with pytest.raises(UserError, match=message):
        run(recipe(tmp_path, model_config=config, tokenizer_vocab_size=size))


def test_inputs_that_do_not_fit_are_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("align.sft.train.load_policy", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"longest row has 300 tokens, and the model reads at most 256"):
        run(recipe(tmp_path, [("a" * 290, "b" * 9)] * 4, output_dir=str(tmp_path / "long")))

    BertModel(BertConfig(vocab_size=29, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "bert"
    )
    letter_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"model_name_or_path: .* is an encoder"):
        run(recipe(tmp_path, model_name_or_path=str(tmp_path / "bert"), output_dir=str(tmp_path / "b")))

    save_tiny_policy(tmp_path / "base")
    (tmp_path / "base" / MANIFEST).write_text(json.dumps(manifest("sft")))
    with pytest.raises(UserError, match=r"model_name_or_path: .* trained with another vocabulary than"):
        run(recipe(tmp_path, output_dir=str(tmp_path / "c")))


def test_a_chat_template_may_be_added_but_not_changed(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    (tmp_path / "plain.jinja").write_text(template)
    (tmp_path / "other.jinja").write_text(template + "{{ '' }}")
    rows = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in ROWS]
    chats = [DataSource(path=write_jsonl(tmp_path / "chats.jsonl", rows))]
    text = recipe(tmp_path, output_dir=str(tmp_path / "text"))
    run(text)
    chat = recipe(
        tmp_path,
        model_name_or_path=text.output_dir,
        train_dataset=chats,
        chat_template_path=str(tmp_path / "plain.jinja"),
    )
    run(chat)
    assert AutoTokenizer.from_pretrained(chat.output_dir).chat_template == template
    assert metrics(chat)[-1]["train/num_tokens"] == sum(len(p) + len(c) + 1 for p, c in ROWS)
    again = dataclasses.replace(
        chat, model_name_or_path=chat.output_dir, output_dir=str(tmp_path / "again"),
        chat_template_path=str(tmp_path / "other.jinja"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"trained with another chat template"):
        run(again)


def test_lora_is_merged_into_a_plain_model(tmp_path):
    held_out = [("ee", "f"), ("e", "fghijkl")]
    settings = recipe(tmp_path, eval_rows=held_out, method="lora", lora_r=4, save_steps=1)
    (tmp_path / "base" / "generation_config.json").write_text(
        '{"eos_token_id": [5, 6], "top_p": 0.9, "do_sample": true}'
    )
    results = run(settings)
    saved = AutoModelForCausalLM.from_pretrained(settings.output_dir).generation_config
    assert (saved.eos_token_id, saved.top_p) == ([2, 5, 6], 0.9), "the model's, and the tokenizer's"
    weights, base = trained(settings), tiny_llama().state_dict()
    assert weights.keys() == base.keys()
    changed = {name for name, weight in weights.items() if not torch.equal(weight, base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    with torch.no_grad():
        total, count = nll(AutoModelForCausalLM.from_pretrained(settings.output_dir), held_out)
    assert results.metrics["eval_loss"] == pytest.approx(float(total / count), abs=1e-5)
    assert results.metrics["eval_loss"] != pytest.approx(results.metrics["eval_loss_before"], abs=1e-3)
    assert (Path(settings.output_dir) / "adapter" / "adapter_model.safetensors").is_file()


def test_bfloat16_with_gradient_checkpointing_ends_in_float32_weights(tmp_path):
    settings = recipe(tmp_path, eval_rows=[("ee", "f")], bf16=True, gradient_checkpointing=True)
    exact = dataclasses.replace(settings, bf16=False, output_dir=str(tmp_path / "float32"))
    losses = [run(one).metrics["eval_loss"] for one in (settings, exact)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(weight.dtype == torch.float32 for weight in trained(settings).values())


def test_a_run_killed_twice_ends_with_the_same_weights_to_the_bit(tmp_path):
    settings = recipe(
        tmp_path, eval_rows=[("ee", "f")], num_train_epochs=30, save_steps=3, eval_steps=6, max_grad_norm=1.0
    )
    folder = Path(settings.output_dir)
    file = save_recipe(settings, tmp_path / "recipe.yaml")
    for how in (signal.SIGTERM, signal.SIGKILL):
        stop_after_checkpoint("sft", file, folder, how)
        assert not (folder / MANIFEST).exists()
    assert run_stage("sft", file, ranks=1).returncode == 0
    whole = dataclasses.replace(settings, output_dir=str(tmp_path / "whole"), save_steps=None)
    results = run(whole)
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(settings).items())
    assert SFTResult.from_json(whole.output_dir, read_manifest(folder)["results"]) == results
    assert measured(settings) == measured(whole)


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(tmp_path):
    """Three steps of an epoch of two end in the middle of the second epoch."""
    settings = recipe(tmp_path, eval_rows=[("ee", "f")], max_steps=3, save_steps=1)
    results, weights = run(settings), trained(settings)
    unfinished(settings.output_dir)
    (Path(settings.output_dir) / "model.safetensors").unlink()
    assert complete_checkpoints(settings.output_dir)[-1].name == "checkpoint-3"
    assert run(settings) == results
    assert all(torch.equal(weight, trained(settings)[name]) for name, weight in weights.items())


def test_two_processes_with_zero3_train_the_same_model(tmp_path):
    """By a loss of all logits, and evaluations in between, which the modules of the loss compute too."""
    settings = recipe(
        tmp_path, [*ROWS, ("e", "f")], eval_rows=[("ee", "f"), ("e", "fghij"), ("f", "e")],
        max_grad_norm=1.0, per_device_train_batch_size=1, save_steps=2, eval_steps=1, label_smoothing_factor=0.1, optim="sgd",
    )  # fmt: skip
    results = run(settings)
    shared = dataclasses.replace(
        settings, output_dir=str(tmp_path / "shared"), deepspeed=deepspeed_file(tmp_path / "zero3.json", 3)
    )
    path = save_recipe(shared, tmp_path / "recipe.yaml")
    done = ranks.run(train_and_count, str(path), tmp_path / "held", log=tmp_path / "rank")
    assert done.returncode == 0, done.stderr[-3000:]
    held = [(tmp_path / f"held{rank}").read_text() for rank in range(2)]
    assert held == ["0", "0"], "sharded as it is loaded: no rank has the whole model"
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=2e-5, rtol=0)
    for (_, before, after), (_, before_shared, after_shared) in zip(
        results.table, read_manifest(shared.output_dir)["results"]["table"], strict=True
    ):
        assert (before_shared, after_shared) == (pytest.approx(before, abs=1e-4), pytest.approx(after, abs=1e-4))
