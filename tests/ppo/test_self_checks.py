"""Faults put into real PPO runs: which self-check finds each, what a sound run says, and what a bad minibatch leaves."""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, LlamaForTokenClassification

from align.config.load import load_recipe
from align.engine.distributed import World
from align.engine.engine import Engine
from align.errors import UserError
from align.evaluate import reward_model
from align.generation import generate as generation
from align.generation.sampling import generator
from align.generation.sampling import sample_token as rollout_sample
from align.maths.losses import token_logprobs
from align.models import forward
from align.models import load as align_models
from align.models.forward import response_logprobs
from align.models.load import load_policy
from align.models.trainable import add_adapter
from align.ppo import checkpoint, sample
from align.ppo import setup as ppo_setup
from align.ppo import update as ppo_update
from align.ppo.collapse import CollapseWatch
from align.ppo.inputs import PPOInputs
from align.ppo.kl_permitted import describe_kl_coef, permitted_kl, score_stds
from align.ppo.ppo_run import Progress
from align.ppo.rollout import Rollout
from align.ppo.self_check_limits import (
    FLOAT32,
    beats_chance,
    below_ceiling,
    describe_endings,
    generation_matches_training,
    reference_matches_policy,
    responses_terminate,
    scores_vary,
)
from align.ppo.train import run
from align.ppo.update import optimize
from align.runs.files import finite
from align.runs.manifest import open_stage
from align.runs.output_folder import release
from reward_models.heads import score_head
from reward_models.trained import ModelReward
from tests import ranks
from tests.engine.discard_worker import discard_at_each_stage
from tests.ppo.runs import ppo_run
from tests.ppo.test_rewards import SCORE_MEAN, save_decoder_reward, save_encoder_reward
from tests.ppo.test_train import assert_same_curve, make_recipe, metrics
from tests.worlds import deepspeed_file, letter_tokenizer, manifest, tiny_llama

ALONE = World(0, 1, torch.device("cpu"))


def start(folder: Path, **changes) -> dict:
    """A PPO run of one update."""
    changes = {"total_episodes": 16, "eval_steps": None, "save_steps": 100, **changes}
    return run(load_recipe("ppo", make_recipe(folder, **changes)))


def refused(folder: Path, **changes) -> str:
    """What a run that fails its self-checks says; no step was taken."""
    with pytest.raises(UserError, match=r"self-checks: \d+ of \d+ failed before the first update") as error:
        start(folder, **changes)
    assert not (folder / "out" / "stage.json").exists()
    assert not (folder / "out" / "metrics.jsonl").exists(), "nothing was trained"
    assert "--skip_self_checks" in str(error.value)
    return str(error.value)


def failures(message: str) -> list[str]:
    return message.splitlines()[1:-1]


def recorded_reward(folder: Path, accuracy: float = 0.7, low: float = 0.6) -> str:
    """A reward model with a manifest as its stage writes it."""
    path = save_decoder_reward(folder)
    record(folder, [[3, 4, 5, 2], [3, 6, 2], [7, 8, 2], [7, 9, 10, 11, 2]], accuracy, low)
    return path


def record(folder: Path, ids: list[list[int]], accuracy: float = 0.7, low: float = 0.6) -> None:
    """Write a manifest with the scores that plain transformers gives."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        scores = [float(model(input_ids=torch.tensor([row])).logits) - SCORE_MEAN for row in ids]
    told = manifest(
        "reward",
        recipe={"bf16": False},
        versions={"transformers": "5.0"},
        results={"eval_accuracy": accuracy, "eval_accuracy_low": low, "eval_accuracy_high": 2 * accuracy - low},
        score_check={"ids": ids, "scores": scores},
    )
    (folder / "stage.json").write_text(json.dumps(told))


def rewarded(path: str) -> dict:
    return {"reward_funcs": [], "reward_model_path": path}


def change_weights(path: Path, change) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def endless_policy(folder: Path) -> None:
    """A policy whose hidden states all have the same first number, from which end-of-text takes 50."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight[2, 0] = -50.0
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)


def cold(function):
    """`function` with its argument `temperature` forgotten."""
    place = list(inspect.signature(function).parameters).index("temperature")
    return lambda *args: function(*args[:place], 1.0, *args[place + 1 :])


