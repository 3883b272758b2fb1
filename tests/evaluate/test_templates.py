"""Several templates as paired conditions of `align evaluate`, and what each setting costs, on a model whose answers are known.

The model is a chain: the next token depends on the last one alone. After `a` it says p, after anything else n, and then it ends.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.config.data_source import DataSource
from align.config.evaluate import EvaluateRecipe
from align.errors import UserError
from align.evaluate.compare import run
from align.evaluate.costs import training_costs
from align.evaluate.inputs import prepare_inputs
from align.runs.files import write_json
from align.runs.own_files import MANIFEST
from tests.worlds import letter_ids, letter_tokenizer, manifest, write_jsonl

ROWS = [*({"text": f"{letter}a", "label": 1} for letter in "cdefgh"), *({"text": f"{letter}b", "label": 0} for letter in "cd")]  # fmt: skip
TRAIN = [{"text": text, "label": 1} for text in ("ja", "ka", "lma", "oqra")]
PLAIN = {"prompt": "{{ text }}", "completion": "{{ label }}"}
ENDING = {"prompt": "x{{ text }}b", "completion": "{{ label }}"}


def save_chain(folder: Path) -> None:
    tokenizer = letter_tokenizer()
    size = len(tokenizer)
    config = LlamaConfig(vocab_size=size, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config)
    (a,), (n,), (p,) = map(letter_ids, "anp")
    following = {token: n for token in range(size)} | {a: p, n: 2, p: 2}
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()  # nothing but the token's own embedding reaches the head
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 32))
        model.lm_head.weight.zero_()
        for token, after in following.items():
            model.lm_head.weight[after, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe(folder: Path, rows=ROWS, train=TRAIN, **changes) -> EvaluateRecipe:
    if not (folder / "chain").exists():
        save_chain(folder / "chain")
    labels = {"0": "n", "1": "p"}
    settings = {
        "output_dir": str(folder / "out"),
        "models": {"chain": str(folder / "chain")},
        "train_dataset": [DataSource(path=write_jsonl(folder / "train.jsonl", train), labels=labels)],
        "eval_dataset": [DataSource(path=write_jsonl(folder / "eval.jsonl", rows), labels=labels)],
        "templates": {"plain": PLAIN, "ending": ENDING},
        "metrics": ["accuracy"],
        "max_new_tokens": 3,
        "bootstrap_iters": 4000,
    }
    return EvaluateRecipe(**{**settings, **changes})


def test_templates_are_compared_on_the_same_rows(tmp_path):
    """`plain` is right on all 8 rows; `ending` says n to all, which is right for 2."""
    settings = recipe(tmp_path, num_shots=[0, 2])
    results = run(settings)
    for shots in (0, 2):
        assert results.value("accuracy", "chain", shots, template="plain") == 1.0
        assert results.value("accuracy", "chain", shots, template="ending") == 0.25
    with pytest.raises(UserError, match="template 'plain', 'ending'"):
        results.value("accuracy", "chain")
    pairs = [(c.template, c.num_shots, c.against["template"], c.against["num_shots"]) for c in results.comparisons]
    assert pairs == [
        ("plain", 2, "plain", 0),
        ("ending", 0, "plain", 0),
        ("ending", 0, "plain", 2),
        ("ending", 2, "plain", 0),
        ("ending", 2, "plain", 2),
        ("ending", 2, "ending", 0),
    ]
    compared = results.comparisons[1]
    assert compared.difference == -0.75
    assert compared.low < -0.75 < compared.high < 0
    # Six rows differ, all in one direction: 2 of their 2**6 signs give a mean as far from 0. Within 4 standard deviations
    # of a share of 4000 random swaps.
    assert compared.p_value == pytest.approx(2 / 2**6, abs=4 * (1 / 32 * 31 / 32 / 4000) ** 0.5)
    assert (results.comparisons[0].difference, results.comparisons[0].p_value) == (0.0, 1.0)

    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    first = {(line["template"], line["num_shots"]): line for line in lines[:4]}
    assert first["plain", 0]["prompt"] == "ca"
    assert first["ending", 0]["prompt"] == "xcab"
    examples = first["plain", 2]["prompt"].split("\n\n")[:2]  # the same rows are the examples, in each template's words
    assert first["ending", 2]["prompt"] == "\n\n".join([*(f"x{each[:-1]}bp" for each in examples), "xcab"])

    costs = {(each.template, each.num_shots): each for each in results.costs}
    assert costs["plain", 0].prompt_tokens == 2  # letters
    assert costs["ending", 0].prompt_tokens == 4
    asked = [line["prompt"] for line in lines if (line["template"], line["num_shots"]) == ("plain", 2)]
    assert costs["plain", 2].prompt_tokens == sum(map(len, asked)) / 8  # a line break is a token, too
    assert {each.trained_parameters for each in results.costs} == {None}  # nobody has recorded it
    report = (tmp_path / "out" / "results.md").read_text()
    assert "| chain, 2-shot, ending | 0.25 [" in report
    assert "| tokens of a prompt |" in report
    assert "parameters trained" not in report

    reordered = dataclasses.replace(settings, templates=dict(reversed(settings.templates.items())))
    with pytest.raises(UserError, match="differ in templates"):  # another one is the first
        run(reordered)


def test_one_template_is_that_of_the_source(tmp_path):
    """The same numbers as with the template written at the source."""
    named = run(recipe(tmp_path, templates={"ending": ENDING}, metrics=["accuracy", "bits_per_byte"]))
    settings = recipe(tmp_path, metrics=["accuracy", "bits_per_byte"], output_dir=str(tmp_path / "own"))
    sources = [dataclasses.replace(source, templates=[ENDING]) for source in settings.eval_dataset]
    own = run(dataclasses.replace(settings, templates={}, train_dataset=[], eval_dataset=sources))
    assert [dataclasses.replace(each, template=None) for each in named.values] == own.values


def test_tuned_models_are_compared_with_the_baseline_and_among_templates(tmp_path):
    """References in other words are other tokens: what is measured of them is not compared."""
    loud = {"prompt": "{{ text }}", "completion": "{{ label }} q"}
    models = {name: str(tmp_path / "chain") for name in ("base", "one", "two")}
    settings = recipe(tmp_path, models=models, templates={"plain": PLAIN, "loud": loud}, metrics=["accuracy", "bits_per_byte"])  # fmt: skip
    results = run(settings)
    found = {(c.model, c.template, c.against["model"], c.against["template"]) for c in results.comparisons if c.metric == "accuracy"}  # fmt: skip
    assert ("two", "loud", "two", "plain") in found
    assert ("two", "loud", "base", "plain") in found
    assert not [each for each in found if (each[0], each[2]) == ("two", "one")]
    assert {(c.template, c.against["template"]) for c in results.comparisons if c.metric == "bits_per_byte"} == {
        ("plain", "plain"),
        ("loud", "loud"),
    }


def test_a_row_that_one_template_cannot_write_is_left_out_of_all(tmp_path):
    passage = {"prompt": "{{ passage }}{{ text }}", "completion": "{{ label }}"}
    rows = [{**row, "passage": "z"} for row in ROWS]
    del rows[3]["passage"]
    settings = recipe(tmp_path, rows, templates={"plain": PLAIN, "retrieved": passage}, train_dataset=[])
    reason = r"no column `passage`, which templates\.retrieved\.prompt reads: 1 \(.*eval.jsonl:4\)"
    with pytest.raises(UserError, match=reason):
        prepare_inputs(settings, generates=True)
    inputs = prepare_inputs(dataclasses.replace(settings, on_bad_row="skip"), generates=True)
    plain, retrieved = inputs.settings
    assert [row.prompt for row in plain.rows] == [row["text"] for row in rows if "passage" in row]
    assert [row.prompt for row in retrieved.rows] == [f"z{row['text']}" for row in rows if "passage" in row]
    source = DataSource(path=write_jsonl(tmp_path / "whole.jsonl", [{**row, "passage": "z"} for row in ROWS]))
    with pytest.raises(
        UserError, match="model chain, template retrieved: longer than 5 tokens"
    ):  # 3, and 3 are written
        prepare_inputs(dataclasses.replace(settings, eval_dataset=[source], max_length=5), generates=True)


def test_a_column_that_no_row_has_is_named(tmp_path):
    settings = recipe(tmp_path, templates={"plain": PLAIN, "retrieved": {"prompt": "{{ pasage }}{{ text }}", "completion": "{{ label }}"}})  # fmt: skip
    with pytest.raises(UserError) as error:
        run(settings)
    assert "templates.retrieved.prompt reads `pasage`, which no row has; the columns are text, label" in str(
        error.value
    )
    assert not (tmp_path / "out").exists()


def test_no_example_asks_what_is_evaluated_under_any_template(tmp_path):
    """Under `plain` the training row differs from the row to evaluate; without its passage it does not."""
    closed = {"prompt": "{{ text }}", "completion": "{{ label }}"}
    both = {"prompt": "{{ passage }}{{ text }}", "completion": "{{ label }}"}
    rows = [{**row, "passage": "z"} for row in ROWS]
    train = [{"text": "ca", "passage": "y", "label": 1}, {"text": "ja", "passage": "y", "label": 1}]
    settings = recipe(tmp_path, rows, train, templates={"both": both, "closed": closed}, num_shots=[1])
    inputs = prepare_inputs(settings, generates=True)
    assert {row.prompt.split("\n\n")[0] for row in inputs.settings[0].rows} == {"yjap"}
    assert inputs.report["train_rows_dropped_as_evaluated"] == 1


def test_costs_of_training_are_those_that_the_stage_recorded(tmp_path):
    assert training_costs(str(tmp_path)) == {"trained_parameters": None, "training_seconds": None, "train_tokens": None}
    write_json(tmp_path / MANIFEST, {**manifest("sft"), "results": {"trained_parameters": 1280}})
    lines = [
        {"step": 0, "time": "2026-11-27T10:00:00.000+00:00"},
        {"step": 10, "time": "2026-11-27T10:00:30.000+00:00", "train/num_tokens": 700},
        {"step": 20, "time": "2026-11-27T10:01:01.500+00:00", "train/num_tokens": 1400},
        {"step": 20, "time": "2026-11-27T10:01:02.250+00:00", "eval/loss": 1.0},
    ]
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    assert training_costs(str(tmp_path)) == {"trained_parameters": 1280, "training_seconds": 62.25, "train_tokens": 1400}  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": "2026-11-27T10:00:00.000+00:00"}\n{"step', "utf-8")
    assert training_costs(str(tmp_path))["training_seconds"] is None  # a damaged record says nothing
