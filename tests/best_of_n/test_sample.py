"""`align bon` on languages whose best-of-n law is known, alone and on two ranks, whole and killed; what stages make of its files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from scipy import stats
from transformers import LlamaForSequenceClassification

from align.best_of_n import sample as stage
from align.best_of_n.datasets import count_left_out, data_sets
from align.best_of_n.frontier import frontier
from align.best_of_n.progress import Sample, SampleFile
from align.best_of_n.results import ESTIMATES
from align.best_of_n.sample import run
from align.cli.check import check
from align.cli.run import already_done
from align.cli.steps import read_steps
from align.cli.verify_languages import LARGE, REWARDS, SMALL
from align.config.data_source import DataSource
from align.config.load import load_recipe
from align.data.load import DataSettings, load_rows
from align.data.rows import Demonstration, Preference, Prompt
from align.data.tokenize import tokenize_demonstrations, tokenize_preferences
from align.errors import OtherRun, UserError
from align.maths.best_of_n import exact_kl, exact_law
from tests.ranks import run_stage

SETS = ("best.jsonl", "random.jsonl", "pairs.jsonl", "responses.jsonl")
GENERATIONS = {SMALL.name: 4, LARGE.name: 12}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the models of two languages, their rewards, and a recipe for each that has been run."""
    folder = tmp_path_factory.mktemp("bon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        for language, count in ((SMALL, 300), (LARGE, 4)):
            name = language.name
            judged = {"judge_reward_model_path": str(folder / "judge"), "missing_eos_penalty": 1.0}
            if language is SMALL:
                judged = {"judge_reward_funcs": ["bon_rewards:length"]}
            language.reference().save_pretrained(folder / name)
            language.tokenizer().save_pretrained(folder / name)
            rows = [{"prompt": prompt, "topic": "t"} for prompt in language.prompts] * count
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            keys = {
                "stage": "bon",
                "output_dir": str(folder / f"out-{name}"),
                "model_name_or_path": str(folder / name),
                "reward_funcs": [f"bon_rewards:{language.reward}"],
                **judged,
                "train_dataset": str(folder / f"{name}.jsonl"),
                "num_generations": GENERATIONS[name],
                "response_length": language.length,
                "per_device_eval_batch_size": 512 if language is SMALL else 36,
                "bootstrap_iters": 20,
            }
            (folder / f"1_{name}.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
        judge_model(folder / "judge")
        judge = "\n\ndef length(prompts, completion_ids, **columns):\n    return [float(len(ids)) for ids in completion_ids]\n"
        (folder / "bon_rewards.py").write_text(REWARDS + judge, encoding="utf-8")
        for language in (SMALL, LARGE):
            run(recipe_of(folder, language))
        yield folder


def judge_model(folder: Path, seed: int = 1) -> None:
    """A reward model with random weights for the large language."""
    config = LARGE.reference().config
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    LARGE.tokenizer().save_pretrained(folder)


def recipe_of(folder: Path, language=LARGE, **changes):
    recipe = load_recipe("bon", str(folder / f"1_{language.name}.yaml"))
    return dataclasses.replace(recipe, **changes)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*SETS, "frontier.svg", "results.md")}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_sampled_best_of_n_follows_the_exact_law(world):
    """Of 300 times four samples, what is chosen is distributed as F^4 - F(-)^4, and a random one as the model."""
    scores = SMALL.scores(_function(world, SMALL.reward))[0]
    p = SMALL.logprobs(SMALL.reference())[0].exp()
    groups: dict[int, list[dict]] = {}
    for number, row in enumerate(lines(world / "out-small" / "responses.jsonl")):
        groups.setdefault(number // 4, []).append(row)
    assert len(groups) == 300
    chosen = [max(group, key=lambda row: row["score"])["score"] for group in groups.values()]
    values = sorted(set(scores.float().tolist()))
    for drawn, law in ((chosen, exact_law(p, scores, 4)), ([group[0]["score"] for group in groups.values()], p)):
        expected = [300 * float(law[scores.float() == value].sum()) for value in values]
        seen = [sum(each == pytest.approx(value) for each in drawn) for value in values]
        assert sum(seen) == 300
        assert chi_square(seen, expected) > 0.01
    wrong = [300 * float(exact_law(p, scores, 3)[scores.float() == value].sum()) for value in values]
    assert chi_square([sum(c == pytest.approx(v) for c in chosen) for v in values], wrong) < 0.01, (
        "a test without power"
    )
    frontier = results(world / "out-small")["frontier"]
    for entry in frontier:
        law = exact_law(p, scores, entry["n"])
        assert entry["proxy"] == pytest.approx(float(law @ scores), abs=0.12)
        assert entry["proxy_low"] <= entry["proxy"] <= entry["proxy_high"]
        assert exact_kl(law, p) <= entry["kl"] + 1e-12


def chi_square(seen: list[int], expected: list[float]) -> float:
    """The p-value, with outcomes of fewer than five expected in one class."""
    many = [each >= 5 for each in expected]
    rest = [sum(v for v, m in zip(values, many, strict=True) if not m) for values in (seen, expected)]
    pairs = [(s, e) for s, e, m in zip(seen, expected, many, strict=True) if m] + ([tuple(rest)] if rest[1] else [])
    counts, law = zip(*pairs, strict=True)
    return float(stats.chisquare(counts, [each * sum(counts) / sum(law) for each in law]).pvalue)


def _function(folder: Path, name: str):
    space: dict = {}
    exec((folder / "bon_rewards.py").read_text(encoding="utf-8"), space)
    return space[name]


def test_the_files_hold_what_they_say(world):
    out = world / "out-large"
    answers, best, control, pairs = (lines(out / name) for name in ("responses.jsonl", *SETS[:3]))
    record = results(out)
    assert record["stage"] == "bon"
    assert record["datasets"] == {name: len(lines(out / name)) for name in SETS}
    assert len(answers) == 12 * 12
    for number, prompt in enumerate(LARGE.prompts * 4):
        group = answers[12 * number : 12 * number + 12]
        assert {row["prompt"] for row in group} == {prompt}
        assert [row["score"] for row in group] == [row["source_scores"][0] - (not row["ended"]) for row in group]
        assert all(row["usable"] == (row["ended"] and bool(row["completion"])) for row in group)
    judge, end = LlamaForSequenceClassification.from_pretrained(world / "judge").eval(), 10
    for row in answers[:20]:
        ids = [
            end,
            *("abcdefghij".index(letter) for letter in row["prompt"] + row["completion"]),
            *[end] * row["ended"],
        ]
        assert row["length"] == len(ids) - 1 - len(row["prompt"])
        with torch.no_grad():  # without padding, the last token's score
            wanted = judge.score(judge.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
        assert row["judge"] == pytest.approx(wanted, abs=1e-5)
    groups = [answers[start : start + 12] for start in range(0, len(answers), 12)]
    usable = [group for group in ([row for row in group if row["usable"]] for group in groups) if group]
    assert [row["completion"] for row in best] == [max(g, key=lambda row: row["score"])["completion"] for g in usable]
    assert all(row["completion"] in [each["completion"] for each in g] for row, g in zip(control, usable, strict=True))
    assert [row["completion"] for row in control] != [row["completion"] for row in best]
    assert all(row["topic"] == "t" for row in (*best, *pairs)), "other columns are kept"
    assert all(row["score_chosen"] > row["score_rejected"] for row in pairs)
    lowest = [min(g, key=lambda row: row["score"])["completion"] for g in usable if len({r["score"] for r in g}) > 1]
    assert [row["rejected"] for row in pairs] == lowest
    scores = torch.tensor([[row["score"] for row in group] for group in groups])
    assert record["frontier"][11]["proxy"] == pytest.approx(scores.amax(dim=1).mean().item())
    assert record["frontier"][0]["judge"] == pytest.approx(sum(row["judge"] for row in answers) / len(answers))
    assert record["frontier"][11]["win_rate"] is None


def test_sft_and_reward_read_the_data_sets(world):
    tokenizer = LARGE.tokenizer()
    for name, row_type in (("best.jsonl", Demonstration), ("random.jsonl", Demonstration), ("pairs.jsonl", Preference)):
        path = world / "out-large" / name
        rows = load_rows(DataSettings(train_dataset=[DataSource(path=str(path))], seed=0), row_type).train
        assert len(rows) == len(lines(path)) > 0
        tokenize = tokenize_demonstrations if row_type is Demonstration else tokenize_preferences
        data, _ = tokenize(rows, tokenizer, max_length=32)
        assert len(data) == len(rows)


def test_an_ensemble_counts_as_one_reward(world, tmp_path):
    judge_model(tmp_path / "other", seed=2)
    models = [str(world / "judge"), str(tmp_path / "other")]
    scored = {}
    for name, paths in {"first": models[:1], "second": models[1:], "mean": models, "wco": models}.items():
        method = {"reward_ensemble": "wco"} if name == "wco" else {}
        sources = {"reward_model_path": paths, "reward_funcs": [], "judge_reward_model_path": None}
        run(
            recipe_of(
                world, output_dir=str(tmp_path / name), num_generations=2, missing_eos_penalty=None, **sources, **method
            )
        )
        scored[name] = lines(tmp_path / name / "responses.jsonl")
    for first, second, mean, worst in zip(*scored.values(), strict=True):
        pair = [first["score"], second["score"]]
        assert mean["score"] == pytest.approx(sum(pair) / 2, abs=1e-6)
        assert worst["score"] == pytest.approx(min(pair), abs=1e-6)
        assert mean["source_scores"] == pytest.approx([mean["score"], *pair], abs=1e-6)


def test_two_ranks_give_the_same_bytes_and_other_batches_the_same_responses(world):
    run_stage("bon", world / "1_large.yaml", "--output_dir", str(world / "out-two"), log=world / "two")
    assert contents(world / "out-two") == contents(world / "out-large")
    assert results(world / "out-two")["frontier"] == results(world / "out-large")["frontier"]
    run(recipe_of(world, output_dir=str(world / "out-batches"), per_device_eval_batch_size=5))
    mine, other = (lines(world / out / "responses.jsonl") for out in ("out-large", "out-batches"))
    assert [(row["completion"], row["score"]) for row in mine] == [(row["completion"], row["score"]) for row in other]
    assert [row["judge"] for row in mine] == pytest.approx([row["judge"] for row in other], abs=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "harm", [b"", b'{"start": 72, "rows', None], ids=["at a batch", "in a line", "a number changed"]
)
def test_a_run_that_was_killed_goes_on_to_the_same_files(world, monkeypatch, harm):
    out = world / f"out-killed-{len(harm) if harm is not None else 'x'}"
    recipe = recipe_of(world, output_dir=str(out))
    done = []
    append, batch = SampleFile.append, stage.BestOfN._batch

    def dies(self, start, batches):
        append(self, start, batches)
        if start >= 36:
            raise Killed

    monkeypatch.setattr(SampleFile, "append", dies)
    with pytest.raises(Killed):
        run(recipe)
    monkeypatch.setattr(SampleFile, "append", append)
    monkeypatch.setattr(
        stage.BestOfN, "_batch", lambda self, numbers: done.append(list(numbers)) or batch(self, numbers)
    )
    file = out / "parts" / "samples.jsonl"
    written = file.read_bytes()
    if harm is None:
        first, second = written.splitlines(keepends=True)
        assert b'"ended": false' in second
        file.write_bytes(first + second.replace(b'"ended": false', b'"ended": true', 1))
    else:
        file.write_bytes(written + harm)
    run(recipe)
    assert done[0][0] == (36 if harm is None else 72), "goes on after the last whole batch"
    assert contents(out) == contents(world / "out-large")
    assert not (out / "parts").exists()
    assert not (out / "kept-parts").exists()


def test_what_changed_since_it_was_killed_is_named_and_refused(world, monkeypatch, tmp_path, capsys):
    out, data, rules = tmp_path / "out", tmp_path / "prompts.jsonl", world / "bon_rewards.py"
    rows, code = (world / f"{LARGE.name}.jsonl").read_text(), rules.read_text()
    data.write_text(rows)
    source = [DataSource(path=str(data))]
    recipe = recipe_of(
        world, output_dir=str(out), train_dataset=source, num_generations=6, judge_reward_model_path=None
    )
    append = SampleFile.append

    def dies(*given):
        append(*given)
        raise Killed

    monkeypatch.setattr(SampleFile, "append", dies)
    with pytest.raises(Killed):
        run(recipe)
    monkeypatch.setattr(SampleFile, "append", append)
    samples = (out / "parts" / "samples.jsonl").read_bytes()
    for file, text, changes, said in (
        (
            data,
            rows,
            {"rejected": "random"},
            r"rejected; delete the folder to sample again, or .* output_dir.$",
        ),
        (
            data,
            rows + '{"prompt": "ab"}\n',
            {"accept_changes": ["train_dataset"]},
            r"prompts.jsonl has other rows.*output_dir.$",
        ),
        (
            rules,
            code + "# x\n",
            {},
            r"bon_rewards.py has other content.*meant, add `accept_changes: \[reward_funcs\]`.$",
        ),
    ):
        file.write_text(text)
        with pytest.raises(OtherRun, match=f"holds an unfinished run that differs in .*{said}"):
            run(dataclasses.replace(recipe, **changes))
        words = ["--output_dir", str(out), "--train_dataset", str(data), "--num_generations", "6"]
        words += [
            word
            for name, value in changes.items()
            for word in (f"--{name}", value if isinstance(value, str) else value[0])
        ]
        assert check.run(str(world / "1_large.yaml"), None, [*words, "--judge_reward_model_path", "null"]) == 2
        assert "holds an unfinished run that differs in" in capsys.readouterr().out
        data.write_text(rows)
    assert (out / "parts" / "samples.jsonl").read_bytes() == samples
    done, batch = [], stage.BestOfN._batch
    monkeypatch.setattr(
        stage.BestOfN, "_batch", lambda self, numbers: done.append(list(numbers)) or batch(self, numbers)
    )
    run(dataclasses.replace(recipe, accept_changes=["reward_funcs"]))
    rules.write_text(code)
    assert done[0][0] == 36, "its samples are kept"
    assert "bon_rewards.py has other content" in results(out)["accepted"][0]["changes"][0]


def test_samples_of_another_run_are_not_taken(tmp_path):
    sample = Sample([1, 2], True, 0.5, [0.5, None], None)
    file = SampleFile(tmp_path / "parts" / "samples.jsonl", "a")
    file.path.parent.mkdir()
    file.append(0, [[sample], [sample]])
    assert SampleFile(file.path, "a").read() == [sample, sample]
    assert SampleFile(file.path, "b").read() == []
    assert SampleFile(file.path, "a").read() == [], "they were dropped"


def test_the_same_response_is_a_tie_however_it_was_rounded():
    """Four times the same one: the best of any number of them wins half."""
    group = [Sample([1, 2], True, 0.5 + n * 1e-7, [0.5], 0.5 - n * 1e-7) for n in range(4)]
    rows = frontier([group, group], ["a", "b"], 50, 0)
    assert [(row["win_rate"], row["judge_win_rate"]) for row in rows[:3]] == [(0.5, 0.5)] * 3


def test_prompts_that_repeat_are_resampled_together():
    """Every prompt twice is no more evidence: the same intervals."""
    torch.manual_seed(0)
    groups = [
        [Sample([0] * n, True, score, [score], score) for n, score in enumerate(torch.rand(4).tolist(), 1)]
        for _ in range(9)
    ]
    names = [str(number) for number in range(9)]
    once, twice = frontier(groups, names, 50, 0), frontier(groups * 2, names * 2, 50, 0)
    assert [entry["prompts"] for entry in twice] == [18] * 4
    for mine, other in zip(once, twice, strict=True):
        for name in (f"{each}{end}" for each in ESTIMATES for end in ("", "_low", "_high")):
            assert other[name] == (None if mine[name] is None else pytest.approx(mine[name])), name
    assert once[1]["judge"] == once[1]["proxy"]
    assert once[1]["proxy_low"] < once[1]["proxy"] < once[1]["proxy_high"]


def test_which_responses_are_chosen():
    """Of responses that end and say something: the first of the best, and the worst or any that is worse."""
    end = 3  # the token after "abc"
    group = [
        Sample([*ids, end][: 3 if ended else -1], ended, score, [score], None)
        for ids, ended, score in (
            ([0, 1], False, 9.0),  # does not end
            ([], True, 8.0),  # says nothing
            ([1], True, 2.0),
            ([2], True, 2.0),
            ([0], True, -1.0),
            ([1, 1], True, 0.5),
            ([1, 0], True, 0.0),
        )
    ]
    prompts = [(Prompt("a", "here", {"completion": "of the data", "topic": "t"}), [end, 0])] * 30
    made = {
        rejected: data_sets(SMALL.tokenizer(), prompts, [group] * 30, rejected, 0) for rejected in ("worst", "random")
    }
    for lines_of in made.values():
        assert [json.loads(line)["completion"] for line in lines_of["best.jsonl"]] == ["b"] * 30
        assert {json.loads(line)["chosen"] for line in lines_of["pairs.jsonl"]} == {"b"}
        drawn = {json.loads(line)["completion"] for line in lines_of["random.jsonl"]}
        assert drawn == {"b", "c", "a", "bb", "ba"}
        assert len(lines_of["responses.jsonl"]) == 30 * 7
    assert {json.loads(line)["rejected"] for line in made["worst"]["pairs.jsonl"]} == {"a"}
    assert {json.loads(line)["rejected"] for line in made["random"]["pairs.jsonl"]} == {"a", "bb", "ba"}
    assert count_left_out(made["worst"], 7) == {}
    endless = data_sets(SMALL.tokenizer(), prompts[:3], [group[:1], group[1:2], group[2:3]], "worst", 0)
    assert list(count_left_out(endless, 1).values()) == [1, 1, 1]  # none ends, says nothing, nothing to compare with
    row = json.loads(made["worst"]["best.jsonl"][0])
    assert row == {"topic": "t", "prompt": "a", "completion": "b", "score": 2.0}


def test_it_is_a_step_of_a_folder(world, tmp_path, capsys, monkeypatch):
    """`align check` says that it would run, and `align run` knows that it is finished, or that its recipe is another."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "r"
    folder.mkdir()
    shutil.copy(world / "1_large.yaml", folder)
    shutil.copy(world / "bon_rewards.py", folder)
    assert check.run(str(folder), None, ["--output_dir", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "12 prompts, 144 responses" in said
    (step,) = read_steps(str(folder), None, [])
    found = already_done(step)
    assert found is not None
    assert found[0].columns[0].header == "n"
    best = world / "out-large" / "best.jsonl"
    best.rename(tmp_path / "best.jsonl")
    with pytest.raises(OtherRun, match=r"out-large is finished, but .*best\.jsonl is missing"):
        already_done(step)
    (tmp_path / "best.jsonl").rename(best)
    (step,) = read_steps(str(folder), None, ["--num_generations", "5"])
    with pytest.raises(UserError, match="results that differ in num_generations"):
        already_done(step)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_funcs": []}, "reward_model_path: expected a reward model, or `reward_funcs`, got neither"),
        (
            {"judge_reward_funcs": ["bon_rewards:echo"], "judge_reward_model_path": None},
            "judge_reward_funcs: bon_rewards:echo is also in reward_funcs",
        ),
        ({"reward_weights": [1, 2]}, "reward_weights: expected 1 weights"),
        (
            {"reward_model_path": "judge", "reward_ensemble": "uwo"},
            "reward_variance_coef: expected a number with reward_ensemble",
        ),
        ({"num_generations": 1}, "num_generations: expected a number at least 2, got 1"),
        ({"num_generations": 2000}, "num_generations: expected a number of at most 1,024"),
        ({"train_dataset": []}, "train_dataset: expected prompts, got nothing"),
        ({"missing_eos_penalty": 1, "missing_eos_score": 1}, "missing_eos_score: expected only one"),
        ({"sft_model_path": "x"}, "sft_model_path: unknown key; called model_name_or_path here"),
        ({"deepspeed": "x"}, "deepspeed: unknown key; not supported"),
    ],
)
def test_what_is_refused(world, tmp_path, changes, said):
    keys = yaml.safe_load((world / "1_large.yaml").read_text())
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**keys, **changes}))
    with pytest.raises(UserError) as error:
        load_recipe("bon", str(path))
    assert said in str(error.value)


def test_a_judge_that_fails_is_named(world, tmp_path):
    (world / "bon_none.py").write_text("def none(completions, **columns):\n    return [None] * len(completions)\n")
    recipe = recipe_of(
        world, output_dir=str(tmp_path / "out"), judge_reward_model_path=None, judge_reward_funcs=["bon_none:none"]
    )
    with pytest.raises(UserError, match=r"the judge: .*returned None"):
        run(recipe)
    assert not (tmp_path / "out").exists()