def cold_chances(logits, noise, temperature):
    """Tokens sampled as they should be, with their log-probabilities at temperature 1."""
    tokens, _ = rollout_sample(logits, noise, temperature)
    return tokens, token_logprobs(logits, tokens, 1.0)


class TestSoundRun:
    def test_it_says_so_in_one_line(self, tmp_path, capsys):
        start(tmp_path, **rewarded(recorded_reward(tmp_path / "reward")))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("self-checks:")]
        for words in ("off its record", "reward accuracy 0.7", "all finite", "KL 0,", "ratio 1,", "generation gap"):
            assert words in line
        first = metrics(tmp_path / "out")[0]
        assert first["self_check/kl"] == 0.0
        assert first["self_check/ratio_gap"] < 1e-5
        assert first["self_check/sampler_gap"] < 1e-5
        assert first["self_check/reward_gap"] < 1e-5
        assert first["self_check/value_gap"] < 1e-5
        assert first["self_check/reward_accuracy"] == 0.7

    def test_it_is_the_run_without_checks_to_the_bit(self, tmp_path, monkeypatch):
        class Short(ModelReward):
            """Reads five tokens, so that responses are cut, which a metric counts."""

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **{**kwargs, "max_length": 5})

        monkeypatch.setattr(reward_model, "ModelReward", Short)
        folders = []
        for skip in (False, True):
            folder = tmp_path / str(skip)
            folder.mkdir()
            reward = save_encoder_reward(folder / "reward")
            start(folder, **rewarded(reward), skip_self_checks=skip, total_episodes=48, eval_steps=1, ema_decay=0.9)
            folders.append(folder / "out")
        for part in (".", "value", "ema"):
            ours, theirs = (load_file(folder / part / "model.safetensors") for folder in folders)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
        checked, unchecked = (metrics(folder) for folder in folders)
        assert checked[0]["objective/truncated"] > 0
        assert_same_curve([without_checks(row) for row in checked], unchecked, tolerance=0)

    @pytest.mark.parametrize(
        "changes", [{"bf16": True}, {"bf16": True, "gradient_checkpointing": True}, {"method": "lora"}, {"method": "lora", "bf16": True}]
    )  # fmt: skip
    def test_precisions_and_adapters_that_are_sound(self, tmp_path, changes):
        """In bfloat16, too, scoring and training make the same pass, and policy and reference are rounded alike."""
        start(tmp_path, **changes)
        first = metrics(tmp_path / "out")[0]
        assert first["self_check/kl"] == 0.0
        assert first["policy/first_ratio"] == pytest.approx(1.0, abs=1e-5)

    def test_a_run_that_first_trains_the_value_model_alone(self, tmp_path):
        start(tmp_path, value_warmup_updates=1)
        assert metrics(tmp_path / "out")[0]["self_check/ratio_gap"] < 1e-5

    def test_a_recorded_reward_model_with_a_tokenizer_of_its_own(self, tmp_path):
        """Its record holds its own ids, to be scored as they are."""
        path = save_encoder_reward(tmp_path / "reward")
        record(tmp_path / "reward", ids=[[2, 5, 3, 6, 3], [2, 5, 3, 7, 8, 3]])
        start(tmp_path, **rewarded(path))
        assert metrics(tmp_path / "out")[0]["self_check/reward_gap"] < 1e-5

    def test_grouped_rows_and_a_rollout_smaller_than_the_check(self, tmp_path):
        start(tmp_path, advantage_estimator="rloo", num_generations=4, rollout_batch_size=4, minibatch_size=4,
              total_episodes=4)  # fmt: skip
        assert "self_check/kl" in metrics(tmp_path / "out")[0]


def without_checks(row: dict) -> dict:
    return {name: value for name, value in row.items() if "self_check" not in name}


def in_bfloat16(path, dtype=None, **settings):
    """The policy as it is, and the reference, for which a dtype is given, stored in bfloat16."""
    return load_policy(path, dtype=torch.float32 if dtype is None else torch.bfloat16, **settings)


