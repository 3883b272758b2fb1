"""PPO against several rewards: ensembles of reward models, and rewards normalized one by one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from align.cli.check.memory import Footprint
from align.cli.check.ppo import PPOCheck
from align.config.ensemble import ensemble_members
from align.config.load import load_recipe
from align.errors import UserError
from align.evaluate.reward_model import check_reward_models
from align.maths.advantages import normalize_then_sum
from align.ppo.metrics import rollout_metrics
from align.ppo.self_checks import run_checks
from align.ppo.step import normalize_and_clip_scores
from align.ppo.train import run
from align.runs.files import write_json
from align.runs.manifest import tokenizer_digest
from align.runs.same_run import with_defaults
from reward_models.combine import RewardSum
from reward_models.ensemble import RewardEnsemble, disagreement, mean, uwo, wco
from reward_models.heads import init_head
from reward_models.responses import Responses
from tests.documented_metrics import undocumented
from tests.ppo.runs import ppo_run, rollout_of
from tests.ppo.test_train import assert_same_curve, make_recipe, metrics
from tests.ranks import run_stage
from tests.worlds import deepspeed_file, letter_tokenizer, manifest, tiny_llama, unfinished

HERE = str(Path(__file__).parent)


def save_member(folder: Path, seed: int) -> str:
    config = tiny_llama().config
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(type(config)(**{**config.to_dict(), "num_labels": 1}))
    init_head(model, seed)
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def save_members(folder: Path, count: int = 3) -> list[str]:
    return [save_member(folder / f"rm{seed}", seed) for seed in range(count)]


def recipe_of(folder: Path, **changes):
    keys = {"reward_funcs": [], "missing_eos_penalty": None, "total_episodes": 16, "num_ppo_epochs": 1, **changes}
    return load_recipe("ppo", make_recipe(folder, **keys))


def test_mean_worst_case_and_uncertainty_weighted_by_hand():
    scores = torch.tensor([[1.0, 4.0], [2.0, 4.0], [3.0, 4.0]])
    assert mean(scores, 0.5).tolist() == [2.0, 4.0]
    assert wco(scores, 0.5).tolist() == [1.0, 4.0]
    assert uwo(scores, 0.5).tolist() == pytest.approx([5 / 3, 4.0])  # of the population; the sample's gives 1.5
    assert disagreement(scores).tolist() == pytest.approx([(2 / 3) ** 0.5, 0.0])
    with pytest.raises(ValueError, match="expected members and one of mean, wco, uwo, got 'max'"):
        RewardEnsemble("reward", [], "max")


class Fixed:
    """A source that gives each response of a batch the same scores."""

    truncated = 0

    def __init__(self, name: str, *scores: float) -> None:
        self.name, self.scores = name, torch.tensor(scores)

    def score(self, batch) -> torch.Tensor:
        return self.scores


def test_an_ensemble_is_one_source_of_a_weighted_sum():
    ensemble = RewardEnsemble("rm", [Fixed("rm_1", 1.0, 5.0), Fixed("rm_2", 3.0, 1.0)], "wco")
    rewards = RewardSum([ensemble, Fixed("f", 10.0, 20.0)], [2.0, -1.0])
    total, scores, _ = rewards.score(Responses(["p"] * 2, ["r"] * 2, ["r"] * 2, [[3]] * 2, [[4]] * 2))
    assert total.tolist() == [2 * 1.0 - 10.0, 2 * 1.0 - 20.0]
    assert list(scores) == rewards.names == ["rm", "f", "rm_1", "rm_2"]
    assert scores["rm_2"].tolist() == [3.0, 1.0]


def test_scores_of_members_are_their_own_and_are_combined_and_logged(tmp_path):
    paths = save_members(tmp_path)
    both = {"reward_ensemble": "uwo", "reward_variance_coef": 0.5}
    together = ppo_run(recipe_of(tmp_path, reward_model_path=paths, **both))
    rollout = rollout_of(together)
    alone = [rollout_of(ppo_run(recipe_of(tmp_path, reward_model_path=path))).scores for path in paths]
    each = torch.stack(alone)
    assert torch.equal(rollout.source_scores[:, 1:].T, each)
    assert torch.equal(rollout.scores, each.mean(0) - 0.5 * each.var(0, correction=0))
    logged = rollout_metrics(together, rollout, torch.zeros_like(rollout.values))
    for number, scores in enumerate(alone, start=1):
        assert logged[f"objective/score/reward_model_{number}"] == pytest.approx(float(scores.mean()))
    assert logged["objective/disagreement/reward_model"] == pytest.approx(float(each.std(0, correction=0).mean()))
    assert not undocumented(logged)


def test_equal_members_train_the_policy_of_one_to_the_bit_and_a_killed_run_goes_on_to_it(tmp_path, capsys):
    path = save_member(tmp_path / "rm", 0)
    copy = str(shutil.copytree(path, tmp_path / "copy"))
    keys = {"total_episodes": 48, "save_steps": 2, "eval_steps": 1, "num_sample_rows": 2}
    run(recipe_of(tmp_path, reward_model_path=[path], output_dir=str(tmp_path / "one"), **keys))
    two = recipe_of(tmp_path, reward_model_path=[path, copy], reward_ensemble="uwo", reward_variance_coef=0.5, **keys)
    run(two)
    one, out = load_file(tmp_path / "one" / "model.safetensors"), tmp_path / "out"
    assert all(torch.equal(one[name], weight) for name, weight in load_file(out / "model.safetensors").items())
    lines = [{k: v for k, v in line.items() if not k.startswith(("time", "memory/"))} for line in metrics(out)]
    assert not undocumented(set().union(*lines) - {"step"})
    inputs = json.loads((out / "stage.json").read_text())["inputs"]
    assert {place for place in inputs if place.startswith("reward")} == {"reward_model_path[0]", "reward_model_path[1]"}

    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    samples = [row for row in samples if row["name"] != "warnings"]
    assert len(samples) >= 6
    for row in samples:
        assert row["score"] == row["score/reward_model_1"] == row["score/reward_model_2"]
        assert row["disagreement/reward_model"] == 0.0

    shutil.copytree(unfinished(out), tmp_path / "killed")
    (out / "run.json").rename(out / "stage.json")
    killed = dataclasses.replace(two, output_dir=str(tmp_path / "killed"))
    run(killed)
    assert "update 3" in capsys.readouterr().err
    again = [
        {k: v for k, v in line.items() if not k.startswith(("time", "memory/"))}
        for line in metrics(tmp_path / "killed")
    ]
    assert again == lines
    theirs = load_file(tmp_path / "killed" / "model.safetensors")
    assert all(torch.equal(one[name], weight) for name, weight in theirs.items())


@pytest.mark.slow  # what shards a model, and what scores members, have faster tests of their own
def test_two_ranks_at_zero_3_log_the_members_scores_of_one(tmp_path):
    keys = {"reward_model_path": save_members(tmp_path, 2), "reward_ensemble": "wco", "total_episodes": 32}
    run(recipe_of(tmp_path, output_dir=str(tmp_path / "one"), **keys))
    sharded = deepspeed_file(tmp_path / "ds.json", 3, fetch_ahead=True)
    recipe_of(tmp_path, deepspeed=sharded, **keys)
    done = run_stage("ppo", tmp_path / "3_ppo.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_curve(metrics(tmp_path / "one"), metrics(tmp_path / "out"))
    (line,) = [each for each in metrics(tmp_path / "out") if each["step"] == 2 and "objective/score" in each]
    assert line["objective/score/reward_model_1"] != line["objective/score/reward_model_2"]


def test_each_member_is_checked_against_its_own_record(tmp_path):
    paths = save_members(tmp_path, 2)
    plain = LlamaForSequenceClassification.from_pretrained(paths[1])
    ids = [[3, 4, 5, 2], [7, 8, 2], [9, 2]]
    with torch.no_grad():
        scores = [float(plain(input_ids=torch.tensor([each])).logits) for each in ids]
    for path in paths:  # the first has the scores of the second in its record
        record = manifest("reward", score_check={"ids": ids, "scores": scores})
        (Path(path) / "stage.json").write_text(
            json.dumps({**record, "tokenizer": tokenizer_digest(letter_tokenizer())})
        )
    checks, found = run_checks(ppo_run(recipe_of(tmp_path, reward_model_path=paths)))
    failed = [str(check) for check in checks if not check.passed and check.required]
    assert [[path in line for line in failed] for path in paths] == [[True], [False]], failed
    assert found["self_check/reward_gap"] > 0.01, "of the worst"


def test_memory_and_notes_count_every_member(tmp_path):
    recipe = recipe_of(tmp_path, reward_model_path=save_members(tmp_path))
    check = PPOCheck()
    start = check.start(recipe, None, tmp_path)
    found = [each for each in check.footprints(recipe, start) if each.name.startswith("reward")]
    size = found[0].parameters
    assert found == [Footprint(f"reward {number}", size, 0) for number in (1, 2, 3)]
    assert [note for note in start.notes if note.startswith("reward model 3: its head is")]


def test_a_folder_of_members_is_a_list_of_them(tmp_path):
    folder = tmp_path / "ensemble"
    folder.mkdir()
    paths = [save_member(folder / f"member_{number}", number) for number in (1, 2, 10)]
    (folder / "member_mine").mkdir()
    assert ensemble_members(str(folder)) == paths, "by number"
    (tmp_path / "others" / "member_mine").mkdir(parents=True)
    assert ensemble_members(str(tmp_path / "others")) == [str(tmp_path / "others")], "not dropped"
    recipe = recipe_of(tmp_path, reward_model_path=str(folder))
    assert [model.name for model in ppo_run(recipe).models.rewards.models] == [
        f"reward_model_{number}" for number in (1, 2, 3)
    ]
    (folder / "run.json").write_text("{}")
    with pytest.raises(UserError, match="ensemble: the stage that writes this folder has not finished"):
        ppo_run(recipe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_model_path": ["a", "a"]}, "reward_model_path: a is written twice"),
        ({"reward_model_path": [HERE, f"{HERE}/../ppo"]}, "reward_model_path: .* is written twice"),
        ({"reward_funcs": ["m:f"], "reward_ensemble": "wco"}, "reward_ensemble: .*reward_model_path names none"),
        ({"reward_model_path": ["a", "b"], "reward_ensemble": "min"}, 'one of mean, wco, uwo, got "min"'),
        ({"reward_model_path": ["a", "b"], "reward_ensemble": "uwo"}, "reward_variance_coef: expected a number"),
        ({"reward_model_path": ["a", "b"], "reward_variance_coef": 1.0}, "reward_variance_coef: is for .*uwo"),
        ({"reward_model_path": ["a", "b"], "judge_reward_model_path": "b"}, "b is the reward that is trained on"),
        ({"reward_model_path": ["a", "b"], "reward_weights": [1, 1]}, "expected 1 weights, one each for the ensemble"),
        (
            {"reward_model_path": "a", "multi_objective_aggregation": "normalize_then_sum"},
            "normalize_then_sum is for several rewards, got a alone",
        ),
        (
            {"reward_funcs": ["m:f", "m:g"], "multi_objective_aggregation": "normalize_then_sum"},
            "num_generations: expected 2 or more",
        ),
        (
            {
                "reward_funcs": ["m:f", "m:g"],
                "multi_objective_aggregation": "normalize_then_sum",
                "num_generations": 2,
                "advantage_estimator": "grpo",
            },
            "divides the sum by its spread in each group again; use reinforce_plus_plus",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        recipe_of(tmp_path, **changes)


def test_a_list_of_one_is_the_one_and_records_of_before_hold_it(tmp_path):
    one = recipe_of(tmp_path, reward_model_path="rm")
    assert one == recipe_of(tmp_path, reward_model_path=["rm"])
    before = {**dataclasses.asdict(one), "reward_model_path": "rm"}
    assert with_defaults(type(one), before) == dataclasses.asdict(one)
    functions = recipe_of(tmp_path, reward_funcs=["m:f"])
    before = {**dataclasses.asdict(functions), "reward_model_path": None}
    assert with_defaults(type(one), before) == dataclasses.asdict(functions)


def test_records_of_before_a_key_have_the_default_that_says_the_same(tmp_path):
    for sources, then in (({"reward_funcs": ["m:f"]}, None), ({"reward_model_path": "rm"}, False)):
        recipe = recipe_of(tmp_path, **sources)
        before = dataclasses.asdict(recipe)
        del before["normalize_scores"], before["metric_for_best_model"]
        assert with_defaults(type(recipe), before) == {**dataclasses.asdict(recipe), "normalize_scores": then}
    before["eval_reward_funcs"] = ["m:f"]  # by which the best checkpoint is chosen now
    assert with_defaults(type(recipe), before)["metric_for_best_model"] == "eval/score"


def test_an_ensemble_with_other_members_than_were_trained_is_refused(tmp_path):
    for name in ("member_1", "member_3"):
        (tmp_path / "rm" / name).mkdir(parents=True)
    write_json(tmp_path / "rm" / "stage.json", manifest("reward", recipe={"ensemble_size": 3}))
    with pytest.raises(
        UserError, match="holds member_1, member_3, and member_1, member_2, member_3 were trained there"
    ):
        check_reward_models(recipe_of(tmp_path, reward_model_path=str(tmp_path / "rm")), False, None)


def test_rewards_are_normalized_in_their_groups_before_they_are_added():
    scores = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    ones = torch.ones(2)
    assert normalize_then_sum(scores, ones, 4).tolist() == pytest.approx([0, 2, 0, -2])
    assert normalize_then_sum(scores, torch.tensor([1.0, 3.0]), 4).tolist() == pytest.approx([-2, 4, 2, -4])
    # A scale of one reward or of one group does not matter, and one that is the same for all of a group adds nothing.
    stretched = torch.cat([scores * torch.tensor([1.0, 1000.0]), scores * torch.tensor([7.0, 0.0]) + 0.1])
    assert normalize_then_sum(stretched, ones, 4).tolist() == pytest.approx([0, 2, 0, -2, 1, 1, -1, -1])
    # Nor does one whose mean is rounded.
    assert normalize_then_sum(torch.full((7, 1), 0.3), torch.ones(1), 7).tolist() == [0.0] * 7
    # NaN: does not apply to a row, and counts neither in its sum nor in the group.
    absent = torch.tensor([[1.0, torch.nan], [0.0, torch.nan], [1.0, 3.0], [0.0, 1.0]])
    assert normalize_then_sum(absent, ones, 4).tolist() == pytest.approx([1, -1, 2, -2])


def test_a_run_with_normalized_rewards(tmp_path):
    keys = {
        "multi_objective_aggregation": "normalize_then_sum",
        "num_generations": 4,
        "missing_eos_penalty": 0.5,
        "normalize_scores": False,
    }
    model = save_member(tmp_path / "rm", 0)
    recipe = recipe_of(tmp_path, reward_funcs=["rules_for_test:count_a"], reward_model_path=model, **keys)
    run_ = ppo_run(recipe)
    rollout = rollout_of(run_)
    expected = 0.0
    for column in rollout.source_scores.double().T:
        groups = column.view(4, 4)
        spread = groups.std(1, correction=0, keepdim=True)
        expected = expected + torch.where(spread > 0, (groups - groups.mean(1, keepdim=True)) / spread, 0.0).flatten()
    expected = expected - 0.5 * ~rollout.ended
    assert normalize_and_clip_scores(run_, rollout).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    rollout.token_scores[0, 0] = 1.0
    with pytest.raises(UserError, match="takes one score for each response"):
        normalize_and_clip_scores(run_, rollout)
