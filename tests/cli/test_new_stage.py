"""A stage that is one entry in the table, with keys, a rule, a stage function and a check of its own."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from align import __main__ as cli
from align.cli.check import check
from align.cli.check.findings import Context
from align.cli.run import command
from align.cli.steps import read_steps
from align.config.base import TrainerRecipe, check_trainer_rules
from align.config.keys import AT_LEAST_1, Where, key, required
from align.config.load import as_recipe, load_recipe
from align.config.stages import STAGES, Stage, input_models, read_stage
from align.errors import UserError
from align.runs.manifest import is_finished


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyRecipe(TrainerRecipe):
    """`align toy`: counts letters."""

    toy_model: str = required("Model to count with.")
    letters: int = key(3, "Letters to count.", AT_LEAST_1)


def check_toy_rules(recipe: ToyRecipe, where: Where) -> None:
    check_trainer_rules(recipe, where)
    if recipe.letters > recipe.max_length:
        raise UserError(f"{where('letters')}: expected at most max_length, got {recipe.letters}")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy stage in the table, and a folder with a recipe for it; keeps what its modules are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    calls = {"run": [], "check": []}
    module, check_module = types.ModuleType("toy_stage"), types.ModuleType("toy_check")
    module.run = calls["run"].append
    check_module.check = lambda recipe, context: calls["check"].append((recipe, context))
    monkeypatch.setitem(sys.modules, "toy_stage", module)
    monkeypatch.setitem(sys.modules, "toy_check", check_module)
    entry = Stage(
        name="toy",
        recipe=ToyRecipe,
        check_rules=check_toy_rules,
        module="toy_stage",
        check_module="toy_check",
        input_models=("toy_model",),
        methods=("full", "lora"),
    )
    monkeypatch.setitem(STAGES, "toy", entry)
    (tmp_path / "r" / "base").mkdir(parents=True)
    text = "stage: toy\noutput_dir: out\ntrain_dataset: rows.jsonl\ntoy_model: base\n"
    (tmp_path / "r" / "1_toy.yaml").write_text(text, encoding="utf-8")
    return calls


def test_its_help(toy, capsys):
    assert cli.main(["--help"]) == 0
    assert re.search(r"^    toy +counts letters$", capsys.readouterr().out, re.M)
    assert cli.main(["toy", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: align toy RECIPE [--key value ...]\n")
    assert "--letters  <a whole number>  default 3" in said
    assert "--train_batch_size" in said


def test_it_loads_and_runs(toy, tmp_path):
    assert read_stage("r/1_toy.yaml") == "toy"
    assert cli.main(["toy", "r/1_toy.yaml", "--letters", "5"]) == 0
    (recipe,) = toy["run"]
    assert (recipe.stage, recipe.letters) == ("toy", 5)
    assert recipe.toy_model == str(tmp_path / "r" / "base"), "a model beside the recipe"
    assert input_models(recipe) == {"toy_model": recipe.toy_model}
    assert not is_finished(recipe)
    (step,) = read_steps("r", None, ["--letters", "6"])
    assert step.recipe.letters == 6
    assert command(step)[1:] == ["-m", "align", "toy", "r/1_toy.yaml", "--letters", "6"]
    keys = {"output_dir": "out", "train_dataset": "rows.jsonl", "toy_model": "base"}
    assert as_recipe(ToyRecipe, keys, letters=7).letters == 7


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        ("toy", ["--letters", "0"], "--letters: expected a number at least 1, got 0"),
        ("toy", ["--letters", "2000"], "--letters: expected at most max_length, got 2000"),
        ("toy", ["--letter", "1"], "--letter: unknown key; did you mean 'letters'?"),
        ("toy", ["--kl_coef", "1"], "--kl_coef: unknown key; it belongs to the ppo stage, but this recipe is for toy"),
        ("toy", ["--method", "ia3"], "--method: expected one of full, lora in the toy stage, got ia3"),
        ("sft", ["--letters", "1"], "--letters: unknown key; it belongs to the toy stage, but this recipe is for sft"),
    ],
)
def test_its_keys_are_as_strict_as_others(toy, stage, words, said):
    Path("r/sft.yaml").write_text("output_dir: out\ntrain_dataset: a\nmodel_name_or_path: b\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(stage, "r/1_toy.yaml" if stage == "toy" else "r/sft.yaml", words)
    assert said in str(error.value)


def test_it_is_checked(toy, capsys):
    assert check.run("r", 2, ["--letters", "4"]) == 0
    ((recipe, context),) = toy["check"]
    assert recipe.letters == 4
    assert isinstance(context, Context)
    assert (context.num_gpus, context.name) == (2, "1_toy.yaml")
    assert "r/1_toy.yaml (toy)" in capsys.readouterr().out
