"""Reward models that score on the policy's frozen weights by their own adapter and head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, ModernBertDecoderConfig

from align.cli.check.memory import skeleton
from align.cli.check.ppo import scorer_parameters
from align.config.load import load_recipe
from align.config.ppo import PPORecipe
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.generation.scoring import score_ids
from align.models.shared_weights import has_layers_of
from align.ppo.inputs import check_ppo_inputs
from align.ppo.ppo_run import PPORun
from align.ppo.self_checks import run_checks
from align.ppo.step import step
from align.ppo.train import run
from align.reward.train import run as train_reward
from align.runs.fingerprints import same_weights
from align.runs.manifest import open_stage
from align.runs.output_folder import release
from align.runs.own_files import own
from align.sft.train import run as train_sft
from reward_models.heads import Float32Linear, score_head
from reward_models.linear_head import SequenceClassifier
from reward_models.trained import ModelReward
from tests.ppo.runs import ALONE, ppo_run
from tests.ppo.test_train import assert_same_curve, make_recipe, metrics
from tests.ranks import run_stage
from tests.reward.test_train import recipe as reward_recipe
from tests.worlds import deepspeed_file, letter_tokenizer, save_tiny_policy, training_keys

SHORT = {"method": "lora", "lora_r": 4, "value_method": "shared", "total_episodes": 32, "num_ppo_epochs": 1, "eval_steps": 1}  # fmt: skip
IDS = [[5, 6, 28, 28, 2], [7, 2], [3, 4, 9, 10, 11, 28, 2]]
ADAPTED = "adapter and head score on the policy's frozen weights"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A policy, `base`, one of bottleneck adapters on it, and reward models that adapters on it were trained to."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_policy(folder / "base")
    lora = {"method": "lora", "lora_r": 4}
    kinds = {
        "lora": lora,
        "dora": {**lora, "method": "dora"},
        "ia3": {"method": "ia3"},
        "ensemble": {**lora, "ensemble_size": 2, "lora_target_modules": ["embed_tokens", "q_proj"]},
    }
    for name, changes in kinds.items():
        train_reward(reward_recipe(folder, output_dir=str(folder / name), max_steps=2, learning_rate=5e-2, **changes))
    rows = [{"prompt": letter, "completion": "z"} for letter in "abcd"]
    keys = {
        **training_keys("sft", folder, rows, []),
        "output_dir": str(folder / "bottleneck"),
        "max_steps": 1,
        "max_length": 32,
    }
    train_sft(SFTRecipe(**keys, method="bottleneck", bottleneck_size=4))
    return folder


def recipe(folder: Path, world: Path, *rewards: str, **changes) -> PPORecipe:
    return load_recipe("ppo", recipe_file(folder, world, *rewards, **changes))


def recipe_file(folder: Path, world: Path, *rewards: str, **changes) -> str:
    keys = {"sft_model_path": str(world / "base"), "reward_model_path": [str(world / name) for name in rewards]}
    return make_recipe(folder, **{**keys, "reward_funcs": [], **SHORT, **changes})


def apart(world: Path, folder: Path, name: str) -> Path:
    """A copy of a reward model without its adapter: the merged weights alone, which are loaded."""
    return Path(shutil.copytree(world / name, folder / "apart" / name, ignore=shutil.ignore_patterns("adapter")))


def scores_of(source: ModelReward) -> torch.Tensor:
    ids_only = ModelReward(source.name, source.model, batch_size=2, max_length=None)
    return score_ids(ids_only, ALONE, IDS)


def scorers(run: PPORun) -> list[ModelReward]:
    return list(run.models.rewards.models)


def is_on_policy(run: PPORun) -> list[bool]:
    mine = {weight.data_ptr() for weight in run.models.policy.module.parameters()}
    return [next(source.model.parameters()).data_ptr() in mine for source in scorers(run)]


@pytest.fixture(scope="module")
def shared(world, tmp_path_factory) -> PPORun:
    """A run before its first update, whose policy, value model and three reward models have one copy of the weights."""
    names = ["lora", "ensemble"]
    return ppo_run(
        recipe(tmp_path_factory.mktemp("shared"), world, *names, judge_reward_model_path=str(world / "dora"))
    )


class TestScores:
    @pytest.mark.parametrize(("policy", "names"), [("base", ["lora", "ensemble"]), ("bottleneck", ["ia3", "dora"])])
    def test_are_those_of_the_models_loaded_by_themselves(self, world, tmp_path, policy, names):
        changes = {"sft_model_path": str(world / policy)}
        changes |= {"method": "bottleneck", "bottleneck_size": 4} if policy == "bottleneck" else {}
        ours = ppo_run(recipe(tmp_path, world, *names, **changes))
        theirs = ppo_run(recipe(tmp_path, world, *(str(apart(world, tmp_path, name)) for name in names), **changes))
        assert is_on_policy(ours) == [True] * len(scorers(ours))
        assert is_on_policy(theirs) == [False] * len(scorers(ours))
        for mine, other in zip(scorers(ours), scorers(theirs), strict=True):
            assert scores_of(other).std() > 0.1
            # Scores of 1 to 5. Merged weights are rounded to float32, to 6e-8 of their size: 1e-6 to 2e-6 was seen.
            torch.testing.assert_close(scores_of(mine), scores_of(other), atol=5e-6, rtol=0)

    def test_stay_while_the_policy_trains(self, world, tmp_path):
        started = ppo_run(recipe(tmp_path, world, "lora", gradient_checkpointing=True))
        before = scores_of(scorers(started)[0])
        step(started, 0)
        assert any(weight.abs().max() > 0 for name, weight in started.models.policy.module.named_parameters() if "lora_B" in name)  # fmt: skip
        assert torch.equal(scores_of(scorers(started)[0]), before)

    def test_of_another_tokenizer(self, world, tmp_path):
        """Its ids are the policy's in another order, so that texts are tokenized anew."""
        tokenizer = letter_tokenizer()
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = content["model"]["vocab"]
        letters = [token for token in vocabulary if len(token) == 1]
        vocabulary |= dict(zip(letters, [vocabulary[each] for each in reversed(letters)], strict=True))
        scores = []
        for name in ("ours", "theirs"):
            folder = shutil.copytree(world / "lora", tmp_path / name)
            (folder / "tokenizer.json").write_text(json.dumps(content))
            if name == "theirs":
                shutil.rmtree(folder / "adapter")
            started = ppo_run(recipe(tmp_path, world, str(folder)))
            assert not scorers(started)[0].reads_ids
            assert is_on_policy(started) == [name == "ours"]
            run_checks(started)
            step(started, 0)
            scores.append(started.progress.score_moments)
        assert scores[0].mean == pytest.approx(scores[1].mean, abs=1e-5)
        assert scores[0].std == pytest.approx(scores[1].std, abs=1e-5)

    def test_in_bfloat16(self, world, tmp_path):
        """Rounded like those of the merged weights, elsewhere: both are as far from the float32 scores."""
        whole = scores_of(scorers(ppo_run(recipe(tmp_path, world, "lora")))[0])
        ours = ppo_run(recipe(tmp_path, world, "lora", bf16=True))
        theirs = ppo_run(recipe(tmp_path, world, str(apart(world, tmp_path, "lora")), bf16=True))
        assert is_on_policy(ours) == [True]
        assert isinstance(score_head(scorers(ours)[0].model)[1], Float32Linear)
        mine, other = ((scores_of(scorers(each)[0]) - whole).abs().max() for each in (ours, theirs))
        assert 0 < mine < 0.03
        assert 0 < other < 0.03
        checks, _ = run_checks(ours)
        assert all(check.passed for check in checks if "off its record" in check.found)


