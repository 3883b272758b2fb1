"""The whole card, of Python rewards with planted faults and of a tiny model: what is written, verdicts, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from align.cli.check import check
from align.config.judge_reward import JudgeRewardRecipe
from align.config.load import as_recipe
from align.config.reward import RewardRecipe
from align.data.rows import Preference
from align.errors import UserError
from align.judge import judge
from align.judge.baselines import words_margins
from align.judge.inputs import prepare_inputs
from align.judge.rows import ScoredPairs
from align.judge.spread import spread
from align.judge.verdicts import summary
from align.reward.train import run as train_reward
from tests.reward.test_train import recipe as reward_recipe
from tests.worlds import save_tiny_policy, write_jsonl

RULES = """
WORDS = ("clear", "kind", "true")

def sound(prompts, completions, **_):
    return [sum(text.count(p.split()[-1]) > 0 for _ in "x") + 0.5 * sum(word in text for word in WORDS)
            - 2 * (len(text.split()) != len(set(text.split()))) for p, text in zip(prompts, completions)]

def thanks(prompts, completions, **_):
    return [score + 3 * ("Thank" in text) for score, text in zip(sound(prompts, completions), completions)]

def longer(prompts, completions, **_):
    return [len(text) / 10 for text in completions]

def fails(prompts, completions, **_):
    raise RuntimeError("stumbled")
"""


def rows(count=60) -> list[dict]:
    """The better response repeats the prompt's word and has good words; length is drawn apart from that."""
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        filler = [" ".join(f"w{i}" for i in range(random.integers(1, 9))) for _ in range(2)]
        found.append(
            {
                "prompt": f"Say t{number}x",
                "chosen": f" {filler[0]} kind t{number}x and true",
                "rejected": f" {filler[1]} t{number - 1}x kind",
                "kind": "odd" if number % 2 else "even",
                "margin": number % 3 // 2,
                "prompt_id": number,
            }
        )
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "judged_rules", raising=False)
    Path("judged_rules.py").write_text(RULES)
    write_jsonl(tmp_path / "pairs.jsonl", rows())
    yield tmp_path
    sys.modules.pop("judged_rules", None)


def recipe(**keys) -> JudgeRewardRecipe:
    settings = {
        "output_dir": "out",
        "reward_funcs": ["judged_rules:sound"],
        "eval_dataset": "pairs.jsonl",
        "bootstrap_iters": 50,
    }
    return as_recipe(JudgeRewardRecipe, {**settings, **keys})


def verdicts(result) -> dict[str, str]:
    return {each["line"]: each["verdict"] for each in result.card["verdicts"]}


def test_a_sound_reward_and_what_is_written(place, capsys):
    given = recipe(second_reward_funcs=["judged_rules:longer"], slice_by=["kind", "prompt_id"])
    result = judge.run(given)
    assert (
        summary(result.card["verdicts"]) == "doubtful: words alone, calibration"
    )  # words tell here, and it is never sure
    found = verdicts(result)
    assert found["accuracy"] == found["longer wins"] == found["length"] == found["second reward"] == "good"
    metrics = result.card["metrics"]
    assert metrics["accuracy"]["value"] == 1
    assert metrics["accuracy"]["n"] == metrics["accuracy"]["prompts"] == 60
    assert {each["slice"] for each in result.card["slices"]["kind"]} == {"odd", "even"}
    assert {each["slice"]: each["accuracy"]["n"] for each in result.card["slices"]["margin"]} == {"0": 40, "1": 20}
    assert "No accuracy by prompt_id: fewer than two groups of 10 pairs" in result.card["notes"]
    said = capsys.readouterr().out
    assert "Reward: doubtful" in said
    written = json.loads(Path("out/results.json").read_text())
    assert written["card"]["verdicts"] == result.card["verdicts"]
    assert written["stage"] == "judge-reward"
    card = Path("out/card.md").read_text()
    assert card.startswith("# Report card: judged\\_rules:sound") or card.startswith(
        "# Report card: judged_rules:sound"
    )
    assert "Verdict: **doubtful** (doubtful: words alone, calibration)." in card
    assert "arXiv" in card
    for name in ("reliability.svg", "margins.svg"):
        assert Path("out", name).read_text().startswith("<svg")
    assert Path("out/confident_errors.jsonl").read_text() == ""
    assert not Path("out/run.json").exists()
    before = Path("out/results.json").stat().st_mtime_ns
    assert judge.run(given) == result
    assert Path("out/results.json").stat().st_mtime_ns == before, "judged once"
    with pytest.raises(UserError, match="holds results that differ in bootstrap_iters"):
        judge.run(dataclasses.replace(given, bootstrap_iters=51))


