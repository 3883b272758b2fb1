"""Answers from passages with tiny encoders: windows by hand, a step and an evaluation by plain transformers, resume, two ranks."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from align.config.extraction import ANSWER_METRICS, QuestionAnsweringRecipe
from align.data.rows import Question
from align.encoders.answer_metrics import answer_metrics, answers_of, commonest_answers, floor_scores
from align.encoders.question_answering import run
from align.encoders.windows import Window, best_answers, target, tokenize_questions
from align.errors import UserError
from align.evaluate.squad import exact_match, token_f1
from align.runs.manifest import read_manifest
from align.runs.own_files import MANIFEST
from tests.documented_metrics import undocumented
from tests.encoders.test_classify import save_tiny_bert
from tests.encoders.test_tags import LABELS
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
)

ROWS = [
    ("q", "abcdefgh", "cd"), ("r", "xyzabc", "ab"), ("q", "mnop", None), ("s", "abcabcabcz", "z"), ("q", "cdab", "cd"), ("t", "k", "k"),
]  # fmt: skip
HELD_OUT = [("q", "zzcdzzzzzz", "cd"), ("r", "abz", "ab"), ("s", "mmm", None)]


def pair_tokenizer():
    """A token a letter; <s> question </s> passage </s>, of types 0 and 1."""
    tokenizer = letter_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    tokenizer.padding_side = "right"
    return tokenizer


def as_row(question, context, answer) -> dict:
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": question, "context": context, "answers": found}


def recipe(folder: Path, rows=ROWS, eval_rows=(), **changes) -> QuestionAnsweringRecipe:
    """Steps of four windows of up to 8 tokens each, of which 4 are of the passage, on a tiny encoder."""
    named = ([as_row(*row) for row in some] for some in (rows, eval_rows))
    settings = training_keys("question-answering", folder, *named)
    settings |= {"adam_epsilon": 1e-3, "max_length": 8, "doc_stride": 2, "max_answer_length": 3}
    if not (folder / "base").exists():
        save_tiny_bert(folder / "base")
        pair_tokenizer().save_pretrained(folder / "base")
    return QuestionAnsweringRecipe(**{**settings, **changes})


def untrained(settings: QuestionAnsweringRecipe):
    torch.manual_seed(42)
    return AutoModelForQuestionAnswering.from_pretrained(settings.model_name_or_path).eval()


def windows_by_hand(question, context, answer):
    """(ids, types, start, end, first character) of windows of 4 letters, two of which are in the next one, too."""
    found = []
    for first in range(0, max(len(context) - 2, 1), 2):
        piece = context[first : first + 4]
        ids = [1, *letter_ids(question), 2, *letter_ids(piece), 2]
        place = context.index(answer) - first if answer else -1
        inside = answer and place >= 0 and place + len(answer) <= len(piece)
        labels = (3 + place, 2 + place + len(answer)) if inside else (0, 0)
        found.append((ids, [0, 0, 0, *[1] * (len(piece) + 1)], *labels, first))
    return found


def window_loss(model, ids, types, start, end, _):
    """transformers' own loss of one window without padding."""
    inputs = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
    return model(**inputs, start_positions=torch.tensor([start]), end_positions=torch.tensor([end])).loss


# --- windows


