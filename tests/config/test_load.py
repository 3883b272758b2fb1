"""Recipes: what is accepted, what is refused and in which words, and how global sizes are laid out."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from align.config.base import StageRecipe
from align.config.data_source import DataSource
from align.config.functions import resolve_function
from align.config.load import as_recipe, load_recipe
from align.config.optimizer import EIGHT_BIT
from align.config.ppo import PPORecipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.config.stages import STAGES, input_models, read_stage
from align.config.unknown_keys import ANY_STAGE, OF_STAGE, SAMPLING
from align.engine.batch_plan import batch_plan
from align.errors import UserError

ZERO2 = str(Path(__file__).parents[2] / "recipes" / "deepspeed" / "zero2.json")
TRAINING = [name for name, stage in STAGES.items() if stage.methods]
MINIMAL = {
    "sft": {"output_dir": "out", "train_dataset": "rows.jsonl", "model_name_or_path": "base"},
    "reward": {"output_dir": "out", "train_dataset": "rows.jsonl", "model_name_or_path": "base"},
    "ppo": {"output_dir": "out", "train_dataset": "rows.jsonl", "sft_model_path": "sft", "reward_model_path": "rm"},
    "classify": {"output_dir": "out", "train_dataset": "rows.jsonl", "model_name_or_path": "base"},
    "mlm": {"output_dir": "out", "train_dataset": "rows.jsonl", "model_name_or_path": "base"},
    "token-classification": {"output_dir": "out", "train_dataset": "rows.jsonl", "model_name_or_path": "base"},
    "question-answering": {"output_dir": "out", "train_dataset": "rows.jsonl", "model_name_or_path": "base"},
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write a recipe (minimal keys plus the given ones, or text) and load it, from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(stage: str, changes: dict | str | None = None, *overrides: str) -> StageRecipe:
        text = changes if isinstance(changes, str) else yaml.safe_dump({**MINIMAL.get(stage, {}), **(changes or {})})
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return load_recipe(stage, "recipe.yaml", overrides)

    return run


def lines(stage: str, *more: str) -> str:
    return "".join(f"{key}: {value}\n" for key, value in MINIMAL[stage].items()) + "".join(f"{line}\n" for line in more)


def refusal(load, stage: str, changes: dict | str | None, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(stage, changes, *overrides)
    return str(error.value)


# --- what is accepted


@pytest.mark.parametrize("stage", TRAINING)
def test_a_minimal_recipe_has_the_defaults_of_its_dataclass(load, stage):
    recipe = load(stage)
    assert type(recipe) is STAGES[stage].recipe
    assert recipe.stage == stage
    assert recipe.train_dataset == [DataSource(path="rows.jsonl")]
    rates = {"reward": 1e-5, "ppo": 3e-6, "mlm": 5e-5}
    assert recipe.learning_rate == rates.get(stage, 2e-5)


def test_numbers_as_yaml_gives_them(load):
    recipe = load("ppo", lines("ppo", "learning_rate: 1e-5", "kl_coef: 0", "warmup_steps: 3", "total_episodes: 2_000"))
    assert (recipe.learning_rate, recipe.kl_coef, recipe.warmup_steps, recipe.total_episodes) == (1e-5, 0.0, 3.0, 2000)
    assert type(recipe.kl_coef) is float  # so that `kl_coef: 0` and `kl_coef: 0.0` are one recipe


def test_arguments_of_optimizer_and_schedule(load):
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-7", "num_cycles": 1}}
    recipe = load("sft", {"optim": "rmsprop", "optim_args": {"centered": True, "eps": "1e-6"}, **schedule})
    assert recipe.optim_args == {"centered": True, "eps": 1e-6}  # YAML takes 1e-6 for text
    assert recipe.lr_scheduler_kwargs == {"min_lr": 1e-7, "num_cycles": 1.0}
    assert load("classify", {"class_weights": {0: 1, True: "2e0"}}).class_weights == {"0": 1.0, "true": 2.0}
    assert load("sft", {"optim": "sgd"}, "--optim_args.momentum", "0.9").optim_args == {"momentum": 0.9}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_the_8_bit_optimizer_without_its_library(load, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert f"optim: {name} needs bitsandbytes; install it by" in refusal(load, "classify", {"optim": name})


def test_null_means_nothing_where_a_key_may_be_left_empty(load):
    recipe = load(
        "sft", {"eval_steps": None, "deepspeed": None, "model_config": None, "lora_target_modules": None, "stage": None}
    )
    assert (recipe.eval_steps, recipe.deepspeed, recipe.model_config, recipe.lora_target_modules) == (
        None,
        None,
        {},
        [],
    )
    assert recipe.stage == "sft"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a.jsonl", [DataSource(path="a.jsonl")]),
        ({"path": "a.jsonl", "weight": 2}, [DataSource(path="a.jsonl", weight=2.0)]),
        (
            ["a.jsonl", {"generator": "m:f", "generator_kwargs": {"n": 3}}],
            [DataSource(path="a.jsonl"), DataSource(generator="m:f", generator_kwargs={"n": 3})],
        ),
    ],
)
def test_forms_of_a_data_source(load, written, expected):
    assert load("sft", {"train_dataset": written}).train_dataset == expected


def test_one_function_needs_no_list(load):
    assert load("ppo", {"reward_funcs": "rewards:truth"}).reward_funcs == ["rewards:truth"]


def test_overrides(load):
    recipe = load(
        "sft", {"bf16": False, "model_config": {"model_type": "llama", "hidden_size": 32}, "model_name_or_path": None, "run_name": "x"},
        "--learning_rate", "1e-6", "--seed=7", "--bf16", "--max-steps", "-1", "--model_config.hidden_size", "64",
        "--run_name", "2024", "--report_to", "none", "--method", "lora", "--lora_target_modules", "q_proj", "v_proj", "--logging_steps", "1", "--logging_steps", "2",
        "--train_dataset.max_rows", "5", "--eval_dataset", "a.jsonl", "b.jsonl",
    )  # fmt: skip
    assert (recipe.learning_rate, recipe.seed, recipe.bf16, recipe.max_steps) == (1e-6, 7, True, -1)
    assert recipe.model_config == {"model_type": "llama", "hidden_size": 64}
    assert (recipe.run_name, recipe.report_to, recipe.logging_steps) == ("2024", "none", 2)
    assert recipe.lora_target_modules == ["q_proj", "v_proj"]
    assert recipe.train_dataset == [DataSource(path="rows.jsonl", max_rows=5)]
    assert recipe.eval_dataset == [DataSource(path="a.jsonl"), DataSource(path="b.jsonl")]


def test_overrides_can_empty_a_key(load):
    recipe = load("sft", {"model_name_or_path": None, "model_config": {"model_type": "llama"}, "eval_steps": 5},
                  "--model_config", "null", "--model_name_or_path", "base", "--eval_steps", "null")  # fmt: skip
    assert (recipe.model_config, recipe.model_name_or_path, recipe.eval_steps) == ({}, "base", None)


def test_paths_are_looked_up_here_then_beside_the_recipe(tmp_path, monkeypatch):
    folder = tmp_path / "recipes" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for place in (tmp_path / "here.jsonl", folder / "here.jsonl", folder / "beside.jsonl", folder / "part-1.csv"):
        place.write_text("", encoding="utf-8")
    (folder / "zero.json").write_text("{}", encoding="utf-8")
    (folder / "r.yaml").write_text(
        "output_dir: out\nmodel_name_or_path: org/model\ndeepspeed: zero.json\n"
        "train_dataset: [here.jsonl, beside.jsonl, part-*.csv, org/data, /gone.jsonl]\n",
        encoding="utf-8",
    )
    recipe = load_recipe("sft", "recipes/mine/r.yaml")
    paths = [source.path for source in recipe.train_dataset]
    assert paths == ["here.jsonl", str(folder / "beside.jsonl"), str(folder / "part-*.csv"), "org/data", "/gone.jsonl"]
    assert (recipe.deepspeed, recipe.model_name_or_path, recipe.output_dir) == (
        str(folder / "zero.json"),
        "org/model",
        "out",
    )


def test_inputs_by_stage(load):
    assert input_models(load("sft")) == {"model_name_or_path": "base"}
    assert input_models(load("reward")) == {"model_name_or_path": "base"}
    assert input_models(load("reward", {"sft_model_path": "sft"})) == {
        "model_name_or_path": "base",
        "sft_model_path": "sft",
    }
    assert input_models(load("ppo")) == {"sft_model_path": "sft", "reward_model_path": "rm"}
    models = load("evaluate", {"output_dir": "out", "models": ["a/x", "b/y"], "eval_dataset": "rows.jsonl"})
    assert input_models(models) == {"x": "a/x", "y": "b/y"}


# --- unknown keys


@pytest.mark.parametrize(
    ("stage", "name", "said"),
    [
        ("sft", "learning_rat", "did you mean 'learning_rate'?"),
        ("sft", "Learning-Rate", "did you mean 'learning_rate'?"),
        ("ppo", "clip_range", "did you mean 'cliprange'?"),
        ("sft", "kl_coef", "it belongs to the ppo stage, but this recipe is for sft"),
        ("ppo", "train_batch_size", "called minibatch_size here"),
        ("sft", "gradient_accumulation_steps", "derived: set train_batch_size"),
        ("ppo", "gradient_accumulation_steps", "derived: set minibatch_size"),
        ("ppo", "num_mini_batches", "set minibatch_size"),
        ("ppo", "local_rollout_forward_batch_size", "called per_device_eval_batch_size here"),
        ("sft", "fp16", "use bf16"),
        ("reward", "push_to_hub", "upload output_dir afterwards"),
        ("ppo", "vf_coef", "set value_learning_rate"),
        ("ppo", "top_p", "another distribution than the one whose log-probabilities PPO compares"),
    ],
)
def test_an_unknown_key_says_what_to_write_instead(load, stage, name, said):
    number = len(MINIMAL[stage]) + 1
    message = refusal(load, stage, lines(stage, f"{name}: 1"))
    assert message.startswith(f"recipe.yaml:{number}: {name}: unknown key; ")
    assert said in message
    if name.islower():
        assert refusal(load, stage, None, f"--{name}", "1").startswith(f"--{name}: unknown key; ")


@pytest.mark.parametrize("name", SAMPLING.split())
def test_no_sampling_key_is_taken(load, name):
    assert "refused: it would sample from another distribution" in refusal(load, "ppo", {name: 1})


def test_a_key_that_resembles_nothing(load):
    assert refusal(load, "sft", lines("sft", "qqqq: 1")) == "recipe.yaml:4: qqqq: unknown key"


@pytest.mark.parametrize("stage", TRAINING)
def test_hints_are_for_keys_that_the_stage_lacks(stage):
    names = {field.name for field in dataclasses.fields(STAGES[stage].recipe)}
    assert not names & {*ANY_STAGE, *OF_STAGE.get(stage, {}), *SAMPLING.split()}


def test_unknown_key_of_a_data_source(load):
    message = refusal(load, "sft", {"train_dataset": [{"path": "a"}, {"pth": "b"}]})
    assert message.endswith("train_dataset[1].pth: unknown key; did you mean 'path'?")


def test_missing_required_key(load):
    message = refusal(load, "reward", "output_dir: out\ntrain_dataset: a\n")
    assert message.startswith("recipe.yaml: model_name_or_path: missing; it is required: SFT model")


# --- types


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed: true", "seed: expected a whole number, got true (true or false)"),
        ("seed: 1.5", "seed: expected a whole number, got 1.5 (a number)"),
        ("seed: 1e3", "seed: expected a whole number, got \"1e3\" (text); write 1000"),
        ("train_batch_size: '32'", "train_batch_size: expected a whole number, got \"32\" (text); write 32"),
        ("learning_rate: true", "learning_rate: expected a number, got true (true or false)"),
        ("learning_rate: fast", "learning_rate: expected a number, got \"fast\" (text)"),
        ("learning_rate: .nan", "learning_rate: expected a number, got NaN (a number)"),
        ("learning_rate: .inf", "learning_rate: expected a number, got Infinity (a number)"),
        ("learning_rate:", "learning_rate: expected a number, got nothing (null); leave the key out to use its default"),
        ("learning_rate: [1]", "learning_rate: expected a number, got [1] (a list)"),
        ("bf16: 1", "bf16: expected true or false, got 1 (a whole number)"),
        ("bf16: 'True'", "bf16: expected true or false, got \"True\" (text); write true without quotes"),
        ("run_name: 7", "run_name: expected text, got 7 (a whole number); put it in quotes"),
        ("deepspeed: None", "deepspeed: expected text, got 'None'; for nothing, write null."),
        ("eval_steps: soon", "eval_steps: expected a whole number, got \"soon\" (text)"),
        ("report_to: wandbb", "report_to: expected one of none, wandb, got \"wandbb\" (text); did you mean 'wandb'?"),
        ("report_to: no", "report_to: expected one of none, wandb, got false (true or false)"),
        ("model_config: llama", "model_config: expected a mapping of names to values, got \"llama\" (text)"),
        ("lora_target_modules: [1]", "lora_target_modules[0]: expected text, got 1 (a whole number); put it in quotes"),
        ("eval_dataset: 3", "eval_dataset: expected a path, a hub id or a mapping with `path` or `generator`, got 3 (a whole number)"),
        ("eval_dataset: {path: a, max_rows: x}", "eval_dataset.max_rows: expected a whole number, got \"x\" (text)"),
        ("eval_dataset: {path: a, columns: {prompt: 1}}", "eval_dataset.columns.prompt: expected text, got 1 (a whole number); put it in quotes"),
    ],
)  # fmt: skip
def test_a_value_of_another_type(load, line, said):
    assert refusal(load, "sft", lines("sft", line)) == f"recipe.yaml:4: {said}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "x"], '--seed: expected a whole number, got "x" (text)'),
        (["--learning_rate"], "--learning_rate: expected one value, got none; quote a value that has spaces"),
        (["--learning_rate", "1", "2"], "--learning_rate: expected one value, got 1 2; quote a value that has spaces"),
        (["1e-5"], "1e-5: expected `--key value` after the recipe, got this word alone"),
        (
            ["--seed.x", "1", "--seed.x.y", "1"],
            "--seed.x: expected one mapping to change a part of, got 1; give all of it",
        ),
        (["--seed.x", "1"], '--seed: expected a whole number, got {"x": 1} (a mapping)'),
    ],
)
def test_a_wrong_override(load, words, said):
    assert refusal(load, "sft", None, *words) == said


# --- the file


def test_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("1_sft.yaml").write_text("stage: sft\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"1_stf.yaml: no such recipe; did you mean '1_sft.yaml'\?"):
        load_recipe("sft", "1_stf.yaml")
    with pytest.raises(UserError, match=r"expected a recipe file, got a folder; `align run \.`"):
        load_recipe("sft", ".")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output_dir: out\nseed: 1\nseed: 2\n", "recipe.yaml:3: seed: written twice, first in line 2; keep one."),
        ("a: {b: 1, b: 2}\n", "recipe.yaml:1: b: written twice, first in line 1; keep one."),
        (
            "output_dir: out\nseed: [1\n",
            "recipe.yaml:3: not readable as YAML: expected ',' or ']', but got '<stream end>'",
        ),
        ("a: b: c\n", "recipe.yaml:1: not readable as YAML: mapping values are not allowed here"),
        ("", "recipe.yaml: expected lines of `key: value`, got an empty file"),
        ("- a\n", "recipe.yaml: expected lines of `key: value`, got a list"),
    ],
)
def test_an_unreadable_file(load, text, said):
    assert refusal(load, "sft", text) == said


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"r.yaml: is in UTF-16; save it in UTF-8"):
        load_recipe("sft", str(tmp_path / "r.yaml"))


def test_the_stage_of_a_recipe(tmp_path, load):
    message = refusal(load, "ppo", {"stage": "sft", "model_name_or_path": "x", "sft_model_path": "y"})
    assert "unknown key" not in message, "the keys of another stage follow from that"
    message = refusal(load, "ppo", {"stage": "sft"})
    assert message.endswith("stage: expected 'ppo', got 'sft'; run `align sft recipe.yaml`.")
    path = tmp_path / "r.yaml"
    for written, expected in [
        ("stage: sft", "sft"),
        ("stage: stf", "did you mean 'sft'?"),
        ("seed: 1", "add a line such as `stage: sft`"),
    ]:
        path.write_text(written, encoding="utf-8")
        if expected == "sft":
            assert read_stage(str(path)) == "sft"
        else:
            with pytest.raises(UserError) as error:
                read_stage(str(path))
            assert expected in str(error.value)


# --- ranges and keys that depend on one another


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ("sft", {"train_batch_size": 0}, "train_batch_size: expected a number at least 1, got 0"),
        ("sft", {"per_device_train_batch_size": 0}, "per_device_train_batch_size: expected a number at least 1, got 0"),
        ("sft", {"save_total_limit": 0}, "save_total_limit: expected a number at least 1, got 0"),
        ("sft", {"learning_rate": 0}, "learning_rate: expected a number above 0, got 0.0"),
        ("ppo", {"value_learning_rate": -1}, "value_learning_rate: expected a number above 0, got -1.0"),
        ("ppo", {"temperature": 0}, "temperature: expected a number above 0"),
        ("ppo", {"cliprange": 0}, "cliprange: expected a number above 0"),
        ("ppo", {"kl_coef": -0.1}, "kl_coef: expected a number at least 0"),
        ("ppo", {"gamma": 1.1}, "gamma: expected a number from 0 to 1, got 1.1"),
        ("ppo", {"lam": -0.1}, "lam: expected a number from 0 to 1"),
        ("sft", {"eval_fraction": 1}, "eval_fraction: expected a number from 0 to below 1"),
        ("sft", {"max_steps": 0}, "max_steps: expected a number -1, or at least 1, got 0"),
        ("sft", {"tokenizer_vocab_size": 258}, "tokenizer_vocab_size: expected a number at least 259"),
        ("sft", {"lr_scheduler_type": "cosin"}, "got 'cosin'; did you mean 'cosine'?"),
        ("sft", {"lr_scheduler_type": "reduce_lr_on_plateau"}, "expected one of linear, cosine,"),
        ("sft", {"lr_scheduler_type": "polynomial", "learning_rate": 1e-7}, "expected more than 1e-07, where"),
        ("ppo", {"lr_scheduler_type": "polynomial", "value_learning_rate": 1e-7}, "value_learning_rate: expected more than 1e-07"),
        ("sft", {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": "1e-3"}}, "learning_rate: expected more than 0.001"),
        ("mlm", {"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type: cosine_with_min_lr needs either min_lr, a learning rate, or min_lr_rate"),
        ("sft", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0.1}}, "got both"),
        ("sft", {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 1}}, "kwargs.min_lr_rate: expected a number from 0 to below 1, got 1.0"),
        ("sft", {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 1}}, "kwargs.num_cycle: not an argument of lr_scheduler_type: cosine; it takes num_cycles; did you mean"),
        ("sft", {"lr_scheduler_kwargs": {"num_cycles": 1}}, "not an argument of lr_scheduler_type: linear; it takes none"),
        ("sft", {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 1.5}}, "expected a number that is whole and at least 1"),
        ("sft", {"lr_scheduler_type": "warmup_stable_decay"}, "needs the length of its decay; write"),
        ("sft", {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "sqrt"}}, "decay_type: expected one of linear, cosine, 1-sqrt, got"),
        ("ppo", {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 999}}, "num_decay_steps: expected at most 156, all updates of the run, got 999"),
        ("classify", {"class_weights": "balance"}, "class_weights: expected balanced or a mapping, got \"balance\" (text); did you mean 'balanced'?"),
        ("classify", {"class_weights": {"a": -1}}, "class_weights.a: expected a number above 0, got -1"),
        ("classify", {"class_weights": {"a": "x"}}, "class_weights.a: expected a number"),
        ("classify", {"class_weights": {}}, "class_weights: expected balanced or a mapping of labels to numbers, got an empty one"),
        ("classify", {"class_weights": "balanced", "balanced_sampling": True}, "balanced_sampling evens out the labels already"),
        ("classify", {"balanced_sampling": True, "train_sampling_strategy": "group_by_length"}, "balanced_sampling has an order of its own"),
        ("sft", {"optim": "sdg"}, "optim: expected one of adamw_torch_fused, adamw_torch,"),
        ("sft", {"optim": "sdg"}, "did you mean 'sgd'?"),
        ("reward", {"optim": "adam"}, "got 'adam'; for Adam or AdamW write adamw_torch"),
        ("classify", {"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1: optim: sgd does not read it, got 0.8; leave it out"),
        ("ppo", {"optim": "adafactor", "adam_epsilon": 1e-8}, "adam_epsilon: optim: adafactor does not read it"),
        ("sft", {"optim_args": {"momentum": 0.9}}, "optim_args.momentum: not an argument of optim: adamw_torch_fused; betas and epsilon are adam_beta1"),
        ("sft", {"optim": "sgd", "optim_args": {"momentun": 0.9}}, "it takes momentum, dampening, nesterov; did you mean 'momentum'?"),
        ("sft", {"optim": "sgd", "optim_args": {"weight_decay": 0.1}}, "weight decay is the key weight_decay"),
        ("sft", {"optim": "sgd", "optim_args": "momentum=0.9"}, "optim_args: expected a mapping of names to values"),
        ("sft", {"optim": "sgd", "optim_args": {"momentum": "much"}}, 'optim_args.momentum: expected a number from 0 to below 1, got "much" (text)'),
        ("sft", {"optim": "sgd", "optim_args": {"nesterov": 1}}, "optim_args.nesterov: expected true or false"),
        ("sft", {"optim": "sgd", "optim_args": {"nesterov": True}}, "nesterov: needs a momentum above 0 and no dampening"),
        ("mlm", {"optim": "adafactor", "deepspeed": ZERO2}, "optim: adafactor steps blocks or whole matrices, which ZeRO 2 ("),
        ("ppo", {"optim": "adafactor", "value_deepspeed": ZERO2}, "or a file with stage 0 as value_deepspeed"),
        ("sft", {"train_dataset": []}, "train_dataset: expected a path, a hub id or a mapping, got nothing"),
        ("sft", {"train_dataset": {"weight": 1}}, "train_dataset[0]: expected either `path` or `generator`, got neither"),
        ("sft", {"train_dataset": {"path": "a", "generator": "m:f"}}, "expected either `path` or `generator`, got both"),
        ("sft", {"train_dataset": {"path": "a", "weight": 0}}, "train_dataset[0].weight: expected a number above 0"),
        ("sft", {"eval_dataset": ["a", {"path": "b", "max_rows": 0}]}, "eval_dataset[1].max_rows: expected a number at least 1"),
        ("sft", {"train_dataset": {"generator": "f"}}, "train_dataset[0].generator: expected `module:function`, got 'f'"),
        ("sft", {"train_dataset": {"path": "a", "columns": {"promt": "q"}}}, "got 'promt'; did you mean 'prompt'?"),
        ("sft", {"tokenizer_vocab_size": 600}, "tokenizer_vocab_size: is of the tokenizer that is made for a model from scratch"),
        ("sft", {"model_config": {"model_type": "llama"}}, "expected either a model to fine-tune, or `model_config` to train one from scratch, got both"),
        ("sft", {"model_name_or_path": None}, "to train one from scratch, got neither"),
        ("sft", {"model_name_or_path": None, "model_config": {"hidden_size": 8}}, "expected a `model_type` such as llama among its keys, got hidden_size"),
        ("ppo", {"rollout_batch_size": 64, "minibatch_size": 24}, "minibatch_size: expected a divisor of rollout_batch_size (64), got 24"),
        ("ppo", {"total_episodes": 63}, "total_episodes: expected at least rollout_batch_size (64), got 63"),
        ("ppo", {"reward_model_path": None}, "expected a reward model, or `reward_funcs`, got neither"),
        ("ppo", {"reward_funcs": "rewards.truth"}, "reward_funcs[0]: expected `module:function`, got 'rewards.truth'"),
        ("ppo", {"reward_funcs": "m:f", "reward_weights": [1]}, "reward_weights: expected 2 weights, one each for rm, m:f, got 1"),
        ("ppo", {"missing_eos_penalty": 1, "missing_eos_score": -1}, "expected only one of missing_eos_penalty (subtracts) and missing_eos_score (replaces), got both"),
        ("sft", {"chat_template_path": "gone.jinja"}, "chat_template_path: no file gone.jinja"),
        ("sft", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs: tools is given to every chat template"),
        ("ppo", {"chat_template_kwargs": "thinking"}, "chat_template_kwargs: expected a mapping of names to values"),
        ("sft", {"deepspeed": "gone.json"}, "deepspeed: gone.json: no such file; see recipes/deepspeed"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(load, stage, changes, said):
    message = refusal(load, stage, changes)
    assert said in message
    assert message.startswith("recipe.yaml:")


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("ppo", {"gamma": 0, "lam": 1, "kl_coef": 0, "minibatch_size": 16, "total_episodes": 64, "num_sample_rows": 0}),
        ("ppo", {"reward_model_path": None, "reward_funcs": ["m:f", "a.b:g"], "reward_weights": [1, -0.5]}),
        ("ppo", {"missing_eos_score": -1}),
        ("sft", {"eval_fraction": 0, "max_steps": 1, "max_grad_norm": 0, "weight_decay": 0}),
        ("sft", {"model_name_or_path": None, "model_config": {"model_type": "llama"}}),
    ],
)
def test_values_at_their_bounds(load, stage, changes):
    load(stage, changes)


def test_every_number_has_a_range():
    free = {"reward_weights", "missing_eos_score"}
    for cls in (*(STAGES[name].recipe for name in TRAINING), DataSource):
        annotations = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            annotation = annotations[field.name]
            if any(kind in (int, float) for kind in (annotation, *getattr(annotation, "__args__", ()))):
                assert (field.metadata["range"] is not None) != (field.name in free), field.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON: "),
        ("[]", "d.json: expected a JSON object, got a list"),
        ('{"fp16": {"enabled": true}}', "d.json switches fp16 on, which is not supported"),
    ],
)
def test_a_wrong_deepspeed_file(load, tmp_path, text, said):
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    assert said in refusal(load, "sft", {"deepspeed": "d.json"})


# --- batch plan


def sft(**changes) -> SFTRecipe:
    return SFTRecipe(output_dir="out", **changes)


def ppo(**changes) -> PPORecipe:
    return PPORecipe(output_dir="out", sft_model_path="sft", **changes)


@pytest.mark.parametrize(
    ("size", "per_device", "world", "micro", "accumulation"),
    [
        (32, 8, 1, 8, 4),
        (32, 8, 2, 8, 2),
        (32, 8, 8, 4, 1),
        (36, 8, 2, 6, 3),  # 18 a process: 6 is its largest divisor up to 8
        (14, 8, 2, 7, 1),
        (22, 8, 2, 1, 11),  # 11 is prime
        (32, 1000, 1, 32, 1),
    ],
)
def test_micro_batch_is_the_largest_divisor_that_fits(size, per_device, world, micro, accumulation):
    plan = batch_plan(sft(train_batch_size=size, per_device_train_batch_size=per_device), world)
    assert (plan.world_size, plan.batch_size, plan.micro_batch_size, plan.accumulation) == (
        world,
        size,
        micro,
        accumulation,
    )
    assert plan.rollout_per_rank is None


def test_ppo_plan_with_text_in_the_same_steps(tmp_path):
    text = [DataSource(path="text.jsonl")]
    plan = batch_plan(
        ppo(
            ptx_dataset=text, ptx_batch_size=20, minibatch_size=48, rollout_batch_size=96, per_device_train_batch_size=4
        ),
        4,
    )
    assert plan.policy_passes == 3 + 2  # 12 a process = 3 x 4, and 5 rows in 2 passes
    with pytest.raises(UserError, match="ptx_batch_size: expected a multiple of the 4 processes, got 6; use 4 or 8"):
        batch_plan(ppo(ptx_dataset=text, ptx_batch_size=6, minibatch_size=48, rollout_batch_size=96), 4)


def test_ppo_plan():
    plan = batch_plan(
        ppo(total_episodes=1000, rollout_batch_size=96, minibatch_size=48, per_device_train_batch_size=10), 4
    )
    assert dataclasses.astuple(plan) == (4, 48, 6, 2, 24, 10, 0, 1, None)  # 12 a process = 2 x 6; 1000 // 96 updates
    assert plan.describe() == (
        "48 sequences per step = 4 x 6 x 2 (processes x micro-batch x accumulation), 10 updates of 4 x 24 responses (processes x responses)"
    )


def test_ppo_plan_of_passes_by_tokens(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"train_batch_size": 48}), encoding="utf-8")
    plan = batch_plan(ppo(max_tokens_per_device=600, minibatch_size=48, deepspeed=str(path)), 4)
    assert (plan.batch_size, plan.micro_batch_size, plan.accumulation, plan.max_tokens) == (48, 1, 12, 600)
    path.write_text(json.dumps({"gradient_accumulation_steps": 12}), encoding="utf-8")
    with pytest.raises(UserError, match=r'd.json: gradient_accumulation_steps: expected "auto" \(48 seq.*\), got 12'):
        batch_plan(ppo(max_tokens_per_device=600, minibatch_size=48, deepspeed=str(path)), 4)


def test_plan_of_the_reward_stage():
    plan = batch_plan(RewardRecipe(output_dir="out", model_name_or_path="m", train_batch_size=6), 3)
    assert plan.describe() == "6 sequences per step = 3 x 2 x 1 (processes x micro-batch x accumulation)"


def test_sizes_that_do_not_divide():
    with pytest.raises(
        UserError, match="train_batch_size: expected a multiple of the 4 processes, got 10; use 8 or 12, or"
    ):
        batch_plan(sft(train_batch_size=10), 4)
    with pytest.raises(UserError, match="train_batch_size: expected a multiple of the 4 processes, got 2; use 4, or"):
        batch_plan(sft(train_batch_size=2), 4)
    with pytest.raises(UserError, match="minibatch_size: expected a multiple of the 3 processes, got 64"):
        batch_plan(ppo(), 3)
    # A minibatch that divides by the processes and the rollout always makes the rollout divide as well.
    batch_plan(ppo(rollout_batch_size=12, minibatch_size=6), 3)


def test_sizes_fixed_in_the_deepspeed_file_must_agree(tmp_path):
    path = tmp_path / "d.json"
    recipe = sft(train_batch_size=32, deepspeed=str(path))
    path.write_text(json.dumps({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 8}), encoding="utf-8")
    batch_plan(recipe, 2)
    path.write_text(json.dumps({"gradient_accumulation_steps": 4}), encoding="utf-8")
    with pytest.raises(UserError, match=r'd.json: gradient_accumulation_steps: expected "auto" or 2 .*, got 4'):
        batch_plan(recipe, 2)


# --- functions beside the recipe


def test_functions(load, tmp_path):
    (tmp_path / "beside_recipe.py").write_text("def truth(): return 7\nnumber = 3\n", encoding="utf-8")
    (tmp_path / "broken_beside.py").write_text("import gone_module\n", encoding="utf-8")
    (tmp_path / "raising_beside.py").write_text("1 / 0\n", encoding="utf-8")
    load("sft")  # makes the recipe's folder importable
    assert resolve_function("beside_recipe:truth", "reward_funcs")() == 7
    for spec, said in [
        ("beside_recipe", "reward_funcs: expected `module:function`, got 'beside_recipe'"),
        ("absent_beside:f", "reward_funcs: no module 'absent_beside'; put absent_beside.py beside the recipe."),
        ("broken_beside:f", "importing 'broken_beside' failed: ModuleNotFoundError: No module named 'gone_module'"),
        ("raising_beside:f", "importing 'raising_beside' failed: ZeroDivisionError: division by zero"),
        ("beside_recipe:trut", "did you mean 'truth'?"),
        ("beside_recipe:number", "not a function: 'number'"),
    ]:
        with pytest.raises(UserError) as error:
            resolve_function(spec, "reward_funcs")
        assert said in str(error.value)


# --- the DeepSpeed files


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_deepspeed_files_leave_sizes_to_the_recipe(name, stage):
    path = Path(__file__).parents[2] / "recipes" / "deepspeed" / f"{name}.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["zero_optimization"]["stage"] == stage
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[key] for key in sizes} == {"auto"}
    assert config["bf16"] == {"enabled": "auto"}
    assert "optimizer" not in config
    assert config["zero_allow_untested_optimizer"] is True
    batch_plan(sft(deepspeed=str(path)), 8)


def test_an_average_of_weights_on_nvme(load, tmp_path):
    file = tmp_path / "nvme.json"
    for device, refused in (("nvme", True), ("cpu", False)):
        offload = {"device": device, "nvme_path": str(tmp_path)}
        file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": offload}}), encoding="utf-8")
        changes = {"ema_decay": 0.99, "deepspeed": str(file)}
        if refused:
            said = refusal(load, "ppo", changes)
            assert "ema_decay: averages the policy's weights after each update" in said
            assert f"{file} keeps them on NVMe" in said
        else:
            assert load("ppo", changes).ema_decay == 0.99


# --- the recipes that come with the repository


RECIPE_FILES = sorted(Path(__file__).parents[2].glob("recipes/*/*.yaml"))


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_of_the_repository_load_and_say_how_they_are_started(path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("STORIES", "MINILM"):  # the models of recipes/trust, which its user names
        monkeypatch.setenv(name, f"models/{name}")
    stage = read_stage(str(path))
    recipe = load_recipe(stage, str(path))
    shown = path.relative_to(Path(__file__).parents[2])
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    assert any(words in readme for words in (f"align run {shown.parent}", f"align {stage} {shown}"))
    if isinstance(recipe, StageRecipe):
        assert batch_plan(recipe, 1).accumulation >= 1


METHOD_KEYS = {
    "1_full": {"learning_rate"},
    "2_lora": {"method", "lora_r", "lora_alpha", "learning_rate"},
    "3_prompt": {"method", "num_virtual_tokens", "learning_rate"},
    "4_replay": {"replay_fraction", "learning_rate"},
    "5_bound": {"max_forgetting", "load_best_model_at_end", "eval_steps", "learning_rate"},
}


def test_those_of_forgetting_differ_in_what_they_compare(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = Path(__file__).parents[2] / "recipes" / "forgetting"
    assert {path.stem for path in folder.glob("[0-9]_*.yaml")} == {*METHOD_KEYS, "6_evaluate"}
    recipes = {name: dataclasses.asdict(load_recipe("sft", str(folder / f"{name}.yaml"))) for name in METHOD_KEYS}
    for name, keys in METHOD_KEYS.items():
        differing = {key for key, value in recipes[name].items() if value != recipes["1_full"][key]}
        assert differing - {"output_dir", "learning_rate"} <= keys, name
    evaluation = dataclasses.asdict(load_recipe("evaluate", str(folder / "6_evaluate.yaml")))
    for key in ("train_dataset", "eval_fraction", "max_eval_rows", "seed", "max_length"):  # the same rows are held out
        assert evaluation[key] == recipes["1_full"][key], key
    outputs = {each["output_dir"] for each in recipes.values()}
    assert {*evaluation["models"].values()} == {*outputs, recipes["1_full"]["model_name_or_path"]}


# --- from Python


def test_a_recipe_from_python(tmp_path, monkeypatch):
    """A mapping and a recipe are checked like a file, and are not changed; paths may be `Path`s."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "rows.jsonl").touch()
    keys = {**MINIMAL["sft"], "output_dir": tmp_path / "out", "eval_dataset": [DataSource(path="e.jsonl", max_rows=3)]}
    before = dict(keys)
    recipe = as_recipe(SFTRecipe, keys, seed=7)
    assert keys == before
    assert recipe == load_recipe("sft", write_recipe(tmp_path, {**MINIMAL["sft"], "seed": 7, "output_dir": str(tmp_path / "out"),
                                                                "eval_dataset": {"path": "e.jsonl", "max_rows": 3}}))  # fmt: skip
    assert as_recipe(SFTRecipe, recipe) == recipe
    assert as_recipe(SFTRecipe, recipe, seed=8).seed == 8
    assert str(tmp_path) in sys.path, "`module:function` may be a file in the working directory"
    for wrong, said in (
        (dataclasses.replace(recipe, seed=-1), "seed: expected a number at least 0, got -1"),
        (dataclasses.replace(recipe, seed="x"), 'seed: expected a whole number, got "x" (text)'),
        (
            dataclasses.replace(recipe, train_dataset=[DataSource(path="a", generator="m:f")]),
            "train_dataset[0]: expected either `path` or `generator`, got both",
        ),
    ):
        with pytest.raises(UserError) as error:
            as_recipe(SFTRecipe, wrong)
        assert str(error.value) == said


def test_a_recipe_from_a_path_names_the_place_of_a_wrong_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = write_recipe(tmp_path, {**MINIMAL["sft"], "seed": -1})
    for keys, said in (
        ({}, "recipe.yaml:3: seed: expected"),
        ({"seed": -2}, "seed: expected"),
        ({"sed": 1}, "sed: unk"),
    ):
        with pytest.raises(UserError) as error:
            as_recipe(SFTRecipe, path, **keys)
        assert str(error.value).removeprefix(f"{tmp_path}/").startswith(said)


def write_recipe(folder: Path, keys: dict) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return str(folder / "recipe.yaml")