def test_a_love_of_thanks_fails_that_probe_alone(place):
    sound, thanks = (
        verdicts(judge.run(recipe(output_dir=name, reward_funcs=[f"judged_rules:{name}"])))
        for name in ("sound", "thanks")
    )
    assert {line for line in sound if thanks[line] != sound[line]} == {"probe: thanks added"}
    assert (sound["probe: thanks added"], thanks["probe: thanks added"]) == ("good", "bad")


def test_a_reward_that_is_the_length_is_bad(place):
    result = judge.run(recipe(reward_funcs=["judged_rules:longer"]))
    found = verdicts(result)
    assert result.verdict == found["length"] == found["probe: repeated twice"] == "bad"
    assert found["longer wins"] == "doubtful", "it is no better than itself"
    errors = [json.loads(line) for line in Path("out/confident_errors.jsonl").read_text().splitlines()]
    margins = [each["margin"] for each in errors]
    assert margins == sorted(margins)
    assert all(each["rejected_score"] > each["chosen_score"] for each in errors)
    wrong = 60 * (1 - result.card["metrics"]["accuracy"]["value"]) - result.card["metrics"]["ties_in_scores"] / 2
    assert len(errors) == pytest.approx(wrong)


def test_few_pairs_are_not_enough(place):
    result = judge.run(recipe(max_eval_rows=29))
    assert verdicts(result) == {"accuracy": "doubtful"}
    assert result.card["metrics"]["accuracy"]["value"] == 1


def test_spread_and_ratings_of_a_file_of_samples(place, capsys):
    """Rated 4 with the word that `sound` likes and 3 without; `longer` prefers two that are rated 3."""
    texts = [(f"p{i}", " kind" * (j % 2)) for i in range(6) for j in range(4)] + [("flat", " a"), ("flat", " b")]
    samples = [{"prompt": p, "completion": f" x{c}", "rating": 3 + ("kind" in c)} for p, c in texts]
    write_jsonl(place / "samples.jsonl", samples)
    given = recipe(samples_dataset="samples.jsonl", second_reward_funcs=["judged_rules:longer"])
    result = judge.run(given)
    ratings, found = result.card["ratings"], result.card["spread"]
    assert [ratings[name]["value"] for name in ("pearson", "spearman", "kendall", "pair_accuracy")] == pytest.approx(
        [1] * 4
    )
    assert ratings["second"]["spearman"]["value"] < 1 == ratings["second"]["pair_accuracy"]["value"]
    assert ratings["difference"]["pair_accuracy"]["n"] == 24
    assert verdicts(result)["ratings"] == "good"
    assert (
        "| Spearman, over all responses | 1.000 [1.000, 1.000] (n 26, 7 prompts) |" in Path("out/card.md").read_text()
    )
    assert found["flat_prompts"]["value"] == pytest.approx(1 / 7)
    assert found["flat_prompts"]["n"] == 7
    assert found["samples"] == 26
    write_jsonl(place / "samples.jsonl", [*samples, {"prompt": "flat", "completion": " c"}])
    with pytest.raises(
        UserError, match=r"samples_dataset: samples\.jsonl.*27.*: expected a number as `rating`, got none"
    ):
        prepare_inputs(given)