class TestWeights:
    def test_are_held_once(self, shared):
        models = [shared.models.policy, shared.models.value, *scorers(shared), *shared.models.judge.models]
        modules = [getattr(each, "module", getattr(each, "model", None)) for each in models]
        places = {w.data_ptr(): w.numel() for module in modules for w in module.parameters()}
        of_adapters = sum(
            w.numel()
            for module in modules
            for name, w in module.named_parameters()
            if "lora_" in name or ".score." in name
        )
        whole = sum(w.numel() for name, w in modules[0].named_parameters() if "lora_" not in name)
        assert sum(places.values()) == whole + of_adapters

    def test_align_check_counts_them_once(self, shared, world):
        model = scorers(shared)[0].model
        own = sum(w.numel() for name, w in model.named_parameters() if "lora_" in name or ".score." in name)
        bare = skeleton(SequenceClassifier, model.get_base_model().config, num_labels=1)
        assert scorer_parameters(bare, str(world / "lora" / "adapter")) == own

    def test_the_policys_stay_whatever_an_adapter_of_embeddings_holds(self, world, tmp_path):
        """PEFT saves the embeddings with it, which may be those of no shard, too."""
        folder = Path(shutil.copytree(world / "ensemble" / "member_1", tmp_path / "other"))
        file = folder / "adapter/adapter_model.safetensors"
        weights = load_file(file)
        (name,) = (each for each in weights if "base_layer" in each)
        save_file({**weights, name: weights[name][:0].clone()}, file, {"format": "pt"})
        ours = scorers(ppo_run(recipe(tmp_path, world, str(folder))))[0]
        theirs = scorers(ppo_run(recipe(tmp_path, world, str(apart(world, tmp_path, "ensemble/member_1")))))[0]
        torch.testing.assert_close(scores_of(ours), scores_of(theirs), atol=5e-6, rtol=0)

    def test_scoring_keeps_no_keys_and_values(self, shared):
        for source in scorers(shared):
            assert source.model(input_ids=torch.tensor(IDS[:1])).past_key_values is None

    def test_self_checks_pass(self, shared):
        checks, found = run_checks(shared)
        assert [str(check) for check in checks if check.required and not check.passed] == []
        assert sum("off its record" in check.found for check in checks) == 3
        assert found["self_check/reward_gap"] < 1e-5


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(recipe(folder, world, "lora"))
    return folder / "out"


