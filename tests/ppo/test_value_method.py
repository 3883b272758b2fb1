"""`value_method`: a value model that trains adapters and its head on frozen weights, its own or the policy's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, GPT2Config, GPT2LMHeadModel

from align.cli.check.memory import skeleton
from align.cli.check.ppo import value_footprint
from align.config.load import load_recipe
from align.config.ppo import PPORecipe
from align.errors import UserError
from align.ppo.ppo_run import PPORun
from align.ppo.step import step
from align.ppo.train import run
from reward_models.linear_head import TokenClassifier
from tests.ppo.runs import ppo_run, rollout_of
from tests.ppo.test_train import assert_same_curve, make_recipe, metrics
from tests.ranks import run_stage
from tests.worlds import deepspeed_file, letter_tokenizer

SHORT = {"method": "lora", "lora_r": 4, "total_episodes": 48, "num_ppo_epochs": 1, "eval_steps": 3}


def recipe(folder: Path, value_method: str, **changes) -> PPORecipe:
    return load_recipe("ppo", make_recipe(folder, value_method=value_method, **SHORT | changes))


def value_weights(run: PPORun) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in run.models.value.module.named_parameters()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Path]:
    """Whole runs with either, `lora` on a copy of the SFT model's weights."""
    folders = {}
    for name in ("lora", "shared"):
        folder = tmp_path_factory.mktemp(name)
        start = {"value_model_path": str(folder / "policy")} if name == "lora" else {}
        run(recipe(folder, name, **start))
        folders[name] = folder / "out"
    return folders


def test_shared_weights_train_as_weights_of_its_own(alone):
    """To the bit: the two runs compute the same, on the same memory or on two copies."""
    assert_same_curve(metrics(alone["lora"]), metrics(alone["shared"]), tolerance=0)
    for file in ("model.safetensors", "value/model.safetensors", "value/adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(alone[name] / file) for name in ("lora", "shared"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file
    assert AutoModelForTokenClassification.from_pretrained(alone["shared"] / "value").num_labels == 1


@pytest.mark.parametrize("value_method", ["lora", "shared"])
def test_two_ranks_at_zero_3(alone, tmp_path, value_method):
    start = {"value_model_path": str(tmp_path / "policy")} if value_method == "lora" else {}
    path = make_recipe(
        tmp_path, value_method=value_method, deepspeed=deepspeed_file(tmp_path / "ds.json", 3), **SHORT, **start
    )
    done = run_stage("ppo", path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_curve(metrics(alone[value_method]), metrics(tmp_path / "out"))
    ours, theirs = (load_file(f / "value/model.safetensors") for f in (alone[value_method], tmp_path / "out"))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=0)


class TestInOneProcess:
    """One run with weights that are shared: what it holds, trains and restores."""

    @pytest.fixture(scope="class")
    def shared(self, tmp_path_factory) -> tuple[PPORun, dict[str, torch.Tensor], dict[str, torch.Tensor], Path]:
        """The run after two updates, its value model before them, after one, and the checkpoint then."""
        folder = tmp_path_factory.mktemp("shared")
        started = ppo_run(recipe(folder, "shared"))
        before = value_weights(started)
        step(started, 0)
        for name, engine in (("policy", started.models.policy), ("value", started.models.value)):
            engine.save_checkpoint(folder / name)
        after_one = value_weights(started)
        step(started, 1)
        return started, before, after_one, folder

    def test_the_weights_are_held_once(self, shared):
        policy, value = (shared[0].models.policy.module, shared[0].models.value.module)
        places = {each.data_ptr(): each.numel() for module in (policy, value) for each in module.parameters()}
        of_value = sum(w.numel() for name, w in value.named_parameters() if "lora_" in name or ".score." in name)
        assert sum(places.values()) == sum(w.numel() for w in policy.parameters()) + of_value
        bare = skeleton(TokenClassifier, policy.get_base_model().config, num_labels=1)
        assert value_footprint(bare, shared[0].recipe).parameters == of_value, "what align check counts"

    def test_adapters_and_head_train_and_nothing_else(self, shared):
        started, before, _, _ = shared
        after = value_weights(started)
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        trained = {name for name, weight in started.models.value.module.named_parameters() if weight.requires_grad}
        assert changed == trained
        assert {name for name in after if "lora_" in name or "modules_to_save" in name} == trained

    def test_the_policys_adapter_is_another(self, shared):
        policy = dict(shared[0].models.policy.module.named_parameters())
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
        assert not torch.equal(policy[name], value_weights(shared[0])[name])

    def test_a_resumed_run_goes_on_to_the_bit(self, shared):
        started, _, after_one, folder = shared
        resumed = ppo_run(recipe(folder, "shared"))
        resumed.progress.sampler_gap = started.progress.sampler_gap
        for name, engine in (("policy", resumed.models.policy), ("value", resumed.models.value)):
            engine.load_checkpoint(folder / name)
        assert all(torch.equal(after_one[name], weight) for name, weight in value_weights(resumed).items())
        step(resumed, 1)
        ours, theirs = value_weights(started), value_weights(resumed)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_recomputed_activations_change_nothing(self, shared, tmp_path):
        cheap = ppo_run(recipe(tmp_path, "shared", gradient_checkpointing=True))
        step(cheap, 0)
        for name, weight in value_weights(cheap).items():
            torch.testing.assert_close(weight, shared[2][name], atol=1e-6, rtol=0)


def test_first_values_are_those_of_the_whole_model(alone, tmp_path):
    """New adapters are the identity: before training, values are those of the model that the adapters are on."""
    start = str(alone["lora"] / "value")
    whole, adapted = (ppo_run(recipe(tmp_path, method, value_model_path=start)) for method in ("full", "lora"))
    values = [rollout_of(each).values for each in (whole, adapted)]
    assert values[0].abs().max() > 0
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "full"}, r"value_method: shared needs a policy whose weights stay frozen, got method: full"),
        ({"value_model_path": "policy"}, r"value_model_path: with value_method: shared .* starts from the policy"),
        ({"value_deepspeed": "ds.json"}, r"value_deepspeed: with value_method: shared .* has the policy's engine"),
        ({"advantage_estimator": "rloo", "num_generations": 2}, r"value_method: .*rloo has no value model"),
    ],
)
def test_what_cannot_be(tmp_path, changes, words):
    deepspeed_file(tmp_path / "ds.json", 2)
    changes = {name: str(tmp_path / value) if name.startswith("value_") else value for name, value in changes.items()}
    with pytest.raises(UserError, match=words):
        recipe(tmp_path, "shared", **changes)


def test_a_module_that_the_value_model_lacks_is_named(tmp_path):
    """Before its weights are loaded: the value model is of another architecture than the policy."""
    start = str(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=29, n_embd=32, n_layer=1, n_head=4)).save_pretrained(start)
    letter_tokenizer().save_pretrained(start)
    changes = {"lora_target_modules": ["q_proj"], "value_model_path": start}
    with pytest.raises(UserError, match=r"lora_target_modules: 'q_proj' is not in this model"):
        run(recipe(tmp_path, "lora", **changes))
