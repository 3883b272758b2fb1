"""The stages from Python: a recipe object, a dict or a path give the same run, and dicts are as strict as files."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import warnings

import numpy as np
import pytest
import torch
import yaml

from align import encoders, evaluate, ppo, reward, sft
from align.config.data_source import DataSource
from align.config.encoders import ClassifyRecipe, MLMRecipe
from align.config.evaluate import EvaluateRecipe
from align.config.extraction import QuestionAnsweringRecipe, TokenClassificationRecipe
from align.config.load import as_recipe
from align.config.ppo import PPORecipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.runs import launch
from align.runs.manifest import read_manifest
from tests.worlds import deepspeed_file, save_tiny_policy, trained, write_jsonl

ROWS = [{"prompt": a, "completion": b} for a, b in zip("abcdefgh", "bcdefgha", strict=True)]


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """The keys of a small SFT run; paths are relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    save_tiny_policy(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    yield {
        "model_name_or_path": "model",
        "train_dataset": "rows.jsonl",
        "eval_fraction": 0.25,
        "max_length": 16,
        "train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def test_a_run_from_a_dict_an_object_and_a_path(keys, tmp_path):
    from_dict = sft.run({**keys, "output_dir": "dict"})
    recipe = SFTRecipe(**{**keys, "train_dataset": [DataSource(path="rows.jsonl")]}, output_dir="object")
    from_object = sft.run(recipe)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "r.yaml").write_text(yaml.safe_dump({**keys, "output_dir": "path"}), encoding="utf-8")
    from_path = sft.run(tmp_path / "r" / "r.yaml")
    assert [each.output_dir for each in (from_dict, from_object, from_path)] == ["dict", "object", "path"]
    for other in (from_object, from_path):
        assert dataclasses.replace(other, output_dir="dict") == from_dict
        weights = trained(dataclasses.replace(recipe, output_dir=other.output_dir))
        expected = trained(dataclasses.replace(recipe, output_dir="dict"))
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    assert from_dict.steps == 2
    measure, before, after = from_dict.table[0]
    assert measure == "held-out loss (nats/token)"
    assert (before, after) == (from_dict.metrics["eval_loss_before"], from_dict.metrics["eval_loss"])
    assert from_dict.metrics["eval_perplexity"] == pytest.approx(math.exp(after))
    stored = read_manifest("dict")["results"]
    assert stored == {
        "steps": 2,
        "trained_parameters": from_dict.trained_parameters,
        "table": [list(row) for row in from_dict.table],
        **from_dict.metrics,
    }
    assert sft.run({**keys, "output_dir": "dict"}) == from_dict, "the finished run"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rat": 1e-3}, "learning_rat: unknown key; did you mean 'learning_rate'?"),
        ({"kl_coef": 1}, "kl_coef: unknown key; it belongs to the ppo stage, but this recipe is for sft"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5 (a number)"),
        ({"train_batch_size": 0}, "train_batch_size: expected a number at least 1, got 0"),
        ({"stage": "ppo"}, "stage: expected 'sft', got 'ppo'; run `align ppo RECIPE`."),
        ({"train_dataset": {"pth": "a"}}, "train_dataset.pth: unknown key; did you mean 'path'?"),
    ],
)
def test_a_wrong_key_is_one_error(keys, changes, said):
    for given, more in (({**keys, "output_dir": "out", **changes}, {}), ({**keys, "output_dir": "out"}, changes)):
        with pytest.raises(UserError) as error:
            sft.run(given, **more)
        assert str(error.value) == said
    assert not os.path.exists("out")


