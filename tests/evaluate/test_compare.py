"""`align evaluate` with tiny models: numbers worked out with plain torch and transformers, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import align.evaluate.compare as stage
from align import __main__ as cli
from align.config.base import StageRecipe
from align.config.data_source import DataSource
from align.config.evaluate import EvaluateRecipe
from align.config.load import load_recipe
from align.config.unknown_keys import ANY_STAGE, OF_STAGE, SAMPLING
from align.data.rows import Demonstration
from align.errors import OtherRun, UserError
from align.evaluate.compare import run
from align.evaluate.few_shot import draw_examples, example_pools, few_shot_prompt, pool_for
from align.evaluate.inputs import prepare_inputs
from align.evaluate.predict import decode_predictions
from align.evaluate.reader import EncodedRow, Reader, encode_row
from align.generation.ending import Ending
from align.generation.generate import generate
from align.runs.files import write_json
from align.runs.own_files import MANIFEST, RUN
from align.runs.results import EvaluationResult
from tests.data.test_tokenize import make_tokenizer
from tests.ranks import launch
from tests.worlds import LETTERS, letter_ids, letter_tokenizer, manifest, save_tiny_policy, tiny_llama, write_jsonl

TRAIN = [(first + "b", "c" + first) for first in LETTERS[:12]]
ROWS = [("xyz", "zy"), ("k", "lmnop"), ("mn", "opq"), ("q", "r"), ("cc", "d"), ("zzzz", "abcabc"), ("yx", "ab")]


def rows(pairs, **columns) -> list[dict]:
    """Prompt and completion, and further columns (one value per row)."""
    extra = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or [{}] * len(
        pairs
    )
    return [
        {"prompt": prompt, "completion": completion, **more}
        for (prompt, completion), more in zip(pairs, extra, strict=True)
    ]


def recipe(folder: Path, train=None, evaluation=None, **changes) -> EvaluateRecipe:
    """Two random models, `base` and `tuned`, on ROWS."""
    for seed, name in enumerate(("base", "tuned")):
        if not (folder / name).exists():
            save_tiny_policy(folder / name, seed)
    settings = {
        "output_dir": str(folder / "out"),
        "models": {name: str(folder / name) for name in ("base", "tuned")},
        "train_dataset": [DataSource(path=write_jsonl(folder / "train.jsonl", train or rows(TRAIN)))],
        "eval_dataset": [DataSource(path=write_jsonl(folder / "eval.jsonl", evaluation or rows(ROWS)))],
        "max_new_tokens": 6,
        "per_device_eval_batch_size": 3,
        "bootstrap_iters": 50,
    }
    return EvaluateRecipe(**{**settings, **changes})


def values(results, metric, task=None) -> dict[tuple[str, int], float]:
    return {
        (entry.model, entry.num_shots): entry.value
        for entry in results.values
        if entry.metric == metric and entry.task == task
    }


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "predictions.jsonl").read_text().splitlines()]


def judged(model, prompt: str, completion: str) -> tuple[float, int, int]:
    """Sum of -log p, likeliest tokens and number of the completion's tokens, end-of-text included: alone, without padding."""
    ids = torch.tensor([[*letter_ids(prompt), *letter_ids(completion), 2]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    target = ids[0, len(prompt) :]
    chosen = log_softmax(logits.double(), dim=-1)[torch.arange(len(target)), target]
    return -float(chosen.sum()), int((logits.argmax(-1) == target).sum()), len(target)


def greedy(model, prompt: str, length: int) -> str:
    ids = torch.tensor([letter_ids(prompt)])
    found = model.generate(ids, max_new_tokens=length, do_sample=False, pad_token_id=0, eos_token_id=2)
    return letter_tokenizer().decode(found[0, ids.shape[1] :], skip_special_tokens=True)


# --- the numbers


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_perplexity_and_token_accuracy_are_means_over_all_tokens(tmp_path, batch_size):
    results = run(recipe(tmp_path, per_device_eval_batch_size=batch_size))
    for seed, name in enumerate(("base", "tuned")):
        nll, right, count = map(sum, zip(*(judged(tiny_llama(seed), *row) for row in ROWS), strict=True))
        assert values(results, "perplexity")[name, 0] == pytest.approx(math.exp(nll / count), rel=1e-5)
        assert values(results, "token_accuracy")[name, 0] == pytest.approx(right / count)
    assert right > 0  # or the last line would say nothing
    assert not any("prediction" in line and line["prediction"] for line in predictions(tmp_path))


def test_the_likeliest_tokens_as_transformers_finds_them(tmp_path):
    """Rows of one batch have prompts of different lengths and end at different steps."""
    # what `base` says to the first prompt is made its reference
    right = greedy(tiny_llama(0), "xyz", 6)
    assert right
    evaluation = rows([("xyz", right), *ROWS[1:]])
    results = run(
        recipe(tmp_path, evaluation=evaluation, metrics=["exact_match", "chrf"], per_device_eval_batch_size=16)
    )
    lines = predictions(tmp_path)
    assert len(lines) == 2 * len(ROWS)
    for line in lines:
        model = tiny_llama(["base", "tuned"].index(line["model"]))
        assert line["prediction"] == greedy(model, line["prompt"], 6)
    assert values(results, "exact_match") == {("base", 0): pytest.approx(1 / 7), ("tuned", 0): 0.0}
    first = lines[0]
    assert first["row"] == f"{tmp_path / 'eval.jsonl'}:1"
    assert (first["model"], first["num_shots"], first["prompt"], first["reference"]) == ("base", 0, "xyz", right)
    assert first["scores"] == {"exact_match": 1.0, "chrf": pytest.approx(100.0)}


def test_greedy_log_probabilities_are_those_of_temperature_1():
    prompt = torch.tensor([letter_ids("xyz")])
    for temperature in (0.0, 1.0):
        ids, mask, logprobs = generate(
            tiny_llama(), prompt, prompt > 0, torch.zeros(1, 4), temperature, Ending(letter_tokenizer())
        )
        logits = tiny_llama()(input_ids=torch.cat([prompt, ids], dim=1)).logits[:, 2:-1]
        expected = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
        torch.testing.assert_close(logprobs, expected * mask, atol=1e-5, rtol=0)


def test_sampling_belongs_to_the_row(tmp_path):
    said = []
    for number, changes in enumerate(({}, {"per_device_eval_batch_size": 7}, {"seed": 1}, {"temperature": 0.0})):
        out = {"output_dir": str(tmp_path / f"out{number}" / "out")}
        run(recipe(tmp_path, metrics=["exact_match"], **{"temperature": 1.0, **out, **changes}))
        said.append([line["prediction"] for line in predictions(tmp_path / f"out{number}")])
    assert said[0] == said[1]
    assert said[0] != said[2]
    assert said[0] != said[3]


def test_a_prediction_ends_before_the_first_stop_string(tmp_path):
    said = greedy(tiny_llama(0), "xyz", 6)
    stop = said[2]
    run(recipe(tmp_path, metrics=["exact_match"], stop_strings=[said[4], stop]))
    assert predictions(tmp_path)[0]["prediction"] == said[: said.index(stop)]


def test_a_blank_line_ends_an_answer_to_text_examples_that_have_none():
    decoded = SimpleNamespace(
        eos_token_id=2,
        chat_template=None,
        get_added_vocab=dict,
        decode=lambda ids: "",
        batch_decode=lambda ids, skip_special_tokens: [" one\ntwo \n\nQ: three"],
    )

    def cut(stops):
        rows = [EncodedRow("", [], [], 0, stops)]
        return decode_predictions(SimpleNamespace(tokenizer=decoded, rows=rows), [[5]])

    assert cut([]) == ["one\ntwo \n\nQ: three"]
    assert cut(["\n\n"]) == ["one\ntwo"]
    assert cut(["\n\n", "two", "Q"]) == ["one"]


def test_intervals_and_comparisons(tmp_path):
    """The baseline comes first; each setting is compared with the baseline's before it."""
    results = run(recipe(tmp_path, metrics=["perplexity", "rouge"], num_shots=[0, 2]))
    pairs = [
        (c.model, c.num_shots, c.against["model"], c.against["num_shots"])
        for c in results.comparisons
        if c.metric == "perplexity"
    ]
    assert pairs == [
        ("base", 2, "base", 0),
        ("tuned", 0, "base", 0),
        ("tuned", 0, "base", 2),
        ("tuned", 2, "base", 0),
        ("tuned", 2, "base", 2),
    ]
    assert results.baseline == "base"
    ppl = values(results, "perplexity")
    assert len(set(ppl.values())) == 4
    for compared in results.comparisons:
        if compared.metric == "perplexity":
            against = compared.against
            difference = ppl[compared.model, compared.num_shots] - ppl[against["model"], against["num_shots"]]
            assert compared.difference == pytest.approx(difference)
            assert compared.low <= compared.difference <= compared.high
        assert 1 / 51 <= compared.p_value <= 1
    for entry in results.values:
        assert entry.low <= entry.value <= entry.high
        assert entry.n == len(ROWS)
    assert {entry.metric for entry in results.values} == {
        "perplexity",
        "rouge1",
        "rouge2",
        "rougeL",
        "rougeLsum",
    }


def test_by_task(tmp_path):
    tasks = ["up", "down", "up", "down", "up", "down", "down"]
    results = run(recipe(tmp_path, evaluation=rows(ROWS, task=tasks), metrics=["perplexity"]))
    for task in ("up", "down"):
        own = [judged(tiny_llama(0), *row) for row, its in zip(ROWS, tasks, strict=True) if its == task]
        nll, _, count = map(sum, zip(*own, strict=True))
        assert values(results, "perplexity", task)["base", 0] == pytest.approx(math.exp(nll / count), rel=1e-5)
    sizes = {(entry.task, entry.n) for entry in results.values}
    assert sizes == {(None, 7), ("up", 3), ("down", 4)}
    assert "## Results by task" in (tmp_path / "out" / "results.md").read_text()


def test_two_tokenizers_have_no_common_tokens(tmp_path):
    """Per-token measures are then in different units; what is of texts still compares."""
    settings = recipe(tmp_path, metrics=["perplexity", "bits_per_byte", "exact_match"])
    other = json.loads((tmp_path / "tuned" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "tuned" / "tokenizer.json").write_text(json.dumps(other))
    results = run(settings)
    assert {compared.metric for compared in results.comparisons} == {"exact_match", "bits_per_byte"}
    nll = sum(judged(tiny_llama(0), *row)[0] for row in ROWS)
    size = sum(len(completion) for _, completion in ROWS)
    assert values(results, "bits_per_byte")["base", 0] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert (
        "## Results; perplexity: not to be compared between models of different tokenizers"
        in (tmp_path / "out" / "results.md").read_text()
    )
    assert len(values(results, "perplexity")) == 2


# --- examples in the prompt


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_examples_of_text_and_of_messages():
    row = Demonstration("Q: c\nA:", " d", "w")
    examples = [Demonstration("Q: a\nA:", " b\n", "w"), Demonstration("Q: e\nA:", " f", "w")]
    assert few_shot_prompt(row, examples) == "Q: a\nA: b\n\nQ: e\nA: f\n\nQ: c\nA:"
    assert few_shot_prompt(row, []) == "Q: c\nA:"
    system, other = message("system", "Be kind."), message("system", "Be brief.")
    row = Demonstration([system, message("user", "c")], [message("assistant", "d")], "w")
    example = Demonstration([other, message("user", "a")], [message("assistant", "b")], "w")
    assert few_shot_prompt(row, [example]) == [
        system,
        message("user", "a"),
        message("assistant", "b"),
        message("user", "c"),
    ]


def test_examples_are_drawn_by_seed_without_repetition():
    pool = [Demonstration(letter, letter, letter, {"task": "x"}) for letter in LETTERS]
    eight = [row.where for row in draw_examples(pool, 8, "seed")]
    assert len(set(eight)) == 8
    assert [row.where for row in draw_examples(pool, 3, "seed")] == eight[:3]  # fewer examples are the first of more
    assert [row.where for row in draw_examples(pool, 8, "other")] != eight
    assert sorted(row.where for row in draw_examples(pool, 26, "seed")) == list(LETTERS)


def test_examples_are_of_the_same_task_and_kind_and_weights_do_not_count():
    row = Demonstration("a", "b", "1", {"task": "x"})
    chat = Demonstration([message("user", "a")], [message("assistant", "b")], "2", {"task": "x"})
    other = Demonstration("a", "b", "3", {"task": "y"})
    assert example_pools([row, row, chat, other]) == {("x", True): [row], ("x", False): [chat], ("y", True): [other]}


def test_where_no_training_row_is_of_the_task_all_may_be_examples():
    row = Demonstration("a", "b", "1", {"task": "x"})
    chat = Demonstration([message("user", "a")], [message("assistant", "b")], "2", {"task": "x"})
    other = Demonstration("a", "b", "3", {"task": "y"})
    found = example_pools([row, chat, other])
    assert pool_for(row, found) == [row]
    assert pool_for(Demonstration("a", "b", "4", {"task": "z"}), found) == [row, other]


def test_labels_are_read_back_from_what_templates_made(tmp_path, monkeypatch):
    """No prediction is its reference, and two of three name the right label."""
    source = DataSource(
        path=write_jsonl(
            tmp_path / "labelled.jsonl",
            [{"text": "x", "label": 1}, {"text": "y", "label": 0}, {"text": "z", "label": 1}],
        ),
        templates=[{"prompt": "{{ text }}", "completion": "{{ label }} q"}],
        labels={"0": "n", "1": "p"},
    )
    settings = recipe(tmp_path, train_dataset=[], eval_dataset=[source], metrics=["accuracy", "f1", "exact_match"])
    monkeypatch.setattr(stage, "decode_predictions", lambda *_: ["P, q", "well n", "n q"])
    results = run(settings)
    assert values(results, "exact_match")["base", 0] == 0.0
    assert values(results, "accuracy")["base", 0] == pytest.approx(2 / 3)
    assert values(results, "f1")["base", 0] == pytest.approx(2 / 3)  # n: 1 of 2 said and 1 true. p: 1 of 1 and 2


def test_prompts_with_examples_come_from_the_training_rows_of_the_task(tmp_path):
    """Whatever is drawn is a training row, and the model gets it as it stands."""
    tokenizer_text = "".join(LETTERS)
    assert tokenizer_text  # every letter is a token; blank lines are none, and vanish
    train = rows(TRAIN, task=["x", "y"] * 6)
    settings = recipe(tmp_path, train=train, evaluation=rows(ROWS, task=["x"] * 7), num_shots=[0, 3])
    inputs = prepare_inputs(settings, generates=True)
    of_task = {f"{row['prompt']}{row['completion']}" for row in train if row["task"] == "x"}
    zero, three = inputs.settings[:2]
    assert [zero.rows[0].prompt, zero.num_shots, three.num_shots] == ["xyz", 0, 3]
    seen = set()
    for encoded, (own, _) in zip(three.rows, ROWS, strict=True):
        prompt, ids = encoded.prompt, encoded.prompt_ids
        *examples, last = prompt.split("\n\n")
        assert last == own
        assert len(set(examples)) == 3
        assert set(examples) <= of_task
        assert [token for token in ids if token > 2] == letter_ids(prompt.replace("\n", ""))
        seen |= {tuple(examples)}
    assert len(seen) > 1  # each row has its own
    assert [row.stop_strings for row in three.rows] == [["\n\n"]] * 7
    assert [row.stop_strings for row in zero.rows] == [[]] * 7


def test_a_training_row_that_is_evaluated_is_no_example(tmp_path):
    settings = recipe(tmp_path, train=rows([*ROWS, *TRAIN[:3]]), num_shots=[3])
    inputs = prepare_inputs(settings, generates=False)
    for prompt in [row.prompt for row in inputs.settings[0].rows]:
        assert set(prompt.split("\n\n")[:3]) == {f"{prompt}{completion}" for prompt, completion in TRAIN[:3]}


def test_answers_of_several_paragraphs_do_not_end_at_a_blank_line(tmp_path):
    train = rows([("ab", "c\n\nd"), ("bb", "c")])
    setting = prepare_inputs(recipe(tmp_path, train=train, num_shots=[2]), True).settings[0]
    assert [row.stop_strings for row in setting.rows] == [[]] * 7


def test_few_shots_change_what_is_asked(tmp_path):
    """Zero-shot and k-shot of the untuned model beside the tuned one; the examples are judged by nobody."""
    train = rows([("ab", "c"), ("bb", "c")])
    results = run(recipe(tmp_path, train=train, num_shots=[2], seed=3))
    expected = []
    for line in predictions(tmp_path)[::2]:
        prompt = line["prompt"].replace("\n", "")
        tokens = letter_tokenizer()(line["prompt"])["input_ids"]
        ids = torch.tensor([[*tokens, *letter_ids(line["reference"]), 2]])
        with torch.no_grad():
            logits = tiny_llama(0)(input_ids=ids).logits[0, len(tokens) - 1 : -1].double()
        target = ids[0, len(tokens) :]
        expected.append((-float(logits.log_softmax(-1)[torch.arange(len(target)), target].sum()), len(target)))
        assert prompt.startswith(("abcbbc", "bbcabc"))
    nll, count = map(sum, zip(*expected, strict=True))
    assert values(results, "perplexity")["base", 2] == pytest.approx(math.exp(nll / count), rel=1e-5)


# --- rows


def test_a_row_that_one_setting_cannot_use_is_left_out_of_all(tmp_path):
    long = ("a" * 30, "b")
    settings = recipe(tmp_path, evaluation=rows([*ROWS, long]), num_shots=[0, 2], max_length=36, max_new_tokens=2)
    with pytest.raises(UserError, match=r"model base: longer than 36 tokens with 2 examples.*: 1 \(.*eval.jsonl:8\)"):
        run(settings)
    results = run(dataclasses.replace(settings, on_bad_row="skip"))
    assert results.rows == len(ROWS)
    assert {entry.n for entry in results.values} == {len(ROWS)}
    assert [line["row"].endswith(":8") for line in predictions(tmp_path)] == [False] * 28
    (reason,) = results.data["bad_rows"]
    assert results.data["bad_rows"][reason]["count"] == 1
    assert results.data["evaluation_rows"] == len(ROWS)


def test_a_reference_of_nothing_but_end_of_text(tmp_path):
    with pytest.raises(UserError, match=r"empty response: 1 \(.*eval.jsonl:1\)"):
        prepare_inputs(recipe(tmp_path, evaluation=rows([("a", "</s>"), *ROWS])), False)


def test_room_for_the_answer_is_needed_only_where_one_is_written(tmp_path):
    settings = recipe(tmp_path, max_length=12, max_new_tokens=9, on_bad_row="skip")
    assert len(prepare_inputs(settings, generates=False).rows) == 7
    assert len(prepare_inputs(settings, generates=True).rows) == 6  # zzzz and 9 are 13
    settings = recipe(tmp_path, max_new_tokens=254)  # the model has 256 positions
    with pytest.raises(UserError, match="model base: longer than 256 tokens and its response, which may"):
        prepare_inputs(settings, generates=True)


def test_evaluation_rows_alone(tmp_path):
    settings = recipe(tmp_path, train_dataset=[])
    assert [row.prompt for row in prepare_inputs(settings, False).rows] == [prompt for prompt, _ in ROWS]
    few = prepare_inputs(dataclasses.replace(settings, max_eval_rows=3), False)
    assert len(few.rows) == 3
    assert few.report["evaluation_rows"] == 3
    assert [source["used_for"] for source in few.report["sources"]] == ["evaluation"]
    assert [row.where for row in few.rows] == sorted(row.where for row in few.rows)


def test_without_an_evaluation_set_a_share_is_held_out(tmp_path):
    settings = recipe(tmp_path, eval_dataset=[], eval_fraction=0.4, num_shots=[1])
    inputs = prepare_inputs(settings, False)
    held_out = {row.prompt for row in inputs.rows}
    assert 0 < len(held_out) < len(TRAIN)
    for prompt in [row.prompt for row in inputs.settings[0].rows]:
        assert prompt[:2] not in held_out
    with pytest.raises(UserError, match="eval_fraction: is 0, so that there are no rows to evaluate"):
        prepare_inputs(dataclasses.replace(settings, eval_fraction=0.0), False)


def test_plain_text_is_judged_from_its_second_token_on(tmp_path):
    """The letter tokenizer puts no BOS before a text."""
    text = [{"text": "abcd"}, {"text": "xy"}]
    results = run(recipe(tmp_path, evaluation=text, train_dataset=[]))
    own = [judged(tiny_llama(0), "a", "bcd"), judged(tiny_llama(0), "x", "y")]
    nll, _, count = map(sum, zip(*own, strict=True))
    assert values(results, "perplexity")["base", 0] == pytest.approx(math.exp(nll / count), rel=1e-5)
    with pytest.raises(UserError, match=r"eval.jsonl:1: plain text has no prompt to respond to"):
        run(recipe(tmp_path, evaluation=text, train_dataset=[], metrics=["bleu"], output_dir=str(tmp_path / "b")))


TEMPLATE = "{% for m in messages %}{{ 'u' if m.role == 'user' else 'a' }}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


def test_a_chat_template_is_lent_to_models_that_have_none(tmp_path):
    chat = [{"messages": [message("user", "x"), message("assistant", "yz")]}]
    settings = recipe(tmp_path, evaluation=chat, train_dataset=[])
    with pytest.raises(UserError, match="base: the rows are messages, and the tokenizer has no chat template"):
        prepare_inputs(settings, True)
    own = letter_tokenizer()
    own.chat_template = TEMPLATE.replace("'u'", "'h'")
    own.save_pretrained(tmp_path / "tuned")
    (tmp_path / "t.jinja").write_text(TEMPLATE, encoding="utf-8")
    base, tuned = prepare_inputs(
        dataclasses.replace(settings, chat_template_path=str(tmp_path / "t.jinja")), True
    ).settings
    assert [row.prompt_ids for row in base.rows] == [letter_ids("uxa")]
    assert [row.prompt_ids for row in tuned.rows] == [letter_ids("hxa")]
    assert [row.ids[row.reference_start :] for row in base.rows] == [[*letter_ids("yz"), 2]]
    run(dataclasses.replace(settings, chat_template_path=str(tmp_path / "t.jinja"), metrics=["exact_match"]))
    assert predictions(tmp_path)[0]["prompt"] == "x"


# --- graders and other metrics


@pytest.fixture
def graders(tmp_path, monkeypatch):
    """A module of graders beside the recipe."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_graders", raising=False)
    (tmp_path / "my_graders.py").write_text(
        """
seen = []
def keep(**given):
    seen.append(given)
    return [1.0 if letter == "x" else 0.25 for letter in given["letter"]]
def some(completions, letter, **_):
    return [None if each == "x" else 1.0 for each in letter]
def short(completions, **_):
    return [1.0]
def fails(letter, **_):
    return [1 / (each != "z") for each in letter]
def large(completions, **_):
    return [2.0 for _ in completions]
def never(completions, **_):
    return [None for _ in completions]
def tokens(completion_ids, **_):
    return [[1.0] * len(ids) for ids in completion_ids]
""",
        encoding="utf-8",
    )
    return rows(ROWS, letter=list("xyxyxyz"))


def test_a_grader_sees_what_a_reward_function_sees(tmp_path, graders):
    results = run(
        recipe(
            tmp_path,
            evaluation=graders,
            metrics=[],
            grader="my_graders:keep",
            num_shots=[2],
            temperature=1.0,
            max_new_tokens=20,
        )
    )
    assert values(results, "keep") == {(name, 2): pytest.approx((3 + 4 * 0.25) / 7) for name in ("base", "tuned")}
    given = sys.modules["my_graders"].seen[0]
    assert given["prompts"] == [prompt for prompt, _ in ROWS]  # without the examples
    assert given["completion"] == [completion for _, completion in ROWS]
    assert given["letter"] == list("xyxyxyz")
    own = [line for line in predictions(tmp_path) if line["model"] == "base"]
    assert given["completions"] == [line["prediction"] for line in own]
    decoded = [letter_tokenizer().decode(ids, skip_special_tokens=True) for ids in given["completion_ids"]]
    assert decoded == given["completions"]
    assert len({len(ids) for ids in given["completion_ids"]}) > 1
    assert all(2 not in ids[:-1] for ids in given["completion_ids"])  # end-of-text is real, and the last
    assert all(len(ids) == 20 or ids[-1] == 2 for ids in given["completion_ids"])
    assert [line["scores"] for line in own][:2] == [{"keep": 1.0}, {"keep": 0.25}]


def test_a_grader_may_leave_rows_out(tmp_path, graders):
    results = run(recipe(tmp_path, evaluation=graders, metrics=[], grader="my_graders:some"))
    assert values(results, "some")["base", 0] == 1.0
    assert [line["scores"]["some"] for line in predictions(tmp_path)[::2]] == [None, 1, None, 1, None, 1, 1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "returned 1 scores for 7 responses"),
        ("fails", "ZeroDivisionError"),
        ("large", "returned numbers from 2 to 2; expected numbers from 0 to 1"),
        ("never", "returned None for every row"),
        ("tokens", "scores single tokens; expected one number per response"),
    ],
)
def test_a_grader_that_fails(tmp_path, graders, name, said):
    with pytest.raises(UserError, match=f"^grader: .*{said}"):
        run(recipe(tmp_path, evaluation=graders, metrics=[], grader=f"my_graders:{name}"))


def test_the_shipped_grader(tmp_path):
    evaluation = rows(ROWS, answer=[str(number) for number in range(7)])
    results = run(recipe(tmp_path, evaluation=evaluation, metrics=[], grader="reward_models.rules:numeric_answer"))
    assert set(values(results, "numeric_answer").values()) == {0.0}  # letters are no numbers


def test_a_metric_of_ones_own_has_a_value_and_no_interval(tmp_path):
    (tmp_path / "length.py").write_text(
        """
import datasets
import evaluate

class Length(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
                                   features=datasets.Features({"predictions": text, "references": text}))

    def _compute(self, predictions, references):
        if references[0] == "q":
            raise RuntimeError("no")
        return {"length": sum(map(len, predictions)), "longest": 7, "text": "no number"}
""",
        encoding="utf-8",
    )
    script = str(tmp_path / "length.py")
    results = run(recipe(tmp_path, evaluation=rows(ROWS, task=[*"xxxyyyy"]), metrics=[script]))
    lengths = {(name, 0): 0 for name in ("base", "tuned")}
    for line in predictions(tmp_path):
        lengths[line["model"], 0] += len(line["prediction"])
    assert values(results, "length") == lengths
    assert values(results, "length", "x") == {}
    assert values(results, "length/longest") == {("base", 0): 7, ("tuned", 0): 7}
    assert {entry.low for entry in results.values} == {None}
    assert results.comparisons == []
    settings = recipe(tmp_path, evaluation=rows([("x", "q")]), metrics=[script], output_dir=str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"metrics: .*length.py fails on texts.*RuntimeError: no"):
        run(settings)


# --- what is left behind


def test_the_files(tmp_path, capsys):
    settings = recipe(tmp_path, metrics=["perplexity", "exact_match", "f1"], num_shots=[0, 1])
    results = run(settings)
    shown = capsys.readouterr()
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert EvaluationResult.from_json(settings.output_dir, stored) == results
    assert results.value("perplexity", "tuned", 1) == values(results, "perplexity")["tuned", 1]
    there = r"no value of metric 'perplexity', model 'tuned', num_shots 2; there are .*model 'base', 'tuned'; num_shots 0, 1\.$"
    with pytest.raises(UserError, match=there):
        results.value("perplexity", "tuned", 2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.jsonl",
        "results.json",
        "results.md",
    ]
    report = (tmp_path / "out" / "results.md").read_text()
    for text in (report, shown.out):
        assert "base, 0-shot" in text
        assert "tuned, 1-shot" in text
        assert "Differences from base, on the same rows" in text
        assert f"{values(results, 'perplexity')['tuned', 1]:.4g} [" in text
    assert "7 rows." in report
    assert {entry.task for entry in results.values} == {None}  # one task is not told apart
    assert "evaluate 28/28  0:00:00 left  tuned 1-shot" in shown.err
    assert results.data["sources"][1]["rows"] == 7
    assert stored["recipe"]["num_shots"] == [0, 1]
    assert list(predictions(tmp_path)[0]["scores"]) == ["perplexity", "exact_match"]  # F1 is of no single row


def test_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    settings = recipe(tmp_path)
    first = run(settings)
    monkeypatch.setattr(stage, "load_language_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert run(settings) == first
    assert run(dataclasses.replace(settings, per_device_eval_batch_size=1)) == first
    assert "evaluated already" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds results that differ in max_new_tokens; delete the folder"):
        run(dataclasses.replace(settings, max_new_tokens=3))
    with pytest.raises(UserError, match="differ in models"):  # another baseline
        run(dataclasses.replace(settings, models=dict(reversed(settings.models.items()))))
    write_json(tmp_path / "tuned" / MANIFEST, manifest("sft"))  # made anew since
    with pytest.raises(UserError, match="holds results that differ in the stage it starts from"):
        run(settings)


def test_what_was_done_when_it_was_cut_off_is_kept(tmp_path, monkeypatch):
    settings = recipe(tmp_path, metrics=["perplexity", "chrf"], num_shots=[0, 1], eval_dataset=[DataSource(path=write_jsonl(tmp_path / "own.jsonl", rows(ROWS)))])  # fmt: skip
    whole = run(dataclasses.replace(settings, output_dir=str(tmp_path / "whole")))
    real, asked = stage.run_model, []

    def cut(model, setting, *rest, **settings):
        asked.append((setting.model, setting.num_shots))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(model, setting, *rest, **settings)

    monkeypatch.setattr(stage, "run_model", cut)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert not (tmp_path / "out" / "results.json").exists()
    resumed = run(settings)
    assert asked[4:] == [("tuned", 1)]
    assert resumed.values == whole.values
    assert resumed.comparisons == whole.comparisons


def test_what_changed_since_it_was_cut_off_is_named_and_refused(tmp_path, monkeypatch):
    settings = recipe(tmp_path)
    real, asked = stage.run_model, []

    def cut(*given, **settings):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(*given, **settings)

    monkeypatch.setattr(stage, "run_model", cut)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    write_jsonl(tmp_path / "eval.jsonl", rows([*ROWS[1:], ("new", "row")]))
    with pytest.raises(
        OtherRun, match=r"an unfinished run that differs in eval_dataset\[0\] \(.*has other rows.*output_dir.$"
    ):
        run(settings)
    write_jsonl(tmp_path / "eval.jsonl", rows(ROWS))
    record = (tmp_path / "out" / "run.json").read_text()
    (tmp_path / "out" / "run.json").write_text(record.replace('"max_new_tokens"', '"max_new_token"'))
    with pytest.raises(OtherRun, match=r"fingerprint does not match\. It says what .*parts was made from: put it back"):
        run(settings)
    (tmp_path / "out" / "run.json").write_text(record)
    write_json(tmp_path / "tuned" / "generation_config.json", {"eos_token_id": 3})
    with pytest.raises(
        OtherRun, match=r"differs in models.tuned \(.*to evaluate again.*`accept_changes: \[models\]`.$"
    ):
        run(settings)
    assert sorted((tmp_path / "out" / "parts").iterdir()) == parts
    run(dataclasses.replace(settings, accept_changes=["models"]))
    assert len(asked) == 3  # the second model alone
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "models.tuned (generation_config.json" in stored["accepted"][0]["changes"][0]


# --- mistakes, all told before a model is loaded


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"metrics": ["blue"]},
            r"metrics: no metric 'blue'; did you mean 'bleu'\?; built in are perplexity, token_accuracy,",
        ),
        (
            {"models": {"base": "gone/model/there"}},
            r"models\.base: no model at gone/model/there; run the stage that makes it first",
        ),
        ({"grader": "no_such_module:f"}, "grader: no module 'no_such_module'"),
        (
            {"num_shots": [0, 13]},
            "num_shots: expected at least 13 training rows of task '.*' to take examples from, found 12",
        ),
        ({"output_dir": "/proc/out"}, "output_dir: cannot write to /proc/out"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(stage, "load_language_model", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=f"^{said}"):
        run(recipe(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_too_few_rows_of_a_task(tmp_path):
    train = rows(TRAIN, task=["x"] * 10 + ["y"] * 2)
    with pytest.raises(UserError, match="at least 3 training rows of task 'y' to take examples from, found 2"):
        prepare_inputs(
            recipe(tmp_path, train=train, evaluation=rows(ROWS, task=["x"] * 6 + ["y"]), num_shots=[3]), False
        )


def test_models_that_do_not_write(tmp_path):
    config = BertConfig(vocab_size=29, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    letter_tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"models: .*bert \(bert\) is an encoder, which cannot generate"):
        run(recipe(tmp_path, models={"bert": str(tmp_path / "bert")}))


def test_a_model_that_is_still_being_trained(tmp_path):
    settings = recipe(tmp_path)
    write_json(tmp_path / "tuned" / RUN, {})
    with pytest.raises(UserError, match="has not finished"):
        run(settings)


# --- the recipe and the command


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def read(changes=None, *overrides) -> EvaluateRecipe:
        minimal = {"output_dir": "out", "models": ["base"], "eval_dataset": "rows.jsonl"}
        (tmp_path / "r.yaml").write_text(
            yaml.safe_dump({**minimal, **(changes or {})}, sort_keys=False), encoding="utf-8"
        )
        return load_recipe("evaluate", "r.yaml", overrides)

    return read


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("runs/1_sft", {"1_sft": "runs/1_sft"}),
        (
            ["base", "runs/sft", "Qwen/Qwen2.5-0.5B"],
            {"base": "base", "sft": "runs/sft", "Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B"},
        ),
        (["a/sft", "b/sft"], {"a/sft": "a/sft", "b/sft": "b/sft"}),
        ({"before": "a/sft", "after": "b/sft"}, {"before": "a/sft", "after": "b/sft"}),
    ],
)
def test_names_of_models(load, written, named):
    found = load({"models": written}).models
    assert found == named
    assert list(found) == list(named)  # the baseline is the first


def test_paths_beside_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "recipes"
    (folder / "base").mkdir(parents=True)
    (folder / "own.py").write_text("", encoding="utf-8")
    (folder / "bleu").mkdir()
    (folder / "r.yaml").write_text(
        "output_dir: out\nmodels: [base, org/x]\neval_dataset: r.yaml\nmetrics: [own.py, bleu]\n"
    )
    found = load_recipe("evaluate", str(folder / "r.yaml"))
    assert found.models == {"base": str(folder / "base"), "x": "org/x"}
    assert found.metrics == [str(folder / "own.py"), "bleu"]
    assert found.eval_dataset[0].path == str(folder / "r.yaml")
    assert found.stage == "evaluate"


def test_overrides(load):
    found = load(
        {"train_dataset": "t.jsonl"},
        "--models",
        "[a, b]",
        "--num_shots",
        "0",
        "4",
        "--metrics",
        "bleu",
        "--temperature",
        "0.5",
    )
    assert (found.models, found.num_shots, found.metrics, found.temperature) == (
        {"a": "a", "b": "b"},
        [0, 4],
        ["bleu"],
        0.5,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": -1}, "temperature: expected 0 (the likeliest token) or more, got -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a number at least 1, got 0"),
        ({"bootstrap_iters": 0}, "bootstrap_iters: expected a number at least 1, got 0"),
        ({"eval_fraction": 1}, "eval_fraction: expected a number from 0 to below 1, got 1"),
        ({"models": []}, "models: expected folders or hub ids of models, got none"),
        ({"models": [1]}, "models: expected a mapping of names to values"),
        ({"models": {"a": 1}}, "models.a: expected text, got 1"),
        ({"eval_dataset": []}, "eval_dataset: expected rows to evaluate on"),
        ({"eval_dataset": {"path": "a", "weight": 2}}, "eval_dataset: `weight` is for training rows"),
        ({"eval_dataset": [{"pth": "a"}]}, "eval_dataset[0].pth: unknown key"),
        ({"eval_dataset": [{"generator": "a"}]}, "eval_dataset[0].generator: expected `module:function`"),
        ({"metrics": []}, "metrics: expected names of metrics, or a `grader`, got neither"),
        ({"grader": "numeric_answer"}, "grader: expected `module:function`, got 'numeric_answer'"),
        ({"stop_strings": ["a", ""]}, "stop_strings: expected text that ends a prediction, got an empty string"),
        ({"num_shots": []}, "num_shots: expected different numbers from 0, got []"),
        ({"num_shots": [0, -1]}, "num_shots: expected different numbers from 0, got [0, -1]"),
        ({"num_shots": [2, 2]}, "num_shots: expected different numbers from 0, got [2, 2]"),
        ({"num_shots": [0, 4]}, "train_dataset: expected rows that give the 4 examples, got none"),
        ({"templates": {"a": {"prompt": "{{ x }}", "completion": "y"}}, "eval_dataset": [], "train_dataset": "t.jsonl"}, "templates: expected an `eval_dataset`: which rows a training stage"),
        ({"templates": {"a": {"prompt": "{{ x }}"}}}, "templates.a: no `completion`; a template has the parts prompt, completion."),
        ({"templates": {"a": {"prompt": "{{ x", "completion": "y"}}}, "templates.a.prompt: not a Jinja template"),
        ({"templates": ["a"]}, "templates: expected a mapping of names to values"),
        ({"templates": {"a": {"prompt": "x", "completion": "y"}}, "eval_dataset": {"path": "p", "templates": [{"prompt": "x", "completion": "y"}]}}, "eval_dataset[0].templates: the recipe's own `templates` write the rows of all sources"),
        ({"templates": {"a": {"prompt": "x", "completion": "y"}}, "eval_dataset": {"path": "p", "columns": {"prompt": "q"}}}, "eval_dataset[0].columns: `templates` read the source's own columns by name"),
        ({"chat_template_path": "gone.jinja"}, "chat_template_path: no file gone.jinja"),
        ({"stage": "sft"}, "stage: expected 'evaluate', got 'sft'"),
        ({"learning_rate": 1}, "learning_rate: unknown key; it belongs to the sft and reward and ppo and classify and token-classification and question-answering and mlm stages"),
        ({"num_fewshot": 4}, "num_fewshot: unknown key; called num_shots here"),
        ({"top_p": 0.9}, "top_p: unknown key; not supported: temperature 0 is greedy decoding"),
        ({"model_name_or_path": "a"}, "model_name_or_path: unknown key; called models here"),
    ],
)  # fmt: skip
def test_refusals(load, changes, said):
    with pytest.raises(UserError) as error:
        load(changes)
    assert f": {said}" in str(error.value)


def test_missing_keys(load, tmp_path):
    (tmp_path / "r.yaml").write_text("output_dir: out\neval_dataset: a\n", encoding="utf-8")
    with pytest.raises(UserError, match="models: missing; it is required"):
        load_recipe("evaluate", "r.yaml")


def test_keys_are_those_of_the_stages_where_they_mean_the_same():
    """Rows and models are loaded by the stages' own functions, to which the keys of the same name are given."""
    shared = {field.name for field in dataclasses.fields(StageRecipe)} & {
        field.name for field in dataclasses.fields(EvaluateRecipe)
    }
    assert shared >= {"train_dataset", "eval_dataset", "eval_fraction", "max_eval_rows", "on_bad_row", "seed", "bf16"}
    own = {field.name for field in dataclasses.fields(EvaluateRecipe)}
    assert not own & {*ANY_STAGE, *OF_STAGE["evaluate"], *SAMPLING.split()}


def test_the_command(tmp_path, capsys, monkeypatch):
    assert cli.main(["evaluate", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(EvaluateRecipe):
        assert f" --{field.name} <" in text
    assert "deepspeed --num_gpus N --module align.evaluate RECIPE" in text
    assert cli.main(["--help"]) == 0
    assert "\n    evaluate  " in capsys.readouterr().out
    assert cli.main(["evaluat"]) == 2
    assert "did you mean 'evaluate'?" in capsys.readouterr().err
    assert cli.main(["evaluate"]) == 2
    assert "align evaluate: expected a recipe file first" in capsys.readouterr().err


def test_bfloat16(tmp_path):
    model = AutoModelForCausalLM.from_pretrained
    seen = []

    def keep(path, dtype, **settings):
        seen.append(dtype)
        return model(path, dtype=dtype)

    original, stage.load_language_model = stage.load_language_model, keep
    try:
        results = run(recipe(tmp_path, bf16=True))
    finally:
        stage.load_language_model = original
    assert seen == [torch.bfloat16] * 2
    nll, _, count = map(sum, zip(*(judged(tiny_llama(0), *row) for row in ROWS), strict=True))
    assert values(results, "perplexity")["base", 0] == pytest.approx(math.exp(nll / count), rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_find_what_one_finds(tmp_path):
    settings = recipe(
        tmp_path, metrics=["perplexity", "token_accuracy", "chrf"], num_shots=[0, 2], per_device_eval_batch_size=2
    )
    plain = {**dataclasses.asdict(settings), "stage": None}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    done = launch("align.evaluate", str(tmp_path / "r.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Differences from base") == 1  # rank 0 alone tells
    two = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = predictions(tmp_path)
    (tmp_path / "out").rename(tmp_path / "two")
    alone = run(load_recipe("evaluate", str(tmp_path / "r.yaml")))
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == two
    assert alone == EvaluationResult.from_json(alone.output_dir, two)
    assert predictions(tmp_path) == lines


@pytest.mark.parametrize("completion", ["e", "e cat"])
def test_a_prompt_inside_the_first_token_is_read_as_itself(completion: str) -> None:
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", pad_token="</s>")  # it adds no BOS
    whole, own = (tokenizer(text)["input_ids"] for text in ("th" + completion, "th"))
    assert whole[0] == tokenizer.convert_tokens_to_ids("the")
    row = encode_row(Demonstration("th", completion, "f:1"), [], "model", Reader(tokenizer, 99), 1, [])
    assert (row.prompt_ids, row.ids, row.reference_start) == (own, [*whole, tokenizer.eos_token_id], 1)
