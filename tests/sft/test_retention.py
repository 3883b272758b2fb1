"""Not forgetting: what the model could do before is measured, bounds the choice of the checkpoint, and is replayed."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerControl, TrainerState, TrainingArguments

from align.cli.check import check
from align.config.data_source import DataSource
from align.config.load import load_recipe
from align.config.sft import METRICS, SFTRecipe
from align.data.rows import Demonstration
from align.data.tokenize import Report, tokenize_demonstrations
from align.errors import UserError
from align.runs import wandb_run
from align.runs.charts import draw, ticks
from align.runs.checkpoint import complete_checkpoints
from align.runs.manifest import read_manifest
from align.runs.tracker import Tracker
from align.runs.wandb_run import WandbRun
from align.sft.best_checkpoint import BoundedEarlyStopping, rank_key
from align.sft.evaluation import (
    HELD_OUT,
    OTHER,
    RETENTION,
    TRAINING,
    build_eval_rows,
    group_sums,
    groups_of_tokens,
    metrics_from_sums,
)
from align.sft.report import history_section
from align.sft.retention import load_with_retention, replay_count, with_replay
from align.sft.train import run
from align.sft.trainer import DemonstrationTrainer
from tests.documented_metrics import undocumented
from tests.ranks import run_stage
from tests.sft.letter_rows import ROWS, nll, recipe
from tests.worlds import (
    LETTERS,
    deepspeed_file,
    letter_ids,
    letter_tokenizer,
    measured,
    metrics,
    save_recipe,
    tiny_llama,
    trained,
    unfinished,
    write_jsonl,
)

TEXTS = [LETTERS[i : i + 3 + i % 5] for i in range(0, 23)]  # of which the parts say what the others are
HELD_OUT_ROWS = [("ab", "d"), ("k", "m"), ("q", "zs"), ("b", "c")]
TRAIN_ROWS = [row for row in ROWS if row[0] not in {prompt for prompt, _ in HELD_OUT_ROWS}]  # four


def tokenize(rows: Sequence[Demonstration]) -> tuple[Dataset, Report]:
    """The rows in token ids, as the recipes here have them."""
    return tokenize_demonstrations(rows, letter_tokenizer(), max_length=1024)


@functools.cache
def fluent() -> LlamaForCausalLM:
    """A model that knows the texts."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        total = sum(
            model(input_ids=(ids := torch.tensor([[*letter_ids(text), 2]])), labels=ids).loss * len(text)
            for text in TEXTS
        )
        (total / sum(map(len, TEXTS))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def texts(folder: Path, some=TEXTS, name="texts.jsonl", **keys) -> list[DataSource]:
    return [DataSource(path=write_jsonl(folder / name, [{"text": text} for text in some]), **keys)]


def retaining(folder: Path, some=TEXTS, **changes) -> SFTRecipe:
    """Twelve steps on four rows from a model that knows the texts, which are all measured."""
    if not (folder / "base").exists():
        fluent().save_pretrained(folder / "base")
        letter_tokenizer().save_pretrained(folder / "base")
    settings = {"eval_rows": HELD_OUT_ROWS, "num_train_epochs": 12, "eval_steps": 2, "retention": texts(folder, some)}
    settings["learning_rate"] = 2e-3
    return recipe(folder, **{**settings, **changes})


def text_nll(model, some) -> tuple[float, int, int]:
    """Sum of -log p over all tokens but the first of each text alone, tokens ranked first, and their number; no EOS."""
    total, right, count = 0.0, 0, 0
    for text in some:
        ids = torch.tensor([letter_ids(text)])  # the letters' tokenizer adds no BOS
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
        right += int((logits.argmax(-1) == ids[0, 1:]).sum())
        count += ids.shape[1] - 1
    return total, right, count


def evaluations(settings) -> list[dict]:
    return [line for line in metrics(settings) if "eval/loss" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that learns four rows by heart and forgets: recipe, results."""
    settings = retaining(tmp_path_factory.mktemp("finished"), per_device_eval_batch_size=3)
    return settings, run(settings)


class TestMeasured:
    def test_retention_is_the_mean_over_tokens_of_plain_transformers(self, finished):
        settings, results = finished
        lines = evaluations(settings)
        assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10, 12]
        losses = []
        for line, model in (
            (lines[0], fluent()),
            (lines[-1], AutoModelForCausalLM.from_pretrained(settings.output_dir)),
        ):
            total, right, count = text_nll(model, TEXTS)
            losses.append(total / count)
            assert line["eval/retention_loss"] == pytest.approx(total / count, abs=1e-5)
            assert line["eval/retention_token_accuracy"] == pytest.approx(right / count, abs=1e-9)
            assert line["eval/retention_perplexity"] == pytest.approx(
                torch.tensor(total / count).double().exp().item(), rel=1e-4
            )
        assert lines[0]["eval/forgetting"] == 0
        assert lines[-1]["eval/forgetting"] == pytest.approx(100 * (losses[1] - losses[0]) / losses[0], rel=1e-4)
        assert lines[-1]["eval/forgetting"] > 5, "the test wants a model that forgets"
        rows = {name: (before, after) for name, before, after in results.table}
        assert rows["retention loss (nats/token)"] == pytest.approx(losses, abs=1e-5)
        assert rows["forgetting (rise of the retention loss, %)"][1] == lines[-1]["eval/forgetting"]

    @pytest.mark.parametrize("method", ["prompt", "prefix"])
    def test_what_virtual_tokens_cost_is_against_the_model_without_them(self, tmp_path, finished, method):
        settings = retaining(tmp_path, method=method, num_virtual_tokens=3, max_steps=2, learning_rate=1e-2)
        run(settings)
        lines, theirs = evaluations(settings), evaluations(finished[0])[0]
        for name in ("eval/loss", "eval/train_loss", "eval/retention_loss", "eval/entropy"):
            assert lines[0][name] == pytest.approx(theirs[name], abs=1e-5), name
        total, count = 0.0, 0
        model = AutoPeftModelForCausalLM.from_pretrained(settings.output_dir)
        for text in TEXTS:
            ids = torch.tensor([letter_ids(text)])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -ids.shape[1] : -1]
            total += float(cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
        assert lines[-1]["eval/retention_loss"] == pytest.approx(total / count, abs=1e-5)
        before = theirs["eval/retention_loss"]
        assert lines[-1]["eval/forgetting"] == pytest.approx(100 * (total / count / before - 1), rel=1e-4)

    def test_held_out_loss_and_gap(self, finished):
        settings, results = finished
        for line, model in zip(
            (evaluations(settings)[0], evaluations(settings)[-1]),
            (fluent(), AutoModelForCausalLM.from_pretrained(settings.output_dir)),
            strict=True,
        ):
            with torch.no_grad():
                held_out, seen = (
                    float(total / count) for total, count in (nll(model, HELD_OUT_ROWS), nll(model, TRAIN_ROWS))
                )
            assert line["eval/loss"] == pytest.approx(held_out, abs=1e-5)
            assert line["eval/train_loss"] == pytest.approx(seen, abs=1e-5)
            assert line["eval/gap"] == pytest.approx(held_out - seen, abs=1e-5)
        assert results.metrics["eval_gap"] == evaluations(settings)[-1]["eval/gap"] > 1, (
            "the test wants a model that overfits"
        )

    def test_entropy_is_a_mean_over_tokens_too(self, finished):
        total, count = 0.0, 0
        for prompt, completion in HELD_OUT_ROWS:
            with torch.no_grad():
                logits = fluent()(input_ids=torch.tensor([[*letter_ids(prompt + completion), 2]])).logits[
                    0, len(prompt) - 1 : -1
                ]
            total += float(torch.distributions.Categorical(logits=logits).entropy().sum())
            count += len(logits)
        assert evaluations(finished[0])[0]["eval/entropy"] == pytest.approx(total / count, abs=1e-5)

    def test_every_metric_is_documented(self, finished):
        names = {name for line in metrics(finished[0]) for name in line} - {"step", "time"}
        assert undocumented(names) == []
        first = {name for name in evaluations(finished[0])[0] if name.startswith("eval/")}
        assert first == {f"eval/{name}" for name in (*METRICS, "perplexity")}

    def test_the_card_tells_the_course(self, finished):
        card = (Path(finished[0].output_dir) / "README.md").read_text()
        assert "| step | held-out loss | loss on training rows | retention loss | gap | forgetting % |" in card
        assert "| retention loss (nats/token) |" in card
        picture = ElementTree.parse(Path(finished[0].output_dir) / "losses.svg").getroot()
        curves = picture.findall("{http://www.w3.org/2000/svg}polyline")
        assert [len(curve.attrib["points"].split()) for curve in curves] == [7, 7, 7]
        words = [text.text for text in picture.findall("{http://www.w3.org/2000/svg}text")]
        last = evaluations(finished[0])[-1]["eval/retention_loss"]
        assert any(word.startswith("retention loss: ") and word.endswith(f" to {last:.4g}") for word in words)

    @pytest.mark.parametrize("changes", [{"padding_free": True}, {"packing": True, "max_length": 10}])
    def test_without_padding_too(self, tmp_path, finished, changes):
        """Texts of at most 10 tokens are whole; rows lie end to end, of several parts in one batch."""
        settings = retaining(tmp_path, max_steps=1, eval_steps=None, per_device_eval_batch_size=3, **changes)
        run(settings)
        ours, theirs = evaluations(settings)[0], evaluations(finished[0])[0]
        for name in (
            "eval/loss",
            "eval/retention_loss",
            "eval/train_loss",
            "eval/entropy",
            "eval/retention_token_accuracy",
        ):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name

    def test_what_packing_cuts_is_cut_in_the_evaluation(self, tmp_path):
        settings = retaining(
            tmp_path, ["abcdefghijkl", "xyz"], max_steps=1, eval_steps=None, packing=True, max_length=10
        )
        run(settings)
        total, count = 0.0, 0
        for ids in (letter_ids("abcdefghij"), letter_ids("kl"), letter_ids("xyz")):
            with torch.no_grad():
                logits = fluent()(input_ids=torch.tensor([ids])).logits[0, :-1]
            total += float(cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
            count += len(ids) - 1
        assert evaluations(settings)[0]["eval/retention_loss"] == pytest.approx(total / count, abs=1e-5)

    def test_by_task(self, tmp_path):
        sources = [
            DataSource(
                path=write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": p, "completion": c} for p, c in some]),
                task=name,
            )
            for name, some in (("spell", HELD_OUT_ROWS[:1]), ("count", HELD_OUT_ROWS[1:]))
        ]
        kept = [*texts(tmp_path, TEXTS[:4], "a.jsonl"), *texts(tmp_path, TEXTS[4:], "b.jsonl")]
        settings = retaining(tmp_path, max_steps=1, eval_steps=None, eval_dataset=sources, retention=kept)
        results = run(settings)
        line = evaluations(settings)[0]
        with torch.no_grad():
            for task, some in (("spell", HELD_OUT_ROWS[:1]), ("count", HELD_OUT_ROWS[1:])):
                total, count = nll(fluent(), some)
                assert line[f"eval/{task}/loss"] == pytest.approx(float(total / count), abs=1e-5)
            assert line["eval/loss"] == pytest.approx(float(nll(fluent(), HELD_OUT_ROWS)[0]) / 9, abs=1e-5)
        total, _, count = text_nll(fluent(), TEXTS[4:])
        assert line["eval/retention/b/loss"] == pytest.approx(total / count, abs=1e-5)
        assert results.metrics["eval_spell/loss_before"] == line["eval/spell/loss"]
        assert undocumented({*line} - {"step", "time"}) == []

    def test_sums_by_part_by_hand(self):
        nll_, right = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 8.0]]), torch.tensor([[1, 0, 0], [0, 1, 1]])
        groups = groups_of_tokens({"input_ids": torch.zeros(2, 4)}, torch.tensor([2, 0]), 3)
        assert group_sums(groups, 3, nll_, right).tolist() == [[12, 2], [0, 0], [3, 1]]
        flat = {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 1]])}  # rows of 2, 3 and 2 tokens
        values = torch.tensor([[1.0, 0.0, 2.0, 4.0, 0.0, 8.0]])
        assert group_sums(groups_of_tokens(flat, torch.tensor([1, 0, 1]), 6), 2, values).tolist() == [[6], [9]]

    def test_numbers_by_hand(self):
        parts = [(HELD_OUT, "a"), (HELD_OUT, "b"), (TRAINING, ""), (RETENTION, "c")]
        sums = torch.tensor([[2.0, 1, 4, 3], [4, 0, 2, 3], [1, 4, 4, 2], [6, 1, 4, 1]], dtype=torch.float64)
        found = metrics_from_sums(sums, parts, 1.2)
        assert found == pytest.approx(
            {
                "eval_loss": 1.0, "eval_mean_token_accuracy": 1 / 6, "eval_entropy": 1.0, "eval_a/loss": 0.5,
                "eval_a/token_accuracy": 0.25, "eval_b/loss": 2.0, "eval_b/token_accuracy": 0.0,
                "eval_retention_loss": 1.5, "eval_retention_perplexity": 4.48168907, "eval_retention_token_accuracy": 0.25,
                "eval_forgetting": 25.0, "eval_train_loss": 0.25, "eval_gap": 0.75,
            }
        )  # fmt: skip

    def test_training_rows_are_a_seeded_sample_of_the_size_of_the_held_out_rows(self, tmp_path):
        def data(rows, prefix):
            made = [
                Demonstration(p, c, f"{prefix}:{i}", {"task": f"{prefix}{i % 120}"}) for i, (p, c) in enumerate(rows)
            ]
            return tokenize(made)[0], made

        training = [("a" * (i % 9 + 1), LETTERS[i % 26]) for i in range(400)]
        held_out = data([("b", "c")] * 300, "h")
        samples = [build_eval_rows(held_out, None, data(training, "t")[0], 6, seed) for seed in (1, 1, 2)]
        rows = [[r["input_ids"] for r in each.rows if each.groups[r["group"]][0] == TRAINING] for each in samples]
        assert len(rows[0]) == 180, "4 of 9 prompts are short enough for 6 tokens"
        assert rows[0] == rows[1]
        assert max(map(len, rows[0])) == 6
        more = [build_eval_rows(held_out, None, data(training, "t")[0], 16, seed) for seed in (1, 1, 2)]
        assert more[0].rows["input_ids"][:] == more[1].rows["input_ids"][:] != more[2].rows["input_ids"][:]
        long = more[0]
        assert sum(long.groups[group][0] == TRAINING for group in long.rows["group"]) == 256
        assert (HELD_OUT, OTHER) in long.groups
        assert len(long.groups) == 102, "100 tasks, the others, and training rows"


class TestResponses:
    @pytest.fixture(scope="class")
    def judged(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("judged")
        settings = recipe(
            folder, TRAIN_ROWS, eval_rows=HELD_OUT_ROWS, num_train_epochs=30, eval_steps=10, eval_metrics=["exact_match", "rouge"],
            max_eval_generations=3, response_length=6, per_device_eval_batch_size=2, load_best_model_at_end=True,
            metric_for_best_model="eval_rougeL",
        )  # fmt: skip
        return settings, run(settings)

    def test_are_those_of_plain_greedy_search(self, judged):
        settings, _ = judged
        samples = [json.loads(line) for line in (Path(settings.output_dir) / "samples.jsonl").read_text().splitlines()]
        assert {row["step"] for row in samples} == {0, 10, 20, 30}
        first = [row for row in samples if row["step"] == 0]
        assert len(first) == 3
        matches = 0
        for row in first:
            ids = letter_ids(row["prompt"])
            for _ in range(6):
                with torch.no_grad():
                    ids.append(int(tiny_llama()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 2:
                    break
            said = "".join(LETTERS[i - 3] for i in ids[len(row["prompt"]) :] if i > 2)
            assert row["response"] == said
            assert dict(HELD_OUT_ROWS)[row["prompt"]] == row["reference"]
            matches += said == row["reference"]
        line = evaluations(settings)[0]
        assert line["eval/exact_match"] == matches / 3
        assert {"eval/rouge1", "eval/rouge2", "eval/rougeL", "eval/rougeLsum"} <= line.keys()
        assert undocumented({*line} - {"step", "time"}) == []

    def test_choose_the_model(self, judged):
        settings, results = judged
        scores = [line["eval/rougeL"] for line in evaluations(settings)]
        assert results.metrics["eval_rougeL"] == max(scores[1:-1])
        assert ("rougeL of the responses", scores[0], results.metrics["eval_rougeL"]) in results.table

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"eval_metrics": ["rogue"]}, "eval_metrics: no metric 'rogue'; did you mean 'rouge'"),
            ({"eval_metrics": ["rouge"], "response_length": 255}, r"response_length: the longest prompt has 2 tokens, which leaves 254"),
        ],
    )  # fmt: skip
    def test_refused(self, tmp_path, changes, words):
        with pytest.raises(UserError, match=words):
            run(recipe(tmp_path, TRAIN_ROWS, eval_rows=HELD_OUT_ROWS, **changes))

    def test_plain_text_has_nothing_to_answer(self, tmp_path):
        settings = recipe(tmp_path, TRAIN_ROWS, eval_metrics=["rouge"], eval_dataset=texts(tmp_path))
        with pytest.raises(UserError, match="eval_metrics: no evaluation row has a prompt"):
            run(settings)


class TestBound:
    def test_order_by_hand(self):
        entries = [
            {"step": 2, "eval_loss": 3.0, "eval_forgetting": 1.0},
            {"step": 4, "eval_loss": 2.0, "eval_forgetting": 5.0},
            {"step": 6, "eval_loss": 1.0, "eval_forgetting": 5.1},
            {"step": 8, "eval_loss": 0.5, "eval_forgetting": 30.0},
            {"step": 10, "eval_loss": float("nan"), "eval_forgetting": 0.0},
        ]

        def best(bound, high=False):
            return min(entries, key=lambda entry: rank_key(entry, "eval_loss", high, bound))["step"]

        assert [best(bound) for bound in (None, 30, 5.1, 5.0, 4.9, 0.9, 0.5)] == [8, 8, 6, 4, 2, 2, 2]
        entries[0]["eval_forgetting"] = 50.0
        assert best(1) == 4, "of those that forget too much, the one that forgets least"
        assert best(30, high=True) == 4

    def test_the_best_model_is_chosen_among_those_that_keep_to_it(self, tmp_path, finished):
        """The same run as `finished`, whose evaluations say what must be chosen."""
        free = evaluations(finished[0])[1:]
        losses, lost = [line["eval/loss"] for line in free], [line["eval/forgetting"] for line in free]
        bound = sorted(lost)[2]  # three of six keep to it
        expected = min((line for line in free if line["eval/forgetting"] <= bound), key=lambda line: line["eval/loss"])
        settings = retaining(
            tmp_path,
            load_best_model_at_end=True,
            max_forgetting=bound,
            save_total_limit=1,
            per_device_eval_batch_size=3,
        )
        results = run(settings)
        assert min(losses) != expected["eval/loss"] or losses[-1] != expected["eval/loss"], (
            "the test wants a bound that matters"
        )
        assert results.metrics["eval_loss"] == pytest.approx(expected["eval/loss"], abs=1e-6)
        assert results.metrics["eval_forgetting"] == pytest.approx(expected["eval/forgetting"], abs=1e-4)
        total, _, count = text_nll(AutoModelForCausalLM.from_pretrained(settings.output_dir), TEXTS)
        assert total / count == pytest.approx(expected["eval/retention_loss"], abs=1e-5)
        names = [path.name for path in complete_checkpoints(settings.output_dir)]
        assert names == sorted({f"checkpoint-{expected['step']}", "checkpoint-12"}, key=lambda name: int(name[11:]))

    def test_none_keeps_to_it(self, tmp_path, finished, capsys):
        free = evaluations(finished[0])[1:]
        least = min(free, key=lambda line: line["eval/forgetting"])
        assert least["eval/forgetting"] > 0
        settings = retaining(tmp_path, load_best_model_at_end=True, max_forgetting=0.0, per_device_eval_batch_size=3)
        results = run(settings)
        assert results.metrics["eval_forgetting"] == pytest.approx(least["eval/forgetting"], abs=1e-4)
        said = " ".join(capsys.readouterr().err.split())
        assert (
            f"max_forgetting: 0% was asked for: no checkpoint is within it; the one that forgets least, of step {least['step']},"
            in said
        )

    def test_forgetting_may_itself_choose(self, tmp_path, finished):
        settings = retaining(
            tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_forgetting", per_device_eval_batch_size=3
        )
        assert run(settings).metrics["eval_forgetting"] == pytest.approx(
            min(line["eval/forgetting"] for line in evaluations(finished[0])[1:]), abs=1e-4
        )

    def test_it_stops_when_it_forgets_too_much(self, tmp_path, finished):
        lost = [line["eval/forgetting"] for line in evaluations(finished[0])[1:]]
        assert all(each > 0 for each in lost)
        settings = retaining(tmp_path, early_stopping_patience=2, max_forgetting=0.0)
        run(settings)
        assert [line["step"] for line in evaluations(settings)] == [0, 2, 4]

    def test_patience_by_hand(self):
        """A model that forgets too much is no better, however good; one that does not starts the count anew."""
        stop = BoundedEarlyStopping(2, max_forgetting=10.0)
        arguments = TrainingArguments(
            output_dir="unused", metric_for_best_model="eval_loss", greater_is_better=False, use_cpu=True
        )
        state, control = TrainerState(), TrainerControl()
        counts = []
        for loss, lost in ((5.0, 0.0), (4.0, 11.0), (3.9, 10.0), (1.0, 12.0), (0.5, 13.0)):
            stop.on_evaluate(arguments, state, control, {"eval_loss": loss, "eval_forgetting": lost})
            counts.append(stop.early_stopping_patience_counter)
            if lost <= 10 and (state.best_metric is None or loss < state.best_metric):
                state.best_metric = loss
        assert counts == [0, 1, 0, 1, 2]
        assert control.should_training_stop
        again = BoundedEarlyStopping.from_state(stop.state())
        assert (again.max_forgetting, again.early_stopping_patience_counter) == (10.0, 2)

    def test_what_patience_compares_with_keeps_to_the_bound(self):
        """The choice after each evaluation, from the log alone; the metric is kept only of a model that may be chosen."""
        arguments = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False)
        trainer = SimpleNamespace(max_forgetting=10.0, args=arguments, state=TrainerState())
        chosen = []
        evaluated = [
            (0, 0.1, 0.0),
            (2, 1.0, 30.0),
            (4, 2.0, 20.0),
            (6, 3.0, 10.0),
            (8, 0.5, 11.0),
            (10, 2.5, 9.0),
            (12, 2.5, 1.0),
        ]
        for step, loss, lost in evaluated:
            trainer.state.log_history.append({"step": step, "eval_loss": loss, "eval_forgetting": lost})
            trainer.state.global_step = step
            if step:
                new = DemonstrationTrainer._determine_best_metric(trainer, {}, None)
                chosen.append((trainer.state.best_global_step, trainer.state.best_metric, new))
        assert chosen == [
            (2, None, True),
            (4, None, True),
            (6, 3.0, True),
            (6, 3.0, False),
            (10, 2.5, True),
            (10, 2.5, False),
        ]

    def test_a_killed_run_chooses_the_same(self, tmp_path, finished):
        """What a kill right after the checkpoint that follows the best one leaves behind."""
        bound = sorted(line["eval/forgetting"] for line in evaluations(finished[0])[1:])[2]
        whole = retaining(
            tmp_path, load_best_model_at_end=True, max_forgetting=bound, early_stopping_patience=4, save_total_limit=99,
            replay_fraction=0.25, eval_fraction=0.4, eval_metrics=["chrf"], response_length=4,
        )  # fmt: skip
        results = run(whole)
        steps = [line["step"] for line in evaluations(whole)]
        out = shutil.copytree(whole.output_dir, tmp_path / "cut")
        unfinished(out)
        for folder in complete_checkpoints(out):
            if int(folder.name[11:]) > 6:
                shutil.rmtree(folder)
        cut = dataclasses.replace(whole, output_dir=str(out))
        assert dataclasses.replace(run(cut), output_dir=whole.output_dir) == results
        assert [line["step"] for line in evaluations(cut)] == steps
        assert measured(cut) == measured(whole)
        assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(cut).items())
        assert (out / "samples.jsonl").read_text() == (Path(whole.output_dir) / "samples.jsonl").read_text()


class TestReplay:
    @pytest.mark.parametrize(
        ("fraction", "rows", "count"),
        [(0.25, 4, 1), (0.25, 300, 100), (0.5, 7, 7), (0.9, 10, 90), (0.01, 3, 1), (0, 9, 0)],
    )
    def test_count(self, fraction, rows, count):
        assert replay_count(fraction, rows) == count

    def split(self, folder, **changes):
        settings = recipe(
            folder, eval_rows=HELD_OUT_ROWS, **{"retention": texts(folder), "eval_fraction": 0.4, **changes}
        )
        rows, retention = load_with_retention(settings)
        return settings, rows, retention

    def test_what_is_measured_is_never_trained(self, tmp_path):
        settings, rows, retention = self.split(tmp_path, replay_fraction=0.875)
        measured = {row.completion for row in retention.evaluation}
        assert 0 < len(measured) < len(TEXTS)
        assert measured.isdisjoint(row.completion for row in retention.replayable)
        assert measured | {row.completion for row in retention.replayable} == set(TEXTS)
        train, _ = tokenize(rows.train)
        mixed, bad = with_replay(train, retention.replayable, settings.replay_fraction, settings.seed, tokenize)
        assert not bad
        assert len(mixed) == 8 * len(train), "seven of eight rows are replayed"
        replayed = Counter(
            "".join(LETTERS[i - 3] for i in row["input_ids"][:-1])
            for row in mixed.select(range(len(train), len(mixed)))
        )
        assert set(replayed) == {row.completion for row in retention.replayable}, (
            "there are fewer than are to be replayed"
        )
        assert max(replayed.values()) - min(replayed.values()) <= 1
        for row in mixed.select(range(len(train), len(mixed))):
            assert row["labels"] == row["input_ids"], "the whole text is learnt"
        assert mixed.select(range(len(train)))["labels"] == train["labels"]

    def test_the_rows_measured_are_the_same_without_replay(self, tmp_path):
        found = [self.split(tmp_path, replay_fraction=share)[2].evaluation for share in (0.0, 0.5)]
        assert found[0] == found[1]

    def test_the_same_rows_are_drawn_again_and_others_with_another_seed(self, tmp_path):
        chosen = []
        for seed in (1, 1, 2):
            settings, rows, retention = self.split(tmp_path, seed=1, replay_fraction=0.4)
            train, _ = tokenize(rows.train)
            mixed, _ = with_replay(train, retention.replayable, settings.replay_fraction, seed, tokenize)
            chosen.append(mixed["input_ids"][len(train) :])
        assert chosen[0] == chosen[1] != chosen[2]

    def test_training_rows_that_retention_measures_are_dropped(self, tmp_path):
        """The texts are trained on too: those that are measured are taken out there."""
        source = texts(tmp_path)
        _, rows, retention = self.split(tmp_path, train_dataset=source, retention=source)
        measured = {row.completion for row in retention.evaluation}
        assert {row.completion for row in rows.train} == set(TEXTS) - measured
        assert rows.report["train_rows_dropped_as_retention"] == len(measured) > 0

    def test_held_out_rows_are_not_replayed(self, tmp_path):
        rows = [
            {"prompt": p, "completion": c}
            for p, c in [*HELD_OUT_ROWS, ("mm", "n"), ("oo", "p"), ("rr", "s"), ("tt", "u")]
        ]
        source = [DataSource(path=write_jsonl(tmp_path / "both.jsonl", rows))]
        _, _, retention = self.split(tmp_path, retention=source, replay_fraction=0.5)
        assert {row.prompt for row in retention.replayable} <= {"mm", "oo", "rr", "tt"}

    def test_a_run_replays_and_forgets_less(self, tmp_path):
        plain, replaying = (
            retaining(
                tmp_path,
                eval_fraction=0.4,
                replay_fraction=share,
                max_steps=6,
                output_dir=str(tmp_path / str(share)),
            )
            for share in (0.0, 0.5)
        )
        results = [run(settings) for settings in (plain, replaying)]
        data = read_manifest(replaying.output_dir)["data"]
        assert (data["replayed_rows"], data["train_rows"]) == (4, 8)
        assert [source["used_for"] for source in data["sources"]] == ["training", "evaluation", "retention"]
        assert results[0].metrics["eval_retention_loss_before"] == results[1].metrics["eval_retention_loss_before"]
        assert results[1].metrics["eval_forgetting"] < results[0].metrics["eval_forgetting"]
        assert evaluations(replaying)[-1]["step"] == 6


def test_two_ranks_measure_what_one_measures(tmp_path):
    """ZeRO 3, tasks, retention, replay and responses."""
    alone = retaining(
        tmp_path, max_steps=4, eval_steps=2, eval_fraction=0.4, replay_fraction=0.5, eval_metrics=["chrf", "exact_match"],
        response_length=5, per_device_eval_batch_size=2, per_device_train_batch_size=2, adam_epsilon=1e-3,
        load_best_model_at_end=True, max_forgetting=1e-3,
        retention=[*texts(tmp_path, TEXTS[:7], "a.jsonl"), *texts(tmp_path, TEXTS[7:], "b.jsonl")],
    )  # fmt: skip
    run(alone)
    shared = dataclasses.replace(
        alone, output_dir=str(tmp_path / "shared"), deepspeed=deepspeed_file(tmp_path / "ds.json", 3)
    )
    done = run_stage("sft", save_recipe(shared, tmp_path / "sft.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = evaluations(alone), evaluations(shared)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"time", "train/epoch", "eval/epoch", "memory/training", "memory/evaluation"}:
            assert other[name] == pytest.approx(mine[name], rel=1e-4, abs=2e-5), name
    samples = [(Path(each.output_dir) / "samples.jsonl").read_text() for each in (alone, shared)]
    assert samples[0] == samples[1]


def test_course_of_a_long_run_is_shortened():
    history = [{"step": step, "eval_loss": 1.0} for step in range(1000)]
    lines = history_section(history).splitlines()
    assert lines[3:5] == ["| step | held-out loss |", "| --- | --- |"] or "| step | held-out loss |" in lines
    rows = [line for line in lines if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == 20
    assert rows[0].startswith("| 0 |")
    assert rows[-1].startswith("| 999 |")
    assert history_section(history[:2]) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("replay_fraction: 0.2", "replay_fraction: refers to the rows of `retention`"),
        ("replay_fraction: 1\nretention: t.jsonl", "replay_fraction: expected a number from 0 to below 1"),
        ("max_forgetting: 5", "max_forgetting: refers to the rows of `retention`"),
        ("max_forgetting: 5\nretention: t.jsonl", "max_forgetting: has no effect without load_best_model_at_end"),
        ("max_forgetting: -1\nretention: t.jsonl", "max_forgetting: expected a number at least 0"),
        ("metric_for_best_model: eval_retention_loss", "metric_for_best_model: eval_retention_loss is measured on `retention`"),
        ("metric_for_best_model: forgetting", "is measured on `retention`"),
        ("retention: t.jsonl\neval_fraction: 0", "retention: is measured at each evaluation, and there is none"),
        ("eval_metrics: [rouge]\neval_fraction: 0", "eval_metrics: is measured at each evaluation"),
        ("eval_metrics: [rouge, rouge]", "eval_metrics: expected different metrics"),
        ("eval_metrics: [rouge]\nmethod: prompt", "eval_metrics: responses with method: prompt"),
        ("retention: t.jsonl\nreplay_fraction: 0.1\neval_fraction: 0\neval_dataset: e.jsonl", "eval_fraction: expected a share above 0 of `retention`"),
        ("retention: [{path: t.jsonl, columns: {txt: a}}]", r"retention\[0\].columns"),
        ("max_eval_generations: 0", "max_eval_generations: expected a number at least 1"),
    ],
)  # fmt: skip
def test_refused(tmp_path, changes, words):
    (tmp_path / "sft.yaml").write_text(f"output_dir: o\nmodel_name_or_path: m\ntrain_dataset: d.jsonl\n{changes}\n")
    with pytest.raises(UserError, match=words):
        load_recipe("sft", str(tmp_path / "sft.yaml"))


def test_a_model_from_scratch_has_nothing_to_forget(tmp_path):
    (tmp_path / "sft.yaml").write_text(
        "output_dir: o\nmodel_config: {model_type: llama}\ntrain_dataset: d\nretention: t.jsonl\n"
    )
    with pytest.raises(UserError, match="retention: a model from scratch"):
        load_recipe("sft", str(tmp_path / "sft.yaml"))


def test_too_few_rows_for_the_share_that_is_measured(tmp_path):
    """The message names the key that the user wrote, and what would help there."""
    settings = retaining(tmp_path, TEXTS[:3], eval_fraction=1e-6)
    with pytest.raises(UserError) as error:
        load_with_retention(settings)
    assert str(error.value) == (
        "retention: `eval_fraction` (1e-06) of its prompts are measured, and that came to none; name more rows or raise "
        "eval_fraction, or measure all of them: `eval_fraction: 0` beside an `eval_dataset`."
    )
    with pytest.raises(UserError, match=r"name more rows or raise eval_fraction\.$"):
        load_with_retention(dataclasses.replace(settings, replay_fraction=0.5))


def test_a_picture_by_hand():
    """Two curves over steps 0 to 10: highest at the top line, lowest at the bottom one, NaN left out."""
    nan = float("nan")
    root = ElementTree.fromstring(draw([0, 5, 10], {"a<b": [4.0, 2.0, 0.0], "c": [0.0, nan, 4.0]}, "nats"))
    ours = "{http://www.w3.org/2000/svg}"
    points = [line.attrib["points"] for line in root.findall(f"{ours}polyline")]
    assert points == ["56.0,70.0 340.0,204.0 624.0,338.0", "56.0,338.0 624.0,70.0"]
    words = [text.text for text in root.findall(f"{ours}text")]
    assert words == ["nats", "0", "1", "2", "3", "4", "0", "2", "4", "6", "8", "10", "step", "a<b: 4 to 0", "c: 0 to 4"]
    draw([0], {"one": [nan]}, "nothing to draw")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.514, 4.51, [1, 2, 3, 4]),
        (1.3, 2.94, [1.5, 2, 2.5]),
        (0.1, 0.3, [0.1, 0.2, 0.3]),
        (-3, 1, [-3, -2, -1, 0, 1]),
        (0, 1530, [0, 500, 1000, 1500]),
        (2.0001, 2.0002, [2.0001, 2.00012, 2.00014, 2.00016, 2.00018, 2.0002]),
    ],
)
def test_axes_have_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, abs=1e-12)


def test_steps_are_whole():
    assert ticks(0, 1, whole=True) == [0, 1]
    assert ticks(0, 2, whole=True) == [0, 1, 2]
    assert ticks(0, 153, whole=True) == [0, 50, 100, 150]


def test_a_chart_in_wandb_has_the_losses_beside_each_other(tmp_path, monkeypatch):
    tracker, logged = Tracker(recipe(tmp_path), "sft", 4), []
    tracker.chart(4, "losses", [0, 4], {"eval/loss": [3.0, 1.0]})  # nothing without W&B
    run = SimpleNamespace(
        log=lambda values, **_: logged.append(values), finish=lambda **_: None, offline=False, url=None
    )
    monkeypatch.setattr(wandb_run, "_start", lambda *_: (run, 0))
    tracker._wandb = WandbRun(tracker.recipe, "sft", tmp_path, print)
    tracker.chart(4, "losses", [0, 4], {"eval/loss": [3.0, 1.0], "eval/retention_loss": [1.0, 2.0]})
    tracker._wandb.finish(0)  # calls are made in a thread
    (values,) = logged
    assert values["step"] == 4
    table = values["losses (chart)"].table
    assert sorted(zip(table.get_column("lineKey"), table.get_column("step"), table.get_column("lineVal"), strict=True)) == [
        ("eval/loss", 0, 3.0), ("eval/loss", 4, 1.0), ("eval/retention_loss", 0, 1.0), ("eval/retention_loss", 4, 2.0),
    ]  # fmt: skip


def test_check_shows_retention(tmp_path, capsys):
    settings = retaining(tmp_path, replay_fraction=0.5, eval_fraction=0.4, eval_metrics=["rouge"], num_train_epochs=1)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings)))
    assert check.run(str(tmp_path / "sft.yaml")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path}/texts.jsonl (23 rows); 23 of `text`" in said
    assert "retention: 8 of 23 rows measured; 4 of 8 training rows (50.0%) replayed from 15" in said
    assert "4 to train on, 4 to evaluate on" in said
    assert "steps: up to 2 optimizer steps of 8 examples" in said
    assert "eval_metrics: rouge" in said