class TestRuns:
    def test_as_with_weights_of_its_own(self, world, finished, tmp_path):
        run(recipe(tmp_path, world, str(apart(world, tmp_path, "lora"))))
        assert_same_curve(metrics(finished), metrics(tmp_path / "out"))

    def test_the_result_holds_the_policys_adapter_alone(self, world, finished):
        theirs = load_file(world / "lora/adapter/adapter_model.safetensors")
        for folder in (finished, finished / "best", finished / "value"):
            adapter = load_file(folder / "adapter/adapter_model.safetensors")
            head = [name for name in adapter if "score" in name]
            assert len(head) == (2 if folder.name == "value" else 0), head
            assert len(adapter) == len(theirs) - 1 + len(head)
            same = [name for name in adapter if name in theirs and torch.equal(adapter[name], theirs[name])]
            assert same == []
            assert all(
                ".default." not in name and "lora" not in name for name in load_file(folder / "model.safetensors")
            )

    def test_a_resumed_run_goes_on_to_the_bit(self, world, finished, tmp_path):
        path = recipe_file(tmp_path, world, "lora", save_steps=1)
        with mock.patch("align.ppo.train.save_if_due", side_effect=_save_and_die), pytest.raises(KeyboardInterrupt):
            run(load_recipe("ppo", path))
        run(load_recipe("ppo", path))
        assert_same_curve(metrics(finished), metrics(tmp_path / "out"), tolerance=0)
        ours, theirs = (load_file(f / "model.safetensors") for f in (finished, tmp_path / "out"))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_two_ranks_at_zero_3(self, world, finished, tmp_path):
        file = deepspeed_file(tmp_path / "ds.json", 3)
        done = run_stage("ppo", recipe_file(tmp_path, world, "lora", deepspeed=file))
        assert done.returncode == 0, done.stderr[-3000:]
        assert ADAPTED in done.stderr
        assert_same_curve(metrics(finished), metrics(tmp_path / "out"))


def _save_and_die(started: PPORun, done: int) -> None:
    from align.ppo.checkpoint import save_if_due

    save_if_due(started, done)
    raise KeyboardInterrupt


