"""The PPO stage as a user runs it: from a recipe, alone and under the launcher, killed and resumed."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from align.config.load import load_recipe
from align.engine.optimizer import learning_rates
from align.errors import UserError
from align.maths.advantages import missing_eos_scores
from align.ppo.train import run
from align.runs.manifest import open_stage
from align.runs.output_folder import release
from align.runs.own_files import own
from tests.documented_metrics import undocumented
from tests.ppo.runs import ppo_run, rollout_of
from tests.ranks import launch, run_stage, start_stage, stop_after_checkpoint
from tests.worlds import LETTERS, deepspeed_file, letter_tokenizer, manifest, save_tiny_policy, write_jsonl

RULES = '''
import os

def count_a(prompts, completions, **columns):
    """The share of a's, for a response of any length."""
    return [text.count("a") / max(len(text), 4) for text in completions]

def broken(prompts, completions, **columns):
    raise RuntimeError("the reward is on strike")

def too_few(prompts, completions, **columns):
    return [0.0]

def later(prompts, completions, **columns):
    """Fails in the second update: the self-checks and the evaluation of the SFT model call it before."""
    later.calls += 1
    if later.calls > 3:
        raise RuntimeError("the reward is on strike")
    return [0.0] * len(prompts)

later.calls = 0

def fails_on_rank_1(prompts, completions, **columns):
    if os.environ["RANK"] == "1":
        raise RuntimeError("the judge is down")
    return [0.0] * len(prompts)

def not_a_number(prompts, completions, **columns):
    return [float("nan")] * len(prompts)