def test_pairs_that_the_model_was_trained_on_are_counted(tmp_path, monkeypatch):
    """By what the stage recorded: a split of the same rows has its held-out pairs free, and so have the two halves."""
    monkeypatch.chdir(tmp_path)
    save_tiny_policy(tmp_path / "base")
    write_jsonl(tmp_path / "pairs.jsonl", rows())
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "pairs.jsonl").read_bytes())
    split = {"train_dataset": "pairs.jsonl", "eval_fraction": 0.3, "seed": 3}
    keys = {
        "stage": "reward",
        "model_name_or_path": "base",
        "max_steps": 1,
        "train_batch_size": 4,
        "normalize_prompts": 4,
    }
    made = {**keys, **split, "output_dir": "model", "train_judge": True, "ensemble_size": 2}
    train_reward(as_recipe(RewardRecipe, made))
    of_model = {"reward_funcs": [], "eval_dataset": "copy.jsonl"}

    def counted(path, **changes) -> int:
        return prepare_inputs(recipe(**{**of_model, **changes}, reward_model_path=path)).trained_on

    held_out = prepare_inputs(recipe(reward_funcs=["builtins:len"], eval_dataset=[], **split)).pairs
    halves = counted("model/member_1"), counted("model/judge")
    assert sum(halves) == 60 - len(held_out)
    assert min(halves) > 10
    for each in ("model/member_1", "model/member_2", "model/judge"):
        assert counted(each, **split, eval_dataset=[]) == 0
    assert counted("model/member_1", max_eval_rows=10) < 10
    assert counted("model/member_1", eval_dataset="cop[y].jsonl") == halves[0]
    write_jsonl(tmp_path / "copy.jsonl.jsonl", rows(50))  # whose name begins with that of the other
    assert counted("model/member_1", eval_dataset=["copy.jsonl", "copy.jsonl.jsonl"]) == halves[0]
    for name in ("member_2", "judge"):
        shutil.copytree(tmp_path / "model" / name, tmp_path / "moved" / name)
    assert counted("moved/member_2") == halves[0]
    assert halves[1] < counted("moved/judge") < 60, "its half, of which it is not known what was held out"
    record = json.loads((tmp_path / "moved/judge/stage.json").read_text())
    del record["fingerprint"]
    for key, value, said in (
        ("recipe", {**record["recipe"], "eval_fraction": "x"}, "recipe: eval_fraction: expected a number"),
        ("recipe", {}, "recipe: `output_dir` is missing"),
        ("data", {"sources": [{"used_for": "training"}]}, "data: sources: expected a list of mappings"),
    ):
        (tmp_path / "moved/judge/stage.json").write_text(json.dumps({**record, key: value}))
        with pytest.raises(UserError, match=f"stage.json: {said}"):
            counted("moved/judge")
    write_jsonl(tmp_path / "copy.jsonl", rows()[1:])
    assert counted("model/member_1") == 0, "other rows"
    write_jsonl(tmp_path / "copy.jsonl", rows())
    result = judge.run(recipe(**of_model, reward_model_path="model/member_1"))
    seen = next(each for each in result.card["verdicts"] if each["line"] == "held out")
    assert (seen["verdict"], seen["measured"]) == ("bad", f"{halves[0]} of 60 pairs")


def test_samples_that_have_no_spread(place):
    save_tiny_policy(place / "base")
    for keys, said in (
        ({"policy_path": "base", "response_length": 256}, r"response_length: base \(policy_path\) reads 256 tokens"),
        ({"samples_dataset": "pairs.jsonl"}, "samples_dataset: no prompt has two completions"),
    ):
        with pytest.raises(UserError, match=said):
            prepare_inputs(recipe(**keys))


def test_spread_by_hand():
    pairs = [Preference(p, "", "", "") for p in "aabbbc"]
    found = spread(pairs, np.array([1.0, 3.0, 5.0, 5.0, 5.0, 9.0]), 20, 0)
    assert found["within_prompts"]["value"] == pytest.approx((2**0.5 + 0) / 2)
    assert (found["flat_prompts"]["value"], found["samples"]) == (0.5, 5)
    assert found["over_all_samples"] == pytest.approx(np.std([1, 3, 5, 5, 5]))


def test_words_alone():
    """The word `good` tells; without training pairs it is learnt on other prompts than it is tried on."""
    pairs = [Preference(f"p{i % 20}", f" good answer {i}", f" bad answer {i + 1}", "") for i in range(60)]
    judged = ScoredPairs(pairs, np.zeros(60), np.zeros(60)).outcomes
    for training in (pairs[:20], []):
        margins, _ = words_margins(pairs, judged, training, 0)
        assert (margins > 0).all()
    known = [Preference(f"p{i % 20}", f" only{i % 20} {i}", f" other{i % 20} {i}", "") for i in range(60)]
    margins, what = words_margins(known, ScoredPairs(known, np.zeros(60), np.zeros(60)).outcomes, [], 0)
    assert (np.abs(margins) < 1).all(), "a prompt's own words are not seen"
    assert "share no prompt" in what


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"reward_funcs": []}, "reward_model_path: expected a reward model, or `reward_funcs`, got neither"),
        ({"reward_model_path": "x"}, "reward_funcs: expected them or reward_model_path, got both"),
        ({"eval_dataset": []}, "eval_dataset: expected pairs to judge on"),
        ({"num_generations": 1}, "num_generations: expected a number at least 2, got 1"),
        ({"samples_dataset": "a", "policy_path": "b"}, "samples_dataset: expected it or policy_path, got both"),
        ({"reward_model": "x"}, "reward_model: unknown key; did you mean 'reward_model_path'"),
    ],
)
def test_recipes_that_are_refused(place, keys, said):
    with pytest.raises(UserError) as error:
        recipe(**keys)
    assert said in str(error.value)