@pytest.mark.parametrize("name", ["pair", *LABELS])
@pytest.mark.parametrize("stride", [0, 2])
def test_windows_cover_each_character_and_overlap(name, stride):
    tokenizer = pair_tokenizer() if name == "pair" else LABELS[name][0]
    question, context = ("q", "abcdefghijklmno") if name == "pair" else ("New", "Washington in New York's. Washington")
    answer = (3, context[3:5])
    data, windows, _, _ = tokenize_questions(
        [Question(question, context, (answer,), "f:1")], tokenizer, max_length=14, doc_stride=stride, on_bad_row="error"
    )
    assert len(windows) > 1 or len(tokenizer(question, context)["input_ids"]) <= 14
    covered = [[place for place in window.places if place] for window in windows]
    characters = {index for places in covered for start, end in places for index in range(start, end)}
    assert characters == {index for index, letter in enumerate(context) if not letter.isspace()}
    for one, other in itertools.pairwise(covered):
        assert len(set(one) & set(other)) >= min(stride, 1)
    assert max(map(len, data["input_ids"])) <= 14
    assert any(start for start, _ in data["labels"])
    for window, (start, end) in zip(windows, data["labels"], strict=True):
        if start:
            assert context[window.places[start][0] : window.places[end][1]].startswith(answer[1][:1]) or name != "pair"
            assert window.places[start][0] <= 3 < 5 <= window.places[end][1]


def test_windows_by_hand():
    rows = [Question(q, c, ((c.index(a), a),) if a else (), "f:1") for q, c, a in (*ROWS, *HELD_OUT)]
    data, windows, questions, _ = tokenize_questions(
        rows, pair_tokenizer(), max_length=8, doc_stride=2, on_bad_row="error"
    )
    expected = [(number, *each) for number, row in enumerate((*ROWS, *HELD_OUT)) for each in windows_by_hand(*row)]
    assert data["input_ids"][:] == [ids for _, ids, *_ in expected]
    assert data["token_type_ids"][:] == [types for _, _, types, *_ in expected]
    assert data["labels"][:] == [[start, end] for *_, start, end, _ in expected]
    assert [window.question for window in windows] == [number for number, *_ in expected]
    assert questions == rows


def test_the_first_answer_that_a_window_holds_is_its_target():
    row = Question(" q", "abcdabzz", ((0, "ab"), (4, "ab ".strip())), "f:1")
    data, *_ = tokenize_questions([row], pair_tokenizer(), max_length=8, doc_stride=0, on_bad_row="error")
    assert data["labels"][:] == [[3, 4], [3, 4]]
    assert target([None, (3, 4), (4, 5)], [(2, " ab ")]) == (1, 2)  # without the white space around it


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Question("qqqqq", "abc", (), "f:1"), "leaves no room"),
        (Question("qqq", "abc", (), "f:1"), "leaves no room"),  # 2 tokens, all of which the next window would have too
        (Question("q", "abcdefgh", ((1, "bcdef"),), "f:1"), "no window holds an answer whole"),
    ],
)
def test_questions_that_windows_cannot_hold(row, said):
    with pytest.raises(UserError, match=f"{said}.*f:1"):
        tokenize_questions([row], pair_tokenizer(), max_length=8, doc_stride=2, on_bad_row="error")


def test_the_saved_tokenizer_does_not_truncate(tmp_path):
    tokenizer = pair_tokenizer()
    tokenize_questions(
        [Question("q", "abcdefgh", (), "f:1")], tokenizer, max_length=8, doc_stride=2, on_bad_row="error"
    )
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None
    assert len(AutoTokenizer.from_pretrained(tmp_path)("abcdefghijk")["input_ids"]) == 13


# --- answers


def test_the_best_answers_are_those_of_all_pairs():
    """Against a loop over all pairs of ends, in a window whose first three tokens are no passage."""
    torch.manual_seed(1)
    logits = torch.randn(9, 2)
    places = [None, None, None, *((index, index + 1) for index in range(5)), None]
    pairs = [
        (float(logits[i, 0].double() + logits[j, 1].double()), places[i][0], places[j][1])
        for i in range(3, 8)
        for j in range(i, min(8, i + 3))
    ]
    found = best_answers(logits, places, 3, 4)
    best = sorted(pairs, reverse=True)[:4]
    assert [(each.start, each.end) for each in found] == [pair[1:] for pair in best]
    assert [each.score for each in found] == pytest.approx([pair[0] for pair in best])
    assert best_answers(logits, [None] * 9, 3) == []
    assert len(best_answers(logits, places, 1, 99)) == 5