'''


def make_recipe(folder: Path, **changes) -> str:
    """A recipe with a tiny random policy, prompts of one to four letters, and a Python reward beside it."""
    (folder / "rules_for_test.py").write_text(RULES)
    if not (folder / "policy").exists():
        save_tiny_policy(folder / "policy")
    prompts = [{"prompt": LETTERS[i : i + 1 + i % 4]} for i in range(20)]
    keys = {
        "stage": "ppo",
        "output_dir": str(folder / "out"),
        "sft_model_path": str(folder / "policy"),
        "reward_funcs": ["rules_for_test:count_a"],
        "train_dataset": write_jsonl(folder / "prompts.jsonl", prompts),
        "eval_dataset": write_jsonl(folder / "held_out.jsonl", [{"prompt": "zz" + letter} for letter in "abcde"]),
        "total_episodes": 96,
        "rollout_batch_size": 16,
        "minibatch_size": 8,
        "num_ppo_epochs": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "response_length": 8,
        "temperature": 0.9,
        "learning_rate": 6e-3,
        "kl_coef": 0.01,
        "missing_eos_penalty": 0.1,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 2,
        **changes,
    }
    path = folder / "3_ppo.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ppo")
    run(load_recipe("ppo", make_recipe(folder)))
    return folder / "out"


class TestOneProcess:
    def test_the_reward_rises(self, finished):
        curve = [row["objective/score"] for row in metrics(finished) if "objective/score" in row]
        assert len(curve) == 6
        assert sum(curve[-3:]) / 3 > curve[0] + 0.08

    def test_the_first_ratio_of_every_update_is_one_and_the_first_kl_zero(self, finished):
        rows = [row for row in metrics(finished) if "policy/first_ratio" in row]
        for row in rows:
            assert row["policy/first_ratio"] == pytest.approx(1.0, abs=1e-5)
        assert rows[0]["objective/kl"] == 0.0

    def test_every_metric_is_documented(self, finished):
        names = {name for row in metrics(finished) for name in row} - {"step", "time"}
        assert undocumented(names) == []

    def test_the_output_loads_with_plain_transformers(self, finished):
        for folder in (finished, finished / "best"):
            model = AutoModelForCausalLM.from_pretrained(folder)
            assert model.dtype == torch.float32
            assert AutoTokenizer.from_pretrained(folder).eos_token_id == 2
        assert AutoModelForTokenClassification.from_pretrained(finished / "value").num_labels == 1

    def test_the_manifest_tells_what_was_done(self, finished):
        manifest = json.loads((finished / "stage.json").read_text())
        assert manifest["stage"] == "ppo"
        assert manifest["results"]["updates"] == 6
        assert manifest["results"]["best"]["eval/score"] > 0
        assert len(manifest["results"]["samples"]) == 3
        assert not (finished / "run.json").exists()

    def test_samples_show_both_responses(self, finished):
        rows = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
        assert {"prompt", "sft", "response", "score_sft", "score", "kl"} <= set(
            next(row for row in rows if row["name"] == "samples")
        )

    def test_all_responses_of_the_last_evaluation_are_kept_with_their_lengths(self, finished):
        rows = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
        last = [row for row in rows if row["name"] == "responses"]
        results = json.loads((finished / "stage.json").read_text())["results"]
        assert {row["step"] for row in last} == {results["updates"]}
        for measure in ("score", "length"):
            mean = sum(row[measure] for row in last) / len(last)
            assert mean == pytest.approx(results[f"eval/{measure}"], abs=1e-5)
        assert [row["score_sft"] for row in last[:3]] == [row["score_sft"] for row in results["samples"]]

    def test_a_finished_run_is_not_run_again(self, finished):
        before = (finished / "metrics.jsonl").stat().st_mtime_ns
        results = run(load_recipe("ppo", str(finished.parent / "3_ppo.yaml")))
        assert results.updates == 6
        assert (finished / "metrics.jsonl").stat().st_mtime_ns == before

    def test_only_the_newest_checkpoints_are_kept(self, finished):
        assert sorted(path.name for path in finished.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

    @pytest.mark.parametrize(
        "cut",
        [
            {"per_device_train_batch_size": 1},
            {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 16},
            {"gradient_checkpointing": True},
        ],
    )
    def test_microbatches_do_not_change_the_curve(self, finished, tmp_path, cut):
        run(load_recipe("ppo", make_recipe(tmp_path, **cut)))
        assert_same_curve(metrics(finished), metrics(tmp_path / "out"))

    def test_a_padding_token_that_is_end_of_text_changes_nothing(self, finished, tmp_path):
        recipe = make_recipe(tmp_path)
        tokenizer = letter_tokenizer(pad_is_eos=True)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})  # so that text leaves it out as before
        tokenizer.save_pretrained(tmp_path / "policy")
        run(load_recipe("ppo", recipe))
        assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 2
        assert_same_curve(metrics(finished), metrics(tmp_path / "out"), 1e-6)

    def test_the_seed_changes_it(self, finished, tmp_path):
        run(load_recipe("ppo", make_recipe(tmp_path, seed=1, total_episodes=16)))
        assert metrics(tmp_path / "out")[0]["objective/score"] != metrics(finished)[0]["objective/score"]


def assert_same_curve(ours: list[dict], theirs: list[dict], tolerance: float = 2e-4) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"time", "policy/padding"}:  # padding is that of the passes, whose rows may differ
            if not name.startswith(("time/", "memory/")):
                assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), (a["step"], name)


def assert_same_weights_and_curve(one: Path, two: Path) -> None:
    """To 1e-5 in the first update and in the weights; in later updates, metrics of few tokens amplify rounding."""
    assert_same_curve(metrics(one)[:1], metrics(two)[:1], 1e-5)
    assert_same_curve(metrics(one), metrics(two))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


class TestTwoRanks:
    @pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
    def test_two_ranks_log_the_curve_of_one(self, finished, tmp_path, stage):
        recipe = make_recipe(tmp_path, deepspeed=deepspeed_file(tmp_path / "ds.json", stage))
        done = run_stage("ppo", recipe)
        assert done.returncode == 0, done.stderr[-3000:]
        assert_same_curve(metrics(finished), metrics(tmp_path / "out"))
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "out"))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=0)
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))

    def test_two_ranks_that_share_rows_log_the_curve_of_one(self, finished, tmp_path):
        """Each has a part of every row in the training passes of policy and value model, and samples prompts of its own."""
        done = run_stage(
            "ppo", make_recipe(tmp_path, deepspeed=deepspeed_file(tmp_path / "ds.json", 2), sequence_parallel_size=2)
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "8 sequences per step = 1 x 4 x 2 (groups of 2 processes x micro-batch x accumulation), " in done.stderr
        assert "6 updates of 2 x 8 responses (processes x responses)" in done.stderr
        assert_same_weights_and_curve(finished, tmp_path / "out")

    def test_a_rank_whose_part_has_no_response(self, tmp_path):
        """Prompts are longer than responses; one update at ZeRO 3, where every rank has a gradient of every weight."""
        rows = [{"prompt": LETTERS[i : i + 12 + i % 4]} for i in range(8)]
        changes = {
            "train_dataset": write_jsonl(tmp_path / "long.jsonl", rows), "eval_dataset": [], "eval_fraction": 0, "eval_steps": None,
            "total_episodes": 16, "response_length": 6,
            "use_kl_loss": True, "kl_estimator": "k3", "entropy_coef": 0.1, "save_steps": None,
        }  # fmt: skip
        run(load_recipe("ppo", make_recipe(tmp_path, output_dir=str(tmp_path / "alone"), **changes)))
        changes |= {"deepspeed": deepspeed_file(tmp_path / "ds.json", 3), "sequence_parallel_size": 2}
        done = run_stage("ppo", make_recipe(tmp_path, **changes))
        assert done.returncode == 0, done.stderr[-3000:]
        assert_same_weights_and_curve(tmp_path / "alone", tmp_path / "out")

    def test_a_model_that_does_not_fit_whole_generates_sharded(self, finished, tmp_path):
        """`ds3_gather_for_generation: false`: every rank takes every step, however ragged the responses."""
        recipe = make_recipe(
            tmp_path,
            deepspeed=deepspeed_file(tmp_path / "ds.json", 3),
            ds3_gather_for_generation=False,
            total_episodes=16,
            num_ppo_epochs=1,
        )
        done = run_stage("ppo", recipe)
        assert done.returncode == 0, done.stderr[-3000:]
        assert metrics(tmp_path / "out")[0]["objective/score"] == pytest.approx(
            metrics(finished)[0]["objective/score"], abs=1e-5
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_graphs_without_a_gpu_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"cuda_graphs: needs a GPU, and torch sees none; leave it out\."):
        run(load_recipe("ppo", make_recipe(tmp_path, cuda_graphs=True)))


class TestFailedRank:
    WORDS = r"error: rank 1: reward 'rules_for_test:fails_on_rank_1', row 0 of 8: RuntimeError: the judge is down; prompt: .*"

    def test_all_ranks_end_with_its_error_by_themselves(self, tmp_path):
        recipe = make_recipe(tmp_path, reward_funcs=["rules_for_test:fails_on_rank_1"])
        ranks = start_stage("ppo", recipe, ranks=2)
        assert ranks.wait(90) == [2, 2]
        assert [bool(re.fullmatch(self.WORDS, line)) for line in ranks.stderr.splitlines() if "error" in line] == [True]

    @pytest.mark.slow
    def test_under_the_launcher(self, tmp_path):
        began = time.monotonic()
        done = launch("align.ppo", make_recipe(tmp_path, reward_funcs=["rules_for_test:fails_on_rank_1"]))
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert [bool(re.fullmatch(self.WORDS, line)) for line in errors] == [True], done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        assert time.monotonic() - began < 300  # not the ten minutes of a collective


class TestKilled:
    @pytest.mark.parametrize("how", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
    def test_a_killed_run_ends_like_one_that_was_not(self, finished, tmp_path, how):
        recipe = make_recipe(tmp_path)
        stop_after_checkpoint("ppo", recipe, tmp_path / "out", how)
        assert not (tmp_path / "out" / "stage.json").exists()
        assert run_stage("ppo", recipe, ranks=1).returncode == 0
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (finished, tmp_path / "out"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert_same_curve(metrics(finished), metrics(tmp_path / "out"), tolerance=0)


class TestBadInput:
    @pytest.mark.parametrize(
        ("function", "words"),
        [
            ("broken", ["broken", "on strike"]),
            ("later", ["update 2: reward", "later", "on strike"]),
            ("too_few", ["too_few", "1 scores for"]),
            ("not_a_number", ["not_a_number", "nan"]),
        ],
    )
    def test_a_reward_function_that_fails_is_named(self, tmp_path, function, words):
        with pytest.raises(UserError) as error:
            run(load_recipe("ppo", make_recipe(tmp_path, reward_funcs=[f"rules_for_test:{function}"])))
        assert all(word in str(error.value) for word in words)

    def test_a_reward_folder_without_a_head(self, tmp_path):
        recipe = make_recipe(tmp_path, reward_model_path=str(tmp_path / "policy"))
        with pytest.raises(UserError, match=r"reward_model_path.*no scalar head.*run the reward stage"):
            run(load_recipe("ppo", recipe))

    def test_another_chat_template_between_the_stages(self, tmp_path):
        recipe = make_recipe(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
        from align.runs.files import write_json
        from align.runs.manifest import tokenizer_digest

        digest = tokenizer_digest(tokenizer) | {"chat_template": "another"}
        write_json(tmp_path / "policy" / "stage.json", manifest("sft", tokenizer=digest))
        with pytest.raises(UserError, match=r"sft_model_path.*another chat template"):
            run(load_recipe("ppo", recipe))

    def test_a_stage_that_has_not_run(self, tmp_path):
        with pytest.raises(UserError, match=r"sft_model_path: no model at .*run the stage that makes it first"):
            run(load_recipe("ppo", make_recipe(tmp_path), ["--sft_model_path", str(tmp_path / "nowhere")]))

    def test_a_stage_that_has_not_finished(self, tmp_path):
        recipe = make_recipe(tmp_path)
        (tmp_path / "policy" / "run.json").write_text("{}")
        with pytest.raises(UserError, match=r"has not finished"):
            run(load_recipe("ppo", recipe))

    def test_a_loss_that_is_not_finite_stops_the_run(self, tmp_path):
        with pytest.raises(UserError, match=r"update \d+: minibatch \d+: the loss is not finite.*Lower learning_rate"):
            run(load_recipe("ppo", make_recipe(tmp_path, learning_rate=1e9, max_grad_norm=0)))


def test_a_changed_recipe_does_not_resume(tmp_path):
    recipe = make_recipe(tmp_path)

    def begin(*overrides: str) -> bool:
        """Start, and be killed before the first checkpoint."""
        try:
            return open_stage(load_recipe("ppo", recipe, overrides))
        finally:
            release(tmp_path / "out")

    assert begin("--kl_coef", "0.5") is False
    assert begin() is False, "nothing was saved, so nothing is in the way"
    assert begin("--kl_coef", "0.5") is False
    own(tmp_path / "out" / "checkpoint-2").mkdir()
    (tmp_path / "out" / "checkpoint-2" / "complete.json").write_text("{}")
    assert begin("--kl_coef", "0.5", "--save_steps", "7") is False
    with pytest.raises(UserError, match=r"output_dir: .* holds an unfinished run that differs in kl_coef"):
        begin()


def test_the_schedule_moves_once_per_update(tmp_path):
    recipe = load_recipe("ppo", make_recipe(tmp_path, learning_rate=1.0, value_learning_rate=2.0))
    policy, value = (
        learning_rates(peak, recipe.lr_scheduler_type, recipe.warmup_steps, 4)
        for peak in (recipe.learning_rate, recipe.value_learning_rate)
    )
    assert policy == pytest.approx([1.0, 0.75, 0.5, 0.25])  # lr (1 - (u - 1) / U)
    assert value == pytest.approx([2.0, 1.5, 1.0, 0.5])


def test_policy_and_value_model_have_the_recipes_optimizer_and_schedule(tmp_path):
    keys = {"optim": "sgd", "optim_args": {"momentum": 0.9}, "learning_rate": 1.0, "value_learning_rate": 2.0}
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.5}}
    run = ppo_run(load_recipe("ppo", make_recipe(tmp_path, adam_epsilon=1e-5, **keys, **schedule)))
    for engine in (run.models.policy, run.models.value):
        assert type(engine.optimizer) is torch.optim.SGD
        assert engine.optimizer.defaults["momentum"] == 0.9
    updates = len(run.learning_rates)
    shares = [1 - update / updates for update in range(updates)]
    expected = [(0.5 + 0.5 * share, 0.5 + 1.5 * share) for share in shares]
    assert run.learning_rates == [pytest.approx(each) for each in expected]


def test_what_a_response_without_eos_is_worth():
    scores, ended = torch.tensor([3.0, 3.0]), torch.tensor([True, False])
    assert missing_eos_scores(scores, ended, 2.0, None).tolist() == [3.0, 1.0]
    assert missing_eos_scores(scores, ended, None, -1.0).tolist() == [3.0, -1.0]
    assert missing_eos_scores(scores, ended, None, None).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("key", "value", "worth"), [("missing_eos_penalty", 0.5, 0.5), ("missing_eos_score", -2.0, -2.0)]
)
def test_a_run_scores_responses_without_eos_so(tmp_path, key, value, worth):
    (tmp_path / "ones_for_test.py").write_text(
        "def one(completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    keys = {"reward_funcs": ["ones_for_test:one"], "missing_eos_penalty": None, key: value}
    rollout = rollout_of(ppo_run(load_recipe("ppo", make_recipe(tmp_path, **keys))))
    assert 0 < int(rollout.ended.sum()) < len(rollout)
    assert rollout.scores.tolist() == [1.0 if ended else worth for ended in rollout.ended.tolist()]


def test_a_response_for_which_the_policy_has_no_position(tmp_path):
    recipe = make_recipe(tmp_path, response_length=254)
    with pytest.raises(UserError, match=r"response_length: the longest prompt has 4 tokens.*max_prompt_length: 2 "):
        run(load_recipe("ppo", recipe))