def test_errors_before_and_while_scoring_leave_no_folder(place):
    for keys, said in (
        ({"slice_by": ["kinds"]}, "slice_by: no column 'kinds' in the pairs; did you mean 'kind'?"),
        (
            {"reward_funcs": ["judged_rules:fails"]},
            "reward_funcs: reward 'judged_rules:fails', row 0 of 16: RuntimeError",
        ),
        ({"reward_funcs": ["judged_rules:nosuch"]}, "reward_funcs: no function 'nosuch'"),
    ):
        with pytest.raises(UserError) as error:
            judge.run(recipe(**keys))
        assert str(error.value).startswith(said)
        assert not Path("out").exists()


def test_a_model_with_a_policy_and_its_card_from_the_reward_stage(tmp_path, monkeypatch, capsys):
    """The stage's card and the command's on the same pairs hold the same numbers; ties are counted apart."""
    monkeypatch.chdir(tmp_path)
    letters = "abcdefghij"
    pairs = [(f"q{a}{c}", f"zz{a}", f"{c}b") for a in letters for c in letters[:4]]
    trained = reward_recipe(tmp_path, [("x" + p, c, r) for p, c, r in pairs[:8]], pairs, max_steps=4)
    line = json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[0])
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write(json.dumps({**line, "prompt": "ties", "tie": True}) + "\n")
    results = train_reward(trained)
    written = json.loads((tmp_path / "out/stage.json").read_text())
    assert results.card == written["results"]["card"]
    assert results.card["verdict"] in ("good", "doubtful", "bad")
    assert {"card/card.md", "card/results.json", "card/confident_errors.jsonl"} <= set(written["files"])
    for_machines = json.loads((tmp_path / "out/card/results.json").read_text())
    assert for_machines["verdict"] == results.card["verdict"]
    card = (tmp_path / "out/card/card.md").read_text()
    assert "| ties in data | 1 |" in card
    Path("r.yaml").write_text(
        "stage: judge-reward\noutput_dir: judged\nreward_model_path: out\npolicy_path: base\ntrain_dataset: train.jsonl\n"
        "eval_dataset: eval.jsonl\nnum_prompts: 5\nnum_generations: 3\nresponse_length: 6\nbootstrap_iters: 20\n"
    )
    assert check.run("r.yaml") == 0
    said = capsys.readouterr().out
    assert "pairs: 41 to judge on, 8 of its training" in said
    judged = judge.run(as_recipe(JudgeRewardRecipe, "r.yaml")).card
    accuracy = f"{judged['metrics']['accuracy']['value']:.3f}"
    assert f"| accuracy, pairs that are no ties | {accuracy} " in card
    assert judged["metrics"]["accuracy"]["n"] == 40
    assert judged["metrics"]["accuracy"] == pytest.approx(for_machines["card"]["metrics"]["accuracy"], abs=0.1)
    assert judged["metrics"]["accuracy"]["value"] == pytest.approx(results.metrics["eval_accuracy"])
    assert judged["metrics"]["nll"]["value"] == pytest.approx(results.metrics["eval_loss"], abs=1e-5)
    assert judged["spread"]["samples"] == 15
    assert judged["spread"]["flat_prompts"]["n"] == 5


def test_a_language_model_is_no_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_policy(tmp_path / "base")
    write_jsonl(tmp_path / "pairs.jsonl", rows(2))
    with pytest.raises(UserError, match="reward_model_path: base has no scalar head"):
        judge.run(recipe(reward_funcs=[], reward_model_path="base"))
    assert not Path("out").exists()
