"""Token classifiers with tiny models: a step and an evaluation worked out with plain transformers and seqeval, resume, two ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from transformers import AutoModelForTokenClassification

from align.config.extraction import TAG_METRICS, TokenClassificationRecipe
from align.encoders.token_classification import run
from align.errors import UserError
from align.models.load import new_head
from align.runs.manifest import read_manifest
from align.runs.own_files import MANIFEST
from tests.documented_metrics import undocumented
from tests.encoders.test_classify import save_tiny_bert
from tests.ranks import run_stage, stop_after_checkpoint
from tests.worlds import (
    deepspeed_file,
    letter_tokenizer,
    measured,
    metrics,
    save_recipe,
    save_tiny_policy,
    trained,
    training_keys,
)

ROWS = [
    (["ab", "cd", "e"], ["B-X", "I-X", "O"]), (["f", "ab"], ["O", "B-Y"]), (["cd"], ["B-X"]), (["k", "m", "q"], ["O", "O", "B-Y"]),
    (["ab", "q"], ["B-X", "B-Y"]), (["e", "e"], ["O", "O"]), (["q", "cd"], ["B-Y", "I-Y"]),
]  # fmt: skip
HELD_OUT = [(["cd", "ab", "q"], ["B-X", "I-X", "B-Y"]), (["e", "q"], ["O", "O"]), (["ab", "k"], ["O", "B-X"])]
NAMES = ["O", "B-X", "I-X", "B-Y", "I-Y"]


def recipe(folder: Path, rows=ROWS, eval_rows=(), **changes) -> TokenClassificationRecipe:
    """Two steps of four rows each on a tiny encoder, without evaluation unless `eval_rows` are given."""
    named = ([dict(zip(("tokens", "tags"), row, strict=True)) for row in some] for some in (rows, eval_rows))
    settings = training_keys("token-classification", folder, *named) | {"adam_epsilon": 1e-3}
    if not (folder / "base").exists():
        save_tiny_bert(folder / "base")
    return TokenClassificationRecipe(**{**settings, **changes})


def untrained(settings: TokenClassificationRecipe):
    torch.manual_seed(42)
    return AutoModelForTokenClassification.from_pretrained(settings.model_name_or_path, num_labels=5).eval()


def encoded(words, tags) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of one row by hand: a token a letter, I- after the first of a word, none for the space between words."""
    ids, labels = [], []
    for word, tag in zip(words, tags, strict=True):
        ids += [*([0] if ids else []), *(ord(letter) - ord("a") + 3 for letter in word)]
        rest = tag.replace("B-", "I-")
        labels += [*([-100] if labels else []), *(NAMES.index(each) for each in (tag, *[rest] * (len(word) - 1)))]
    return torch.tensor([ids]), torch.tensor([labels])


def test_one_step_is_adamw_on_the_mean_over_labeled_tokens(tmp_path):
    """Three rows in a batch of four, in two microbatches: padding row and padding tokens count for nothing."""
    settings = recipe(tmp_path, ROWS[:2] + ROWS[6:], max_steps=1, per_device_train_batch_size=2)
    run(settings)
    model = untrained(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    rows = [encoded(*row) for row in ROWS[:2] + ROWS[6:]]
    sizes = [int((labels != -100).sum()) for _, labels in rows]
    losses = [
        model(input_ids=ids, labels=labels).loss for ids, labels in rows
    ]  # transformers' own, a mean over the row
    loss = sum(each * size for each, size in zip(losses, sizes, strict=True)) / sum(sizes)
    loss.backward()
    optimizer.step()
    logged = metrics(settings)[0]
    assert logged["train/loss"] == pytest.approx(float(loss), abs=1e-5)
    assert logged["train/num_tokens"] == sum(ids.numel() for ids, _ in rows)
    for name, weight in trained(settings).items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), atol=2e-5, rtol=0)
    config = AutoModelForTokenClassification.from_pretrained(settings.output_dir).config
    assert [config.id2label[i] for i in range(5)] == NAMES


def test_cutting_the_batch_up_changes_nothing(tmp_path):
    weights = []
    for size in (4, 1):
        settings = recipe(tmp_path, per_device_train_batch_size=size, output_dir=str(tmp_path / f"out{size}"))
        run(settings)
        weights.append(trained(settings))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=5e-6, rtol=0)