class TestFaults:
    def test_dropout_left_on(self, tmp_path, monkeypatch):
        make_recipe(tmp_path)
        config = json.loads((tmp_path / "policy" / "config.json").read_text())
        (tmp_path / "policy" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
        monkeypatch.setattr(align_models, "disable_dropout", lambda model: None)
        message = refused(tmp_path, gradient_checkpointing=True)  # which keeps the model in training mode
        kl, ratio, *_ = failures(message)
        assert "dropout is active" in kl
        assert "dropout is on" in ratio
        assert ") ratio" in ratio

    @pytest.mark.parametrize(
        ("module", "name", "found"),
        [
            (ppo_update, "response_loss", [") ratio"]),
            (generation, "sample_token", [") generation gap"]),
            (sample, "response_logprobs", [") ratio", ") generation gap"]),
        ],
    )
    def test_the_temperature_missing_in_one_forward(self, tmp_path, monkeypatch, module, name, found):
        monkeypatch.setattr(module, name, cold_chances if name == "sample_token" else cold(getattr(module, name)))
        lines = failures(refused(tmp_path))
        assert len(lines) == len(found)
        for line, word in zip(lines, found, strict=True):
            assert word in line
            assert "temperature" in line

    def test_a_mask_that_padding_shines_through(self, tmp_path, monkeypatch):
        """Rollout and training make the same mistake: only other padding, as training has it, brings it to light."""

        def left_open(ids, mask, length):
            places = (F.pad(mask[:, -length:], (ids.shape[1] - length - 1, 1))).flatten().nonzero().squeeze(1)
            return ids, places, ids[:, -length:][mask[:, -length:]]

        monkeypatch.setattr(forward, "strip_padding", left_open)
        message = refused(tmp_path, per_device_train_batch_size=1)
        assert any(") ratio" in line and "padding" in line for line in failures(message))

    def test_a_reference_of_other_precision(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ppo_setup, "load_policy", in_bfloat16)
        (line,) = failures(refused(tmp_path))
        assert "policy and reference" in line
        assert "sft stage" in line

    def test_an_adapter_that_does_not_start_as_the_identity(self, tmp_path, monkeypatch):
        def shifted(model, recipe):
            adapted = add_adapter(model, recipe)
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.01)
            return adapted

        monkeypatch.setattr(ppo_setup, "add_adapter", shifted)
        (line,) = failures(refused(tmp_path, method="lora"))
        assert "KL" in line
        assert "adapter does not start as the identity" in line

    def test_a_value_model_with_dropout(self, tmp_path, monkeypatch):
        reward = recorded_reward(tmp_path / "reward")  # whose head, unlike a new one, gives values other than 0
        config = json.loads((tmp_path / "reward" / "config.json").read_text())
        (tmp_path / "reward" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
        of_others = align_models.disable_dropout
        monkeypatch.setattr(
            align_models,
            "disable_dropout",
            lambda model: None if isinstance(model, LlamaForTokenClassification) else of_others(model),
        )
        (line,) = failures(refused(tmp_path, **rewarded(reward), gradient_checkpointing=True))
        assert "value gap" in line

    def test_a_value_model_that_does_not_start_at_the_scores(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ppo_setup, "start_value_head", lambda value, _: score_head(value)[1].bias.data.zero_())
        (line,) = failures(refused(tmp_path, **rewarded(save_decoder_reward(tmp_path / "reward"))))
        assert SCORE_MEAN == 0.75
        assert re.search(r"values 0\.[78] off the scores", line)  # rounded up or down by the processor's rounding
        assert "name sft_model_path by value_model_path" in line

    def test_reward_weights_that_changed_since_they_were_judged(self, tmp_path):
        reward = recorded_reward(tmp_path / "reward")
        change_weights(tmp_path / "reward", lambda weights: weights["score.weight"].mul_(1.1))
        (line,) = failures(refused(tmp_path, **rewarded(reward)))
        assert "off its record" in line
        assert "go back to the reward stage" in line

    def test_a_reward_model_no_better_than_chance(self, tmp_path):
        reward = recorded_reward(tmp_path / "reward", accuracy=0.45, low=0.4)
        (line,) = failures(refused(tmp_path, **rewarded(reward)))
        assert "reward accuracy 0.45 (0.4 to 0.5)" in line
        assert "go back to the reward stage" in line

    def test_a_reward_model_perhaps_better_than_chance_is_said_and_used(self, tmp_path, capsys):
        start(tmp_path, **rewarded(recorded_reward(tmp_path / "reward", accuracy=0.55, low=0.46)))
        assert "warning: self-check: reward accuracy 0.55 (0.46 to 0.64)" in capsys.readouterr().err

    def test_a_policy_that_never_ends(self, tmp_path):
        endless_policy(tmp_path / "policy")
        (line,) = failures(refused(tmp_path))
        assert "EOS rate 0; expected some of the 16 responses" in line
        assert "Seen: none ended with </s> (2); most frequent last tokens: " in line
        assert "go back to the sft stage" in line

    def test_a_policy_that_gives_nan(self, tmp_path):
        """Its weights are finite, else they would not be loaded, but one of the two logits overflows everywhere."""
        make_recipe(tmp_path)
        large = torch.tensor([[3e38], [-3e38]])
        change_weights(tmp_path / "policy", lambda weights: weights["lm_head.weight"][5:7].copy_(large))
        lines = failures(refused(tmp_path))
        assert "NaN or infinity in sampled_logprobs, old_logprobs, ref_logprobs" in lines[0]
        assert ["EOS rate" in line for line in lines] == [False, True], "what is compared with NaN is left out"

    def test_a_reward_that_is_always_the_same_beside_one_that_is_not(self, tmp_path, capsys):
        (tmp_path / "flat_rule_for_test.py").write_text(
            "def flat(prompts, **columns):\n    return [2.5] * len(prompts)\n"
        )
        start(tmp_path, reward_funcs=["flat_rule_for_test:flat", "rules_for_test:count_a"])
        said = capsys.readouterr().err
        assert "warning: self-check: flat_rule_for_test:flat gave all 16 responses 2.5" in said
        assert "rules_for_test:count_a varies" in said

    def test_a_foreign_reward_model_is_said_not_to_be_checked(self, tmp_path, capsys):
        start(tmp_path, **rewarded(save_decoder_reward(tmp_path / "reward")))
        assert "reward model not checked (no record in its folder)" in capsys.readouterr().err

    def test_skipping_says_what_is_skipped(self, tmp_path, capsys):
        endless_policy(tmp_path / "policy")
        start(tmp_path, skip_self_checks=True)
        said = capsys.readouterr().err
        assert "self-checks: skipped: KL 0, ratio 1" in said
        assert "EOS rate 0;" not in said

    def test_a_resumed_run_is_not_checked_again(self, tmp_path, monkeypatch, capsys):
        recipe = load_recipe("ppo", make_recipe(tmp_path, total_episodes=48, save_steps=1, eval_steps=None))

        def interrupted(*args):
            save(*args)
            raise KeyboardInterrupt

        save = checkpoint.save_checkpoint
        monkeypatch.setattr(checkpoint, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
        monkeypatch.setattr(checkpoint, "save_checkpoint", save)
        capsys.readouterr()
        run(recipe)
        assert "self-checks: not repeated on resuming at update 2" in capsys.readouterr().err
        assert "self_check/kl" in metrics(tmp_path / "out")[0], "the numbers of the first start are kept"


class TestLimits:
    """By hand."""

    @pytest.fixture
    def recipe(self, tmp_path):
        return load_recipe("ppo", make_recipe(tmp_path))

    def test_policy_and_reference_are_equal(self, recipe):
        assert reference_matches_policy(0.0, recipe).passed
        assert not reference_matches_policy(1e-5, recipe).passed
        assert not reference_matches_policy(float("nan"), recipe).passed

    def test_one_token_that_is_far_off_counts_even_if_the_mean_is_small(self):
        assert generation_matches_training(9e-5, 5e-3, FLOAT32).passed
        assert not generation_matches_training(9e-5, 2e-2, FLOAT32).passed
        assert not generation_matches_training(2e-4, 2e-4, FLOAT32).passed

    def test_endings(self, recipe):
        def judged(rate, count):
            check = responses_terminate(rate, count, 8, "", several=False)
            return check.passed, check.required

        assert judged(0.3, 32)[0]
        assert judged(0.29, 32) == (False, False)
        assert judged(0.0, 16) == (False, True)
        assert not judged(0.0, 15)[1], "too few to judge"

    def test_what_ended(self):
        def name(token):
            return f"<{token}>", token < 4

        assert describe_endings([[7, 2], [2, 7], [8, 3], [9, 2]], [True, True, True, True], [2, 3, 1], name) == (
            "2 ended with <2>, 1 ended with <3>, none ended with <1>, 1 with a stop string"
        )
        assert describe_endings([[3, 7], [3, 8], [6, 7]], [False] * 3, [2, 1], name) == (
            "none ended with <2>, none ended with <1>; most frequent last tokens: <7> in 2, <8> in 1; "
            "special tokens in them: <3> in 2"
        )

    def test_pairs(self):
        scores = torch.tensor([2.0, 1.0, 0.0, 3.0])  # one of two in order
        numbers = {"eval_accuracy": 0.6, "eval_accuracy_low": 0.51, "eval_accuracy_high": 0.69}
        assert beats_chance(scores, numbers).passed
        assert "1 of 2" in beats_chance(scores, numbers).found
        assert beats_chance(scores, numbers, " of a/b").found.startswith("reward accuracy of a/b 0.")
        few = (0.5, 0.2, 0.8, False)  # pairs, which rule out nothing
        for accuracy, low, high, stops in ((0.5, 0.45, 0.55, True), (0.55, 0.5, 0.6, False), few):
            interval = {"eval_accuracy": accuracy, "eval_accuracy_low": low, "eval_accuracy_high": high}
            check = beats_chance(scores, {**numbers, **interval})
            assert (check.passed, check.required) == (False, stops)
        assert (beats_chance(scores, {}).passed, beats_chance(scores, {}).required) == (False, False)
        assert beats_chance(torch.tensor([2.0, 1.0]), {}).passed

    def test_an_accuracy_above_what_the_truth_reaches(self):
        told = {"eval_accuracy": 0.88, "eval_accuracy_low": 0.86, "eval_accuracy_high": 0.9}
        (check,) = below_ceiling({**told, "eval_ceiling": 0.57})
        assert (check.passed, check.required) == (False, False)
        assert "reward accuracy 0.88 (0.86 to 0.9); expected at most 0.57" in str(check)
        assert below_ceiling({**told, "eval_ceiling": 0.87}) == [], "within the interval"
        assert below_ceiling(told) == []

    def test_scores_that_differ(self):
        nothing = float("nan")  # the source does not apply to the row
        assert scores_vary("rule", torch.tensor([1.0, 1.0, 2.0])).passed
        assert not scores_vary("rule", torch.tensor([1.0, nothing, 1.0])).passed
        assert scores_vary("rule", torch.tensor([nothing, nothing, 1.0])).passed, "one is too few to judge"


SOUND = {"objective/kl": 8.0, "response/length": 30.0, "response/eos_rate": 0.9, "objective/entropy": 1.5}


class TestCollapse:
    @pytest.fixture
    def watch(self, tmp_path):
        return CollapseWatch(load_recipe("ppo", make_recipe(tmp_path, response_length=53)), Progress(0.0), 0.9)

    def said(self, watch, update, **changes):
        metrics = {**SOUND, **{name.replace("_", "/", 1): n for name, n in changes.items()}}
        return list(watch.warnings(update, metrics).values())

    def test_a_sound_run_hears_nothing(self, watch):
        assert [self.said(watch, update) for update in (1, 2, 3)] == [[], [], []]
        assert self.said(watch, 4, objective_kl=50.0, response_eos_rate=0.45, objective_entropy=0.05) == []

    def test_each_kind_is_said_once_with_its_number(self, watch):
        assert self.said(watch, 1) == []
        (kl,) = self.said(watch, 2, objective_kl=51.0)
        assert kl.startswith("update 2: objective/kl is 51 nats per response, above 50")
        assert "kl_coef" in kl
        (eos,) = self.said(watch, 3, objective_kl=60.0, response_eos_rate=0.04)
        assert "4.0% of the responses end by themselves, where 90.0% did" in eos
        assert "missing_eos_penalty" in eos
        (entropy,) = self.said(watch, 4, objective_entropy=0.04)
        assert "objective/entropy is 0.04 nats" in entropy
        assert self.said(watch, 5, objective_kl=99.0, response_eos_rate=0.0, objective_entropy=0.0) == []

    def test_endings_are_compared_with_the_sft_models_own(self, watch):
        assert self.said(watch, 2, response_length=52.5) == [], "nine in ten end there"
        (length,) = self.said(watch, 3, response_length=52.5, response_eos_rate=0.44)
        assert "mean length is 52.5 of 53 tokens" in length

    def test_an_sft_model_that_seldom_ends_was_told_by_the_self_checks(self, tmp_path):
        rarely = CollapseWatch(load_recipe("ppo", make_recipe(tmp_path)), Progress(0.0), 0.04)
        assert self.said(rarely, 7, response_eos_rate=0.0) == []
        assert self.said(rarely, 8, response_eos_rate=0.5) == []
        assert len(self.said(rarely, 9, response_eos_rate=0.01)) == 1, "it had learned to"

    def test_the_first_rate_that_was_measured_counts(self, tmp_path):
        recipe = load_recipe("ppo", make_recipe(tmp_path))
        assert self.said(CollapseWatch(recipe, Progress(0.0), 0.0, 0.9), 2, response_eos_rate=0.0) == [], (
            "0 is a measurement"
        )
        for rates in ((None, 0.8), (None, None)):
            (length,) = self.said(CollapseWatch(recipe, Progress(0.0), *rates), 2, response_eos_rate=0.3)
            assert f"where {rates[1] or 1.0:.1%} did" in length

    def test_long_responses_and_a_target_may_have_more_kl(self, watch, tmp_path):
        assert self.said(watch, 2, objective_kl=120.0, response_length=128.0) == []
        assert len(self.said(watch, 3, objective_kl=129.0, response_length=128.0)) == 1
        target = CollapseWatch(load_recipe("ppo", make_recipe(tmp_path, kl_target=40.0)), Progress(0.0), 0.9)
        assert self.said(target, 2, objective_kl=79.0) == []
        assert len(self.said(target, 3, objective_kl=81.0)) == 1

    def test_what_the_sft_model_does_anyway_is_not_a_collapse_until_it_was_gone(self, watch):
        assert self.said(watch, 1, objective_entropy=0.01) == []
        assert self.said(watch, 2, objective_entropy=0.02) == []
        assert self.said(watch, 3, objective_entropy=0.5) == []
        assert len(self.said(watch, 4, objective_entropy=0.01)) == 1

    @pytest.mark.parametrize("killed_after", [1, 2, 3, 4])
    def test_a_resumed_run_is_told_what_the_whole_one_is(self, tmp_path, killed_after):
        recipe = load_recipe("ppo", make_recipe(tmp_path))
        updates = [
            {"objective_entropy": 0.01, "response_eos_rate": 0.3},
            {"objective_entropy": 0.01, "response_eos_rate": 0.8},
            {"objective_entropy": 0.01, "response_eos_rate": 0.35, "objective_kl": 99.0},
            {"objective_entropy": 0.01, "objective_kl": 99.0},
            {"objective_entropy": 0.5, "response_eos_rate": 0.1},
            {"objective_entropy": 0.01, "objective_kl": 99.0},
        ]

        def run(killed_after):
            progress = Progress(0.0)
            told = []
            for update, changes in enumerate(updates, 1):
                if update == 1 or update == killed_after + 1:
                    saved = json.loads(json.dumps(finite(asdict(progress))))
                    progress = checkpoint.read_progress(saved, "", "eval/score", held_out=0)
                    watch = CollapseWatch(recipe, progress, 0.2)
                told += self.said(watch, update, **changes)
            return told

        assert [each.split(":")[0] for each in run(0)] == ["update 3", "update 3", "update 6"]
        assert run(killed_after) == run(0)

    def test_an_update_of_the_value_model_alone_has_no_entropy(self, watch):
        assert watch.warnings(2, {name: n for name, n in SOUND.items() if name != "objective/entropy"}) == {}

    def test_a_real_run_says_it(self, tmp_path, capsys):
        """A learning rate a hundred times too high: the policy leaves for one letter and stops ending."""
        start(tmp_path, learning_rate=0.3, kl_coef=0.0, missing_eos_penalty=None, total_episodes=64)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("update ")]
        assert said
        assert len(said) == len({line.split(":")[1].split(" is ")[0] for line in said})


SPIKE = '''
def spike(prompts, completions, **columns):
    """Sound but for one prompt, whose score overflows float32 when it is squared."""
    return [1e30 if prompt == "a" else text.count("a") / 8 for prompt, text in zip(prompts, completions)]
'''


class TestCoefficient:
    """Scores that are normal within a prompt: the best policy at coefficient b is s^2 / 2 b^2 nats away."""

    def test_spreads_over_all_responses_and_within_prompts(self):
        # Prompts with (0, 2) and (4, 4): variance 2.75 over all; within (unbiased) 2 and 0.
        assert score_stds(torch.tensor([0.0, 2.0, 4.0, 4.0]), 2) == pytest.approx((2.75**0.5, 1.0))
        assert score_stds(torch.tensor([0.0, 2.0, 4.0, 4.0, 9.0]), 2)[1] == pytest.approx(1.0), "a prompt by half"

    def test_the_normal_law(self):
        scores = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.7
        weights = torch.softmax(scores / 0.5, dim=0)  # the best policy over these responses, at b 0.5
        kl = float((weights * weights.log()).sum()) + math.log(len(scores))
        assert permitted_kl(0.7, 0.5) == pytest.approx(0.98)
        assert kl == pytest.approx(0.98, rel=0.03)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"kl_coef": 0.2, "normalize_scores": False}, "0.2 score per nat; .* it permits about 0.5 nats .*, hardly any change: lower it, or set normalize_scores: true$"),
            ({"kl_coef": 0.2, "normalize_scores": True}, "0.2 standard deviations of the score per nat; .* about 8 nats per response$"),
            ({"kl_coef": 0.8, "normalize_scores": True}, "about 0.5 nats per response, hardly any change: lower it$"),
            ({"kl_coef": 0.01}, "about 2e.02 nats per response, which is hardly a limit: raise it, or set max_kl$"),
            ({"kl_coef": 0.0}, "nothing holds the policy"),
            ({"kl_coef": 0.2, "kl_target": 2.0}, "at most 1.002 times in this run .too little to get there: lower kl_horizon"),
            ({"kl_coef": 0.02, "kl_target": 2.0, "kl_horizon": 10}, r"at most 5.29 times in this run$"),
            ({"kl_coef": 0.2, "kl_target": 50.0}, "to get there: lower kl_horizon"),
            ({"kl_coef": 0.2, "kl_target": 2.0, "kl_horizon": 10}, r"at most 5.29 times in this run$"),
        ],
    )  # fmt: skip
    def test_the_line(self, tmp_path, changes, words):
        recipe = load_recipe("ppo", make_recipe(tmp_path, **changes))
        assert re.search(words, "".join(describe_kl_coef(recipe, spread=0.25, within=0.2)))

    def test_equal_responses(self, tmp_path):
        recipe = load_recipe("ppo", make_recipe(tmp_path))
        assert describe_kl_coef(recipe, spread=0.25, within=0.0)[1].endswith("there is nothing to learn")

    def test_a_run_says_it(self, tmp_path, capsys):
        start(tmp_path, total_episodes=16)
        assert "kl_coef 0.01 score per nat; the SFT model's scores spread by" in capsys.readouterr().err