def test_each_function_takes_the_recipes_of_its_stage(keys, monkeypatch):
    monkeypatch.setattr(launch, "quiet", lambda: None)
    given = []
    for module in (
        "align.reward.train",
        "align.ppo.train",
        "align.encoders.classify",
        "align.encoders.mlm",
        "align.encoders.token_classification",
        "align.encoders.question_answering",
    ):
        monkeypatch.setattr(f"{module}.run", given.append)
    monkeypatch.setattr("align.evaluate.compare.run", given.append)
    shared = {"output_dir": "out", "train_dataset": "rows.jsonl", "seed": 3}
    reward.run({**shared, "model_name_or_path": "model"}, seed=4)
    ppo.run({**shared, "sft_model_path": "model", "reward_model_path": "rm"}, seed=4)
    encoders.run_classify({**shared, "model_name_or_path": "model"}, seed=4)
    encoders.run_mlm({**shared, "model_name_or_path": "model"}, seed=4)
    encoders.run_token_classification({**shared, "model_name_or_path": "model"}, seed=4)
    encoders.run_question_answering({**shared, "model_name_or_path": "model"}, seed=4)
    evaluate.run({**shared, "models": ["a/x", "b/y"]}, seed=4)
    assert [type(each) for each in given] == [
        RewardRecipe,
        PPORecipe,
        ClassifyRecipe,
        MLMRecipe,
        TokenClassificationRecipe,
        QuestionAnsweringRecipe,
        EvaluateRecipe,
    ]
    stages = ["reward", "ppo", "classify", "mlm", "token-classification", "question-answering", "evaluate"]
    assert [each.stage for each in given] == stages
    assert {each.seed for each in given} == {4}
    assert given[-1].models == {"x": "a/x", "y": "b/y"}
    with pytest.raises(UserError, match="recipe: expected PPORecipe, a mapping of its keys or the path of a YAML file, got RewardRecipe"):  # fmt: skip
        ppo.run(given[0])


class TestOneProcess:
    """Several recipes in one program, which goes on after them."""

    @pytest.fixture
    def ppo_keys(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        save_tiny_policy(tmp_path / "policy")
        write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": letter} for letter in "abcdefgh"])
        return {
            "sft_model_path": str(tmp_path / "policy"), "train_dataset": str(tmp_path / "prompts.jsonl"),
            "reward_funcs": ["rules_of_two:score"], "eval_fraction": 0.25, "total_episodes": 4, "rollout_batch_size": 4,
            "minibatch_size": 4, "num_ppo_epochs": 1, "response_length": 3, "skip_self_checks": True,
        }  # fmt: skip

    def test_each_recipe_gets_the_functions_beside_it_as_they_are_now(self, ppo_keys, tmp_path):
        def score(folder: str, worth: float, output: str) -> float:
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "rules_of_two.py").write_text(
                f"def score(completions, **columns):\n    return [{worth}] * len(completions)\n"
            )
            path = tmp_path / folder / "r.yaml"
            path.write_text(yaml.safe_dump({**ppo_keys, "output_dir": str(tmp_path / output)}))
            return ppo.run(path).metrics["eval/score"]

        assert score("a", 1.0, "out1") == 1.0
        assert score("b", 2.25, "out2") == 2.25
        assert score("a", 3.5, "out3") == 3.5, "edited since"

    def test_deepspeed_is_left_to_processes_of_its_own(self, ppo_keys, tmp_path):
        file = deepspeed_file(tmp_path / "ds.json", 2)
        for key in ("deepspeed", "value_deepspeed"):
            with pytest.raises(UserError, match=f"{key}: a stage that is called from Python runs without DeepSpeed"):
                ppo.run(ppo_keys, output_dir="out", **{key: file})
        assert not (tmp_path / "out").exists()

    def test_several_gpus_that_torch_uses_already_are_refused(self, ppo_keys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(UserError, match=r"uses one GPU, and torch already sees 2 .* set CUDA_VISIBLE_DEVICES"):
            ppo.run(ppo_keys, output_dir="out")

    def test_the_programs_own_settings_are_as_before(self, ppo_keys, monkeypatch):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        filters = list(warnings.filters)
        ppo_keys["reward_funcs"] = ["no_such_module:score"]
        with pytest.raises(UserError, match="no_such_module"):
            ppo.run(ppo_keys, output_dir="out")
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
        assert warnings.filters == filters
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        with pytest.raises(UserError, match="no_such_module"):
            ppo.run(ppo_keys, output_dir="out")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,0"


def test_values_of_a_program_are_taken_as_yaml_would_give_them(tmp_path):
    recipe = as_recipe(
        EvaluateRecipe,
        {"output_dir": tmp_path / "out", "models": [tmp_path / "a", "b"], "eval_dataset": tmp_path / "rows.jsonl"},
        num_shots=(0,), max_new_tokens=np.int64(7),
    )  # fmt: skip
    assert recipe.output_dir == str(tmp_path / "out")
    assert recipe.models == {"a": str(tmp_path / "a"), "b": "b"}
    assert recipe.num_shots == [0]
    assert type(recipe.max_new_tokens) is int


def test_a_recipe_of_another_stage_is_named_before_its_keys(tmp_path):
    (tmp_path / "r.yaml").write_text("stage: ppo\nsft_model_path: x\n")
    with pytest.raises(UserError, match=r"r.yaml:1: stage: expected 'sft', got 'ppo'; run `align ppo "):
        sft.run(tmp_path / "r.yaml")