def test_evaluation_is_seqevals_and_has_a_baseline(tmp_path, capsys):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, num_train_epochs=6, per_device_eval_batch_size=2)
    results = run(settings)
    model = AutoModelForTokenClassification.from_pretrained(settings.output_dir).eval()
    for suffix, judged in (("_before", untrained(settings)), ("", model)):
        said, total, right, items = [], 0.0, 0, 0
        for words, tags in HELD_OUT:
            ids, labels = encoded(words, tags)
            logits = judged(input_ids=ids).logits[0]
            starts = [sum(len(word) + 1 for word in words[:place]) for place in range(len(words))]
            said.append([NAMES[int(logits[start].argmax())] for start in starts])
            there = labels[0] != -100
            total += float(torch.nn.functional.cross_entropy(logits[there], labels[0][there], reduction="sum"))
            right += int((logits.argmax(dim=1) == labels[0]).sum())
            items += int(there.sum())
        true = [tags for _, tags in HELD_OUT]
        assert results.metrics[f"eval_loss{suffix}"] == pytest.approx(total / items, abs=1e-5)
        scores = (precision_score, recall_score, f1_score)
        for name, score in zip(("precision", "recall", "f1"), scores, strict=True):
            assert results.metrics[f"eval_{name}{suffix}"] == pytest.approx(score(true, said, zero_division=0))
    assert metrics(settings)[-1]["eval/accuracy"] == pytest.approx(right / items)
    # of its five entities (cd: I-X, ab: B-X, q: B-Y; q: B-Y; ab: B-X) the first q alone is one of the three gold ones
    assert results.baseline["f1"] == pytest.approx(2 * 1 / (5 + 3))
    assert ("F1 of the commonest tag of each word", None, results.baseline["f1"]) in results.table
    logged = {name for line in metrics(settings) for name in line} - {"step", "time"}
    assert undocumented(logged) == []
    assert {f"eval/{name}" for name in TAG_METRICS} <= logged
    shown, card = capsys.readouterr().err, (Path(settings.output_dir) / "README.md").read_text()
    assert all("| entity | in training | held out | precision | recall | F1 |" in text for text in (shown, card))
    names = {"text": "cd ab q"}
    exec(card.split("```python\n")[1].split("```")[0], names)
    expected = [NAMES[i] for i in model(encoded(*HELD_OUT[0])[0]).logits[0].argmax(dim=1).tolist()]
    assert names["labels"] == expected
    assert names["found"] == [
        (text, label) for text, label in zip("cd ab q", expected, strict=True) if label != "O" and text != " "
    ]


def test_rows_of_spans_and_tags_of_words_and_a_decoder(tmp_path):
    save_tiny_policy(tmp_path / "base")
    settings = recipe(tmp_path, max_steps=1)
    rows = [{"text": "ab cd", "entities": [{"start": 0, "end": 2, "label": "X"}]}, {"text": "e", "entities": []}]
    settings.train_dataset[0].columns["spans"] = "entities"
    Path(settings.train_dataset[0].path).write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    run(settings)
    assert read_manifest(settings.output_dir)["labels"] == ["O", "B-X", "I-X"]
    words = [(["ab", "c"], ["N", "V"]), (["c", "ab"], ["V", "N"])]
    settings = recipe(
        tmp_path, words, [(["ab"], ["N"]), (["c"], ["N"])], output_dir=str(tmp_path / "words"), num_train_epochs=40
    )
    results = run(settings)
    assert results.metrics["eval_f1"] == results.baseline["f1"] == 0.5
    assert read_manifest(settings.output_dir)["scheme"] == "words"


def test_adapters_have_the_whole_head_and_the_head_alone_trains_the_head_alone(tmp_path):
    bottleneck = recipe(tmp_path, eval_rows=HELD_OUT, method="bottleneck", num_train_epochs=3)
    results = run(bottleneck)
    model = new_head(AutoModelForTokenClassification, bottleneck.output_dir).eval()
    total = [
        model(input_ids=ids, labels=labels).loss * (labels != -100).sum()
        for ids, labels in (encoded(*row) for row in HELD_OUT)
    ]
    items = sum(int((encoded(*row)[1] != -100).sum()) for row in HELD_OUT)
    assert results.metrics["eval_loss"] == pytest.approx(float(sum(total)) / items, abs=1e-5)
    head = recipe(tmp_path, method="head", output_dir=str(tmp_path / "head"))
    run(head)
    base = untrained(head).state_dict()
    assert {n for n, w in trained(head).items() if not torch.equal(w, base[n])} == {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_to_the_bit(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, num_train_epochs=10, save_steps=3, eval_steps=6)
    folder = Path(settings.output_dir)
    stop_after_checkpoint("token-classification", save_recipe(settings, tmp_path / "recipe.yaml"), folder)
    assert not (folder / MANIFEST).exists()
    results = run(settings)
    whole = dataclasses.replace(settings, output_dir=str(tmp_path / "whole"), save_steps=None)
    assert dataclasses.replace(run(whole), output_dir=settings.output_dir) == results
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(settings).items())
    assert measured(settings) == measured(whole)


@pytest.mark.slow
def test_two_ranks_train_and_evaluate_as_one(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, per_device_train_batch_size=1, num_train_epochs=3)
    results = run(settings)
    shared = dataclasses.replace(
        settings, output_dir=str(tmp_path / "shared"), deepspeed=deepspeed_file(tmp_path / "zero2.json", 2)
    )
    done = run_stage("token-classification", save_recipe(shared, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in trained(settings).items():
        torch.testing.assert_close(trained(shared)[name], weight, atol=2e-5, rtol=0)
    together = read_manifest(shared.output_dir)["results"]
    for name, value in results.metrics.items():
        assert together[name] == pytest.approx(value, abs=1e-4), name


def test_what_is_refused_before_weights_are_loaded(tmp_path):
    settings = recipe(tmp_path, [(["ab"], ["I-X"])])
    with pytest.raises(UserError, match=r"`tags`: a word inside an entity.*train.jsonl:1"):
        run(settings)
    slow = tmp_path / "slow"
    save_tiny_bert(slow)
    (slow / "tokenizer.json").unlink()
    (slow / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    (slow / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "basic", "pad_token": "[PAD]"}'
    )
    with pytest.raises(UserError, match=r"BertJapaneseTokenizer\) is a slow one"):
        run(recipe(tmp_path, model_name_or_path=str(slow)))
    assert letter_tokenizer().is_fast