class TestBadMinibatches:
    def test_a_reward_that_overflows_once_costs_one_minibatch(self, tmp_path):
        (tmp_path / "spike_for_test.py").write_text(SPIKE)
        start(tmp_path, reward_funcs=["spike_for_test:spike"], num_ppo_epochs=1, total_episodes=48)
        rows = [row for row in metrics(tmp_path / "out") if "policy/skipped" in row]
        files = sorted((tmp_path / "out" / "bad_batches").iterdir())
        assert len(rows) == 3
        assert 0 < sum(row["policy/skipped"] for row in rows) == len(files) < 6
        assert all(row["policy/steps"] + row["policy/skipped"] == 2 for row in rows)
        for file in files:
            saved = load_file(file)
            assert saved["scores"].shape == (8,)
            assert saved["scores"].max() == torch.tensor(1e30)
            assert saved["prompt_ids"][saved["scores"].argmax(), -1] == 3, "the prompt a"
            assert saved["mask"].dtype == torch.bool
        weights = load_file(tmp_path / "out" / "model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
        assert any(not torch.equal(weight, before) for weight, before in zip(weights.values(),
                   LlamaForCausalLM.from_pretrained(tmp_path / "policy").state_dict().values(), strict=False))  # fmt: skip

    def test_it_leaves_the_weights_of_a_run_that_never_saw_it(self, tmp_path, monkeypatch):
        """The others' steps, before and after it, are the same to the bit."""
        recipe = load_recipe("ppo", make_recipe(tmp_path, num_ppo_epochs=1, minibatch_size=4))
        order = torch.randperm(16, generator=generator(recipe.seed, "minibatches", 0, 0))
        bad = order[4:8]  # the second of four minibatches
        weights = []
        assert not open_stage(recipe)
        for seen in (True, False):
            ppo = ppo_run(recipe)
            models = ppo.models
            ppo.learning_rates = [(1e-2, 1e-2)]
            given, advantages, returns = poisoned(models.policy, bad)
            if not seen:
                real = ppo_update.accumulate_gradients

                def blind(run, minibatch, *rest, real=real):
                    if minibatch.advantages.isnan().any():  # the minibatch exists in the sums only
                        return {"tokens": float(minibatch.mask.sum()), "policy/loss": float("nan")}
                    return real(run, minibatch, *rest)

                monkeypatch.setattr(ppo_update, "accumulate_gradients", blind)
            measured = optimize(ppo, given, advantages, returns, 0)
            assert (measured["policy/skipped"], measured["policy/steps"]) == (1, 3)
            weights.append([*models.policy.module.parameters(), *models.value.module.parameters()])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))
        assert all(weight.isfinite().all() for weight in weights[0])
        assert (
            load_file(tmp_path / "out" / "bad_batches" / "update-1-minibatch-2.safetensors")["advantages"].isnan().all()
        )
        release(tmp_path / "out")

    def test_a_discard_leaves_nothing_at_any_zero_stage(self, tmp_path):
        done = ranks.run(discard_at_each_stage, tmp_path, log=tmp_path / "rank")
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads((tmp_path / "found.json").read_text())
        assert len(found) == 16
        for case, numbers in found.items():
            assert numbers == {"moved": 0.0, "after": 0.0}, case


