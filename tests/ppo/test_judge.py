"""A judge that training never sees: the best checkpoint, the early stop and the verdict are by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import align.ppo.tracking
from align.config.judge import SCORE
from align.config.load import load_recipe
from align.errors import UserError
from align.evaluate.bootstrap import mean_interval
from align.ppo.data import load_data
from align.ppo.evaluation import Evaluation
from align.ppo.frontier import describe_fit, draw_frontier, fit
from align.ppo.inputs import check_ppo_inputs
from align.ppo.train import run
from align.ppo.verdict import Change, describe_fall, mean, paired_change, spread, verdicts, warnings
from tests.ppo.runs import ALONE, ppo_run
from tests.ppo.test_train import make_recipe, metrics
from tests.worlds import claimed

JUDGES = """
def other(prompts, completions, **columns):
    return [-10 * text.count("a") for text in completions]

def same(prompts, completions, **columns):
    return [text.count("a") / max(len(text), 4) for text in completions]
"""
HERE = str(Path(__file__).parent)
HELD_OUT = [{"prompt": a + b} for a in "vwxyz" for b in "abcdefgh"]  # none is trained on


def judged(folder, judge, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "judges.py").write_text(JUDGES)
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    keys = {"eval_dataset": str(folder / "many.jsonl"), "eval_steps": 1, "save_steps": 1, "learning_rate": 0.01}
    path = make_recipe(folder, judge_reward_funcs=[f"judges:{judge}"], **keys | changes)
    return load_recipe("ppo", path)


def weights(folder):
    return load_file(folder / "model.safetensors")


def best_in_words_of(results):
    """What is said of `best/` where the SFT model is kept."""
    return f"the SFT model: no evaluation had a higher eval/judge than its {results.best['eval/judge']:.4g}"


class TestARewardThatTheJudgeContradicts:
    def test_training_stops_and_best_is_the_sft_model_resumed_or_not(self, tmp_path, monkeypatch, capsys):
        whole = run(judged(tmp_path / "a", "other", early_stopping_patience=2, ema_decay=0.9))
        said = " ".join(capsys.readouterr().err.split())
        assert whole.updates < 6, "of which there would be 6"
        assert whole.best["update"] == 0
        curve = [row["eval/change_high/judge"] < 0 for row in metrics(tmp_path / "a/out") if "eval/judge" in row]
        assert curve[-2:] == [True, True], "two in a row"
        assert curve[:-1].count(True) == 1, "and not more, since it would have stopped before"
        assert whole.verdict[0].startswith("worse than SFT by judge: -")
        assert whole.verdict[1].startswith("better than SFT by score (the training reward): +")
        falls = [row for row in metrics(tmp_path / "a/out") if row.get("eval/change_high/judge", 0.0) < 0]
        for row in falls[
            :1
        ]:  # each kind of warning is kept once; the best is the SFT model, from which changes are measured
            fall = Change(*(row[f"eval/{name}/judge"] for name in ("change", "change_low", "change_high")), 0)
            assert f"judge is {fall} from its best, of the SFT model while the score rose" in said
        card, names = (tmp_path / "a/out/README.md").read_text(), {}
        kept = best_in_words_of(whole)
        assert card[card.index("# Language") : card.index("```")].splitlines() == [
            "# Language model, trained by PPO",
            "",
            f"From the SFT model {tmp_path}/a/policy, with a KL penalty of 0.01 per nat against it. This folder holds the last "
            f"policy, `best/` {kept}, `value/` the value model, `ema/` the moving average of its weights.",
            "",
            *(f"- {line}" for line in whole.verdict),
            "",
            "![Gain over the square root of the KL from SFT](frontier.svg)",
            "",
        ]
        assert ElementTree.parse(tmp_path / "a/out/frontier.svg").getroot().tag.endswith("svg")
        last = " ".join(said[said.index(whole.verdict[0]) :].split())
        assert last.startswith(
            " ".join([*whole.verdict, f"best/ holds {kept}", f"{tmp_path}/a/out: weights in float32 (save_dtype"])
        )
        exec(card.split("```python\n")[1].split("```")[0], names)  # what the card says is what was trained
        trained = names["model"].state_dict()
        assert all(torch.equal(trained[name], weight) for name, weight in weights(tmp_path / "a/out").items())
        assert "early_stopping_patience: 2 evaluations in a row: training stops" in said
        (tmp_path / "sft").symlink_to(tmp_path / "a/policy")
        assert all(torch.equal(weights(tmp_path / "sft")[n], w) for n, w in weights(tmp_path / "a/out/best").items())

        def cut_off(ppo, update):
            if update == whole.updates - 1:
                raise KeyboardInterrupt
            return step(ppo, update)

        recipe, step = (
            judged(tmp_path / "b", "other", early_stopping_patience=2, ema_decay=0.9),
            align.ppo.tracking.timed_step,
        )
        with monkeypatch.context() as patch:
            patch.setattr(align.ppo.tracking, "timed_step", cut_off)
            with pytest.raises(KeyboardInterrupt):
                run(recipe)
        resumed = run(recipe)
        assert (resumed.updates, resumed.best, resumed.metrics) == (whole.updates, whole.best, whole.metrics)
        after = weights(tmp_path / "b/out")
        assert all(torch.equal(after[name], w) for name, w in weights(tmp_path / "a/out").items())


def test_an_honest_reward_does_not_stop_and_the_judge_chooses_the_best(tmp_path):
    results = run(judged(tmp_path, "same", early_stopping_patience=1))
    assert results.updates == 6
    by_judge = {row["step"]: row["eval/judge"] for row in metrics(tmp_path / "out") if "eval/judge" in row}
    assert results.best["update"] == max(by_judge, key=by_judge.get)
    assert results.verdict[0].startswith("better than SFT by judge: +")
    (row,) = [row for row in results.table if row.measure == "judge"]
    assert row.after == pytest.approx(by_judge[6])
    (row,) = [row for row in results.table if row.measure == "win rate by judge"]
    assert 0.5 < row.after == results.metrics["eval/judge_win_rate"] <= 1


def test_a_response_that_both_models_gave_is_a_tie_however_it_was_rounded(tmp_path):
    recipe = claimed(judged(tmp_path, "same"))
    ppo = ppo_run(recipe)
    data = load_data(recipe, check_ppo_inputs(recipe), ALONE)
    evaluation = Evaluation(ppo, data.held_out, 1)
    before = evaluation.baseline
    rounded = {name: [value + 1e-6 for value in values] for name, values in before.metric_values.items()}
    won = evaluation.measure(replace(before, metric_values=rounded))
    assert won["eval/win_rate"] == won["eval/judge_win_rate"] == 0.5
    other = before.rollout.response_ids.clone()
    other[0, 0] += 1  # one response of 40 is another, and a win
    changed = replace(before, rollout=replace(before.rollout, response_ids=other), metric_values=rounded)
    assert evaluation.measure(changed)["eval/win_rate"] == 0.5 + 0.5 / 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge_reward_funcs": ["rules_for_test:count_a"]}, "also in reward_funcs; a judge is a reward that training"),
        ({"reward_model_path": "rm", "judge_reward_model_path": "rm"}, "rm is the reward that is trained on"),
        (
            {"reward_model_path": HERE, "judge_reward_model_path": f"{HERE}/../ppo"},
            "ppo is the reward that is trained on",
        ),
        ({"judge_reward_funcs": ["m:f", "m:f"]}, "judge_reward_funcs: expected different functions, got m:f, m:f"),
        ({"reward_funcs": ["m:f", "m:f"]}, "reward_funcs: expected different functions"),
        ({"metric_for_best_model": "eval/judge"}, "no metric eval/judge.*can be chosen by eval/score"),
        ({"early_stopping_patience": 2, "eval_steps": None}, "counts the evaluations of `eval_steps`"),
        (
            {"judge_reward_funcs": ["m:f"], "eval_dataset": [], "eval_fraction": 0.0},
            "is measured on evaluation prompts",
        ),
    ],
)
def test_keys_that_exclude_one_another(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        load_recipe("ppo", make_recipe(tmp_path, **changes))


class TestVerdict:
    def test_the_change_is_paired_and_leaves_out_what_was_not_judged(self):
        nothing = float("nan")
        told = paired_change([2.0, 3.0, nothing, 5.0], [1.0, 1.0, 1.0, 2.0], ["a", "b", "c", "d"])
        assert (told.mean, told.prompts) == (2.0, 3)
        assert told.low >= 1.0
        assert told.high <= 3.0

    def test_one_prompt_proves_nothing(self):
        told = paired_change([9.0, 9.0], [1.0, 1.0], ["a", "a"])
        assert (told.comparison, told.prompts) == ("no different from", 1)
        assert Change(-0.1, -0.5, 0.3, 50).comparison == "no different from"

    def test_prompts_are_drawn_whole(self):
        """40 prompts with 5 rows that are all alike: the interval is that of 40 rows, not of 200."""
        values = np.random.default_rng(0).normal(size=40)
        _, low, high = mean_interval(list(values), range(40))
        repeated = mean_interval(list(values.repeat(5)), [p for p in range(40) for _ in range(5)])
        assert repeated[1:] == pytest.approx((low, high))
        assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(40), rel=0.15)
        _, narrow_low, narrow_high = mean_interval(list(values.repeat(5)), range(200))
        assert narrow_high - narrow_low < 0.6 * (high - low)

    def test_words(self):
        better, worse, same = Change(0.5, 0.1, 0.9, 50), Change(-0.5, -0.9, -0.1, 50), Change(0.1, -0.3, 0.5, 50)
        lines = verdicts({"eval/true/w:f": worse, "eval/judge": same, SCORE: better})
        assert lines == [
            "worse than SFT by true reward (w:f): -0.5 (-0.9 to -0.1), 95% interval, on 50 prompts unseen in training",
            "no different from SFT by judge: +0.1 (-0.3 to +0.5), 95% interval, on 50 prompts unseen in training",
            "better than SFT by score (the training reward): +0.5 (+0.1 to +0.9), 95% interval, on 50 prompts unseen in training",
        ]
        assert "proves nothing" in verdicts({SCORE: better})[-1]

    def test_warnings(self):
        up, down, flat = Change(1.0, 0.8, 1.2, 50), Change(-0.5, -0.9, -0.1, 50), Change(0.0, -0.2, 0.2, 50)
        lower = Change(-0.1, -0.5, 0.3, 50)  # perhaps
        assert warnings({SCORE: up}, up, 0.5, (20.0, 30.0)) == {}
        assert warnings({"eval/judge": lower, SCORE: up}, lower, 0.0, (20.0, 20.0)) == {}
        assert warnings({SCORE: down}, flat, 0.96, (18.0, 32.0)) == {}, "no gain that length could explain"
        assert warnings({SCORE: up}, flat, 0.96, (20.0, 24.0)) == {}, "which grew by a fifth"
        assert warnings({"eval/judge": flat, SCORE: up}, flat, float("nan"), (20.0, 40.0)) == {}
        (length,) = warnings({SCORE: up}, up, 0.96, (18.0, 32.0)).values()
        assert "correlation is 0.96, and responses grew from 18 to 32 tokens" in length
        assert [*warnings({"eval/judge": down, SCORE: up}, up, 0.0, (20.0, 20.0))] == ["eval/judge"]
        assert warnings({"eval/judge": down, SCORE: down}, flat, 0.0, (20.0, 20.0)) == {}, "the score fell, too"
        assert [*warnings({SCORE: up}, down, 0.0, (20.0, 20.0))] == ["objective"]
        assert warnings({SCORE: up}, up, 0.0, (20.0, 20.0), 3.0)["truncated"].startswith("3 prompts with a response")

    def test_a_fall_from_the_best(self):
        down = Change(-0.5, -0.9, -0.1, 50)
        told = "judge is -0.5 (-0.9 to -0.1) from its best, of"
        assert describe_fall("eval/judge", down, 0, 1.5) == (
            f"{told} the SFT model while the score rose by 1.5; best/ keeps the SFT model."
        )
        assert describe_fall("eval/judge", down, 8, -1.5) == (
            f"{told} update 8 while the score fell by 1.5; best/ keeps update 8."
        )
        assert describe_fall(SCORE, down, 8, -0.5).endswith("from its best, of update 8; best/ keeps update 8.")

    def test_rows_that_were_not_judged_count_nowhere(self):
        values = [1.0, float("nan"), 3.0]
        assert (mean(values), spread(values)) == (2.0, 1.0)


class TestFrontier:
    def history(self, kls):
        """Evaluations on the law d (1.2 - 0.7 ln d), whose peak is at d = exp(1.2 / 0.7 - 1) = 2.0427, d^2 = 4.1727."""
        law = [d * (1.2 - 0.7 * math.log(d)) for d in (math.sqrt(max(kl, 1e-9)) for kl in kls)]
        return [
            {"eval/kl": kl, "eval/change/judge": gain, "eval/change/score": kl}
            for kl, gain in zip(kls, law, strict=True)
        ]

    def test_the_fit_finds_the_law_and_says_where_its_peak_is(self):
        found = fit(self.history([0.5, 1.0, 2.0, 4.0, 9.0]), "eval/judge")
        assert [found[name] for name in ("a", "b", "peak_kl", "peak_gain")] == pytest.approx(
            [1.2, 0.7, 4.1727, 1.4299], rel=1e-4
        )
        assert describe_fit(found, 9.0).endswith("its peak, at 4.17 nats, was passed (the last evaluation had 9)")
        assert "lies ahead" in describe_fit(found, 3.0)

    def test_too_few_points_are_not_fitted(self):
        assert fit(self.history([0.5, 1.0, 2.0, 4.0]), "eval/judge") is None
        assert fit(self.history([-0.01, 0.0, 1.0, 2.0, 3.0, 4.0, 4.0]), "eval/judge") is None, "four distances"
        assert fit(self.history([0.0, 1.0, 2.0, 3.0, 4.0]), "eval/judge") is None, "four, and the SFT model"

    def test_an_evaluation_that_could_not_be_judged_is_left_out(self):
        history = self.history([0.5, 1.0, 2.0, 4.0, 9.0, 3.0])
        del history[5]["eval/change/judge"]
        found = fit(history, "eval/judge")
        assert found["peak_kl"] == pytest.approx(4.1727, rel=1e-4)
        draw_frontier(history, {"eval/judge": 0.0}, found)  # nor can one gain be drawn that has no spread
        history[5]["eval/change/judge"] = float("nan")
        assert fit(history, "eval/judge") == found

    def test_a_gain_that_only_rises(self):
        rising = {"metric": "eval/judge", "a": 0.5, "b": -0.1, "peak_kl": None, "peak_gain": None}
        assert describe_fit(rising, 9.0) == (
            "fit of the gain by eval/judge: d (0.5 + 0.1 ln d), d the root of the KL; it has no peak"
        )

    def test_the_chart_has_a_line_for_each_measure_and_the_fit(self):
        history = self.history([0.5, 2.0, 1.0, 4.0, 9.0])
        svg = draw_frontier(history, {"eval/judge": 2.0, SCORE: 1.0}, fit(history, "eval/judge"))
        root = ElementTree.fromstring(svg)
        lines = [each.get("points").split() for each in root.iter("{http://www.w3.org/2000/svg}polyline")]
        assert [len(line) for line in lines] == [6, 6, 6]
        assert all(line == sorted(line, key=lambda point: float(point.split(",")[0])) for line in lines), "by distance"
        assert lines[0] == lines[2], "the points lie on the law"
        assert "square root of the KL" in svg
