"""The stages from Python: a recipe object, a dict or a path give the same run, and dicts are as strict as files."""

from __future__ import annotations

import dataclasses
import math
import os
import sys

import pytest
import torch
import yaml

from align import encoders, evaluate, ppo, reward, sft
from align.config.data_source import DataSource
from align.config.encoders import ClassifyRecipe, MLMRecipe
from align.config.evaluate import EvaluateRecipe
from align.config.ppo import PPORecipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.runs import launch
from align.runs.manifest import read_manifest
from tests.worlds import save_tiny_policy, trained, write_jsonl

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
        ({"kl_coef": 1}, "kl_coef: unknown key; it belongs to the ppo stage, and this is sft"),
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
    for module in ("align.reward.train", "align.ppo.train", "align.encoders.classify", "align.encoders.mlm"):
        monkeypatch.setattr(f"{module}.run", given.append)
    monkeypatch.setattr("align.evaluate.compare.run", given.append)
    shared = {"output_dir": "out", "train_dataset": "rows.jsonl", "seed": 3}
    reward.run({**shared, "model_name_or_path": "model"}, seed=4)
    ppo.run({**shared, "sft_model_path": "model", "reward_model_path": "rm"}, seed=4)
    encoders.run_classify({**shared, "model_name_or_path": "model"}, seed=4)
    encoders.run_mlm({**shared, "model_name_or_path": "model"}, seed=4)
    evaluate.run({**shared, "models": ["a/x", "b/y"]}, seed=4)
    assert [type(each) for each in given] == [RewardRecipe, PPORecipe, ClassifyRecipe, MLMRecipe, EvaluateRecipe]
    assert [each.stage for each in given] == ["reward", "ppo", "classify", "mlm", "evaluate"]
    assert {each.seed for each in given} == {4}
    assert given[-1].models == {"x": "a/x", "y": "b/y"}
    with pytest.raises(UserError, match="recipe: expected a PPORecipe, a mapping of its keys or the path of a YAML file, got a RewardRecipe"):  # fmt: skip
        ppo.run(given[0])