def poisoned(policy: Engine, bad: torch.Tensor) -> tuple[Rollout, torch.Tensor, torch.Tensor]:
    """A rollout of 16 with the log-probabilities that the policy gives, and NaN for the advantages of the rows in `bad`."""
    torch.manual_seed(0)
    ids = torch.randint(3, 29, (16, 8))
    mask = torch.ones(16, 4, dtype=torch.bool)
    with torch.no_grad():
        chances = response_logprobs(policy, ids, torch.ones_like(ids, dtype=torch.bool), 4, 0.9)
    advantages = torch.randn(16, 4)
    advantages[bad] = float("nan")
    zeros = torch.zeros(16, 4)
    given = Rollout(
        prompt_ids=ids[:, :4], prompt_mask=mask, response_ids=ids[:, 4:], mask=mask, ended=mask[:, 0],
        sampled_logprobs=chances, old_logprobs=chances, ref_logprobs=chances, values=zeros, scores=zeros[:, 0],
        token_scores=zeros, source_scores=zeros[:, :1], repetition=zeros[:, 0],
    )  # fmt: skip
    return given, advantages, torch.randn(16, 4)


@pytest.mark.slow
def test_two_ranks_at_zero_3_are_checked_and_go_on_as_without(tmp_path):
    curves, weights = [], []
    for skip in (False, True):
        folder = tmp_path / str(skip)
        folder.mkdir()
        recipe = make_recipe(
            folder, **rewarded(recorded_reward(folder / "reward")), deepspeed=deepspeed_file(folder / "ds.json", 3),
            total_episodes=32, eval_steps=None, save_steps=100, skip_self_checks=skip,
        )  # fmt: skip
        done = ranks.run_stage("ppo", recipe)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("self-checks: skipped" if skip else "KL 0, ratio 1,") in done.stderr
        curves.append([without_checks(row) for row in metrics(folder / "out")])
        weights.append(load_file(folder / "out" / "model.safetensors"))
    assert_same_curve(*curves, tolerance=0)
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_reward_model_with_another_tokenizer_is_said():
    own = {"adapter": None, "apart": None}
    rewards = [
        SimpleNamespace(head=SimpleNamespace(name="score"), same_tokenizer=same, **own) for same in (True, False)
    ]
    assert PPOInputs.describe_heads(SimpleNamespace(rewards=rewards, judge=None), value_model=False) == [
        "reward model 1: its head is score",
        "reward model 2: its head is score; its tokenizer is another than the policy's, so it reads responses rendered and "
        "tokenized anew",
    ]