class TestApart:
    def test_the_same_weights_by_their_files_or_commit(self):
        one = {"files": {"model.safetensors": "a", "config.json": "x"}}
        assert same_weights(one, {"files": {"renamed.safetensors": "a", "config.json": "y"}})
        assert not same_weights(one, {"files": {"model.safetensors": "b", "config.json": "x"}})
        assert not same_weights({"files": {"config.json": "x"}}, {"files": {"config.json": "x"}})
        assert same_weights({"revision": "1"}, {"revision": "1", "manifest": "m"})
        assert not same_weights({"revision": "1"}, {"revision": "2"})
        assert not same_weights({}, {})
        assert not same_weights(one, {"revision": "1"})

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"method": "full", "value_method": "full", "lora_r": 16}, None),
            ({"sft_model_path": "another"}, "it was not trained from sft_model_path"),
            ({"reward_deepspeed": "ds.json"}, "reward_deepspeed is for them"),
        ],
    )
    def test_the_reason_is_told(self, world, tmp_path, changes, words):
        save_tiny_policy(tmp_path / "another", seed=7)
        deepspeed_file(tmp_path / "ds.json", 2)
        changes = {key: str(tmp_path / value) if key in ("sft_model_path", "reward_deepspeed") else value for key, value in changes.items()}  # fmt: skip
        inputs = check_ppo_inputs(recipe(tmp_path, world, "lora", **changes))
        line = inputs.describe_heads(True)[0]
        assert inputs.on_policy == {}
        assert line.endswith(f"although it has an adapter, since {words}" if words else "its head is score"), line

    def test_layers_between_backbone_and_head(self):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        for config, shares in (
            (ModernBertDecoderConfig(**sizes, num_labels=1), False),
            (LlamaConfig(**sizes, num_labels=1), True),
        ):
            assert has_layers_of(SequenceClassifier.skeleton(config), config) == shares

    @pytest.mark.parametrize("name", ["base", "lora"])
    def test_a_configuration_that_was_edited(self, world, tmp_path, name):
        """Of the model that both started from, or of the reward model: each computes by its own."""
        for each in ("base", "lora"):
            shutil.copytree(world / each, tmp_path / each)
        file = tmp_path / name / "config.json"
        file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
        inputs = check_ppo_inputs(recipe(tmp_path, tmp_path, "lora"))
        assert inputs.on_policy == {}
        assert "rms_norm_eps in config.json is another" in inputs.describe_heads(True)[0]

    def test_rounded_weights_in_float32(self, world, tmp_path):
        """The scores of what was saved in bfloat16 are others than those of its adapter, beyond rounding in float32."""
        folder = shutil.copytree(world / "lora", tmp_path / "rounded")
        file = folder / "model.safetensors"
        save_file({name: each.bfloat16() for name, each in load_file(file).items()}, file, {"format": "pt"})
        for bf16, line in ((False, "since they were rounded when they were saved"), (True, ADAPTED)):
            inputs = check_ppo_inputs(recipe(tmp_path, world, str(folder), bf16=bf16))
            assert line in inputs.describe_heads(True)[0]
        save_file({name: each.half() for name, each in load_file(file).items()}, file, {"format": "pt"})
        inputs = check_ppo_inputs(recipe(tmp_path, world, str(folder)))
        assert "since they were rounded when they were saved" in inputs.describe_heads(True)[0]

    def test_a_damaged_adapter(self, world, tmp_path):
        folder = shutil.copytree(world / "lora", tmp_path / "damaged")
        given = recipe(tmp_path, world, str(folder))
        weights, settings = (folder / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json"))
        kept, text = load_file(weights), settings.read_text()
        name, first = next(iter(kept.items()))
        for changed, words in (
            (
                {each: kept[each] for each in [*kept][1:]},
                "damaged/adapter: does not fit the model that it was trained on",
            ),
            (
                {**kept, name: first[:, :-1].contiguous()},
                "damaged/adapter: does not fit the model that it was trained on",
            ),
            ({**kept, name: first * float("nan")}, "damaged/adapter: the weights hold NaN or infinity, in .*lora_A"),
        ):
            save_file(changed, weights, {"format": "pt"})
            with pytest.raises(UserError, match=words):
                ppo_run(given)
        save_file(kept, weights, {"format": "pt"})
        for content, words in (
            (text[:40], r"reward_model_path: .*adapter_config.json: not valid JSON"),
            (text.replace('"peft_type": "LORA"', '"peft_type": "MAGIC"'), "damaged/adapter: does not fit the model"),
            (text.replace('"megatron_config": null', '"megatron_config": {"a": 1}'), "megatron_config: expected null"),
        ):
            settings.write_text(content)
            with pytest.raises(UserError, match=words):
                check_ppo_inputs(given)
        settings.write_text(text)
        weights.rename(folder / "adapter" / "adapter_model.bin")
        with pytest.raises(
            UserError, match=r"reward_model_path: .*adapter_model.bin: a pickle, which could run any program"
        ):
            check_ppo_inputs(given)

    def test_an_adapter_that_changed_while_the_run_was_stopped(self, world, tmp_path):
        folder = shutil.copytree(world / "lora", tmp_path / "changed")
        given = recipe(tmp_path, world, str(folder))
        open_stage(given)
        own(tmp_path / "out/checkpoint-1").mkdir()
        (tmp_path / "out/checkpoint-1/complete.json").write_text("{}")
        release(tmp_path / "out")
        file = folder / "adapter/adapter_model.safetensors"
        save_file({name: each + 1 for name, each in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(UserError, match=r"reward_model_path.adapter \(adapter_model.safetensors has other content"):
            open_stage(given)