def test_the_answer_is_the_best_of_all_windows_or_none_if_none_is_better_in_each():
    questions = [Question("q", "abcdef", (), "f:1"), Question("r", "xyz", (), "f:2")]
    windows = [Window(0, []), Window(0, []), Window(1, [])]
    found = np.array([[1.0, 0, 2, 5.0], [3.0, 3, 5, 2.0], [1.0, 0, 1, 1.5]])
    assert answers_of(windows, found, questions, unanswerable=True) == ["de", ""]  # 3 > min(5, 2); 1 < 1.5
    assert answers_of(windows, found, questions, unanswerable=False) == ["de", "x"]


def test_the_floor_is_no_answer_where_that_is_right_more_often():
    train = [Question("which?", "red or blue", ((0, "red"),), "t")]
    asked = [Question("which?", "red or blue", (), "e")] * 3 + [Question("which?", "red or blue", ((0, "red"),), "e")]
    assert answer_metrics(floor_scores(train, asked))["exact_match"] == 0.75
    assert answer_metrics(floor_scores(train, asked[2:]))["f1"] == 0.5


def test_the_baseline_looks_for_known_answers():
    train = [Question("q", "", ((0, text),), "f:1") for text in ("red", "red", "blue")]
    train.append(Question("r", "", ((0, "green"),), "f:2"))
    asked = [
        ("q", "a blue red car"),
        ("q", "a blue car"),
        ("r", "a red car"),
        ("r", "a red green car"),
        ("new", "green"),
        ("q", "nothing"),
    ]
    assert commonest_answers(train, [Question(*each, (), "f") for each in asked]) == [
        "red",
        "blue",
        "red",
        "green",
        "green",
        "",
    ]


# --- the stage


def test_one_step_is_adamw_on_the_mean_over_windows(tmp_path):
    """Three windows in a batch of four, in two microbatches: padding row and padding tokens count for nothing."""
    settings = recipe(tmp_path, ROWS[:1], max_steps=1, per_device_train_batch_size=2)
    run(settings)
    model = untrained(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    found = windows_by_hand(*ROWS[0])
    assert len(found) == 3
    loss = torch.stack([window_loss(model, *window) for window in found]).mean()
    loss.backward()
    optimizer.step()
    assert metrics(settings)[0]["train/loss"] == pytest.approx(float(loss), abs=1e-5)
    for name, weight in trained(settings).items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), atol=2e-5, rtol=0)


def answer_by_hand(model, question, context) -> str:
    """The best pair of ends of all windows, against the least score of the first token of any."""
    best, null = (-np.inf, ""), np.inf
    for ids, types, _, _, first in windows_by_hand(question, context, None):
        output = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        null = min(null, start[0] + end[0])
        for i in range(3, len(ids) - 1):
            for j in range(i, min(len(ids) - 1, i + 3)):
                best = max(best, (start[i] + end[j], context[first + i - 3 : first + j - 2]))
    return "" if null > best[0] else best[1]


def test_evaluation_is_squads_and_has_a_baseline(tmp_path, capsys):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, num_train_epochs=3, per_device_eval_batch_size=2)
    results = run(settings)
    model = AutoModelForQuestionAnswering.from_pretrained(settings.output_dir).eval()
    found = [window for row in HELD_OUT for window in windows_by_hand(*row)]
    for suffix, judged in (("_before", untrained(settings)), ("", model)):
        losses = [float(window_loss(judged, *window)) for window in found]
        assert results.metrics[f"eval_loss{suffix}"] == pytest.approx(np.mean(losses), abs=1e-5)
        said = [answer_by_hand(judged, question, context) for question, context, _ in HELD_OUT]
        gold = [[answer] if answer else [] for *_, answer in HELD_OUT]
        for name, score in (("exact_match", exact_match), ("f1", token_f1)):
            expected = np.mean([score(a, g) for a, g in zip(said, gold, strict=True)])
            assert results.metrics[f"eval_{name}{suffix}"] == pytest.approx(expected)
    assert results.baseline["exact_match"] == 1.0  # cd and ab are known, and mmm has no known answer
    logged = {name for line in metrics(settings) for name in line} - {"step", "time"}
    assert undocumented(logged) == []
    assert {f"eval/{name}" for name in ANSWER_METRICS} <= logged
    shown, card = capsys.readouterr().err, (Path(settings.output_dir) / "README.md").read_text()
    assert all("| with an answer | 2 |" in text and "| without an answer | 1 |" in text for text in (shown, card))
    names = {"question": "q", "context": "cdz"}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["answer"] in ("", *(names["context"][i:j] for i in range(3) for j in range(i, 4)))
    assert read_manifest(settings.output_dir)["unanswerable"] is True


def test_without_unanswerable_questions_there_is_always_an_answer_and_lora_is_merged(tmp_path):
    settings = recipe(tmp_path, ROWS[:2], HELD_OUT[:2], method="lora", lora_r=2, num_train_epochs=2)
    results = run(settings)
    model = AutoModelForQuestionAnswering.from_pretrained(settings.output_dir).eval()
    losses = [float(window_loss(model, *window)) for row in HELD_OUT[:2] for window in windows_by_hand(*row)]
    assert results.metrics["eval_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert read_manifest(settings.output_dir)["unanswerable"] is False


def test_a_passage_is_on_one_side_with_all_its_questions(tmp_path):
    rows = [(question, letter * 3, letter) for letter in "abcdefghijkl" for question in "qrs"]
    settings = recipe(tmp_path, rows, eval_fraction=0.3, max_steps=1)
    run(settings)
    report = read_manifest(settings.output_dir)["data"]
    assert report["evaluation_rows"] % 3 == 0 < report["evaluation_rows"] < 36
    asked = recipe(tmp_path, rows[:3], [("t", "aaa", "a")], output_dir=str(tmp_path / "asked"), max_steps=1)
    run(asked)  # another question about a passage of training
    assert read_manifest(asked.output_dir)["data"]["train_rows"] == 3


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights_to_the_bit(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, num_train_epochs=3, save_steps=3, eval_steps=6)
    folder = Path(settings.output_dir)
    stop_after_checkpoint("question-answering", save_recipe(settings, tmp_path / "recipe.yaml"), folder)
    assert not (folder / MANIFEST).exists()
    results = run(settings)
    whole = dataclasses.replace(settings, output_dir=str(tmp_path / "whole"), save_steps=None)
    assert dataclasses.replace(run(whole), output_dir=settings.output_dir) == results
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(settings).items())
    assert measured(settings) == measured(whole)


@pytest.mark.slow
def test_two_ranks_train_and_evaluate_as_one(tmp_path):
    settings = recipe(tmp_path, eval_rows=HELD_OUT, per_device_train_batch_size=1, num_train_epochs=2)
    results = run(settings)
    shared = dataclasses.replace(
        settings, output_dir=str(tmp_path / "shared"), deepspeed=deepspeed_file(tmp_path / "zero2.json", 2)
    )
    done = run_stage("question-answering", save_recipe(shared, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    together = read_manifest(shared.output_dir)["results"]
    for name, value in results.metrics.items():
        assert together[name] == pytest.approx(value, abs=1e-4), name


def test_what_is_refused_before_weights_are_loaded(tmp_path):
    save_tiny_policy(tmp_path / "decoder")
    with pytest.raises(UserError, match=r"decoder \(llama\) is no encoder"):
        run(recipe(tmp_path, model_name_or_path=str(tmp_path / "decoder")))
    settings = recipe(tmp_path)
    wrong = as_row("q", "abc", "b") | {"answers": {"text": ["b"], "answer_start": [0]}}
    Path(settings.train_dataset[0].path).write_text(json.dumps(wrong) + "\n")
    with pytest.raises(UserError, match=r"text is not what the context has at its `answer_start`: 1 .*train.jsonl:1"):
        run(settings)
