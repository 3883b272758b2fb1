"""Recipes and DeepSpeed files that are odd in form, type or size: one clear error that names file and key, at once."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.config.deepspeed_file import TOP_TYPES, ZERO_TYPES, read_deepspeed_file
from align.config.evaluate import EvaluateRecipe
from align.config.functions import resolve_function
from align.config.load import as_recipe, load_recipe
from align.config.sft import SFTRecipe
from align.config.text_file import read_text
from align.errors import UserError

RECIPE = b"output_dir: out\ntrain_dataset: rows.jsonl\nmodel_name_or_path: base\n"
BOMB = b"".join(
    b"a%d: &a%d [%s]\n" % (level, level, b", ".join([b"*a%d" % (level - 1)] * 9) if level else b"x")
    for level in range(12)
)
# Each: what follows the minimal recipe, and a part of the error.
RECIPES: dict[str, tuple[bytes, str]] = {
    "bytes that are not UTF-8": (b"run_name: caf\xe9\n", "r.yaml: line 4 is not UTF-8 (byte 0xe9); save the file in"),
    "a null character": (b"run_name: a\0b\n", "r.yaml: not readable as YAML"),
    "an escaped null character": (b'run_name: "a\\0b"\n', "r.yaml:4: run_name: expected text, got a null character"),
    "an escaped surrogate": (b'run_name: "\\ud800"\n', "r.yaml:4: run_name: expected text, got '\\ud800', which is no"),
    "a null character in output_dir": (b'retention: "a\\0b"\n', "r.yaml:4: retention: expected text, got a null"),
    "aliases of aliases": (BOMB, "expands to more than 20,000 values"),
    "an alias of aliases as a value": (b"generator_kwargs: &a [*a]\n", "not readable as YAML: it is nested too deeply"),
    "deep nesting": (b"model_config: " + b"[" * 5000, "not readable as YAML: it is nested too deeply"),
    "deep nesting by lines": (b"model_config: " + b"{a: " * 5000, "not readable as YAML: it is nested too deeply"),
    "a long list": (b"model_config: {a: [" + b"1, " * 30000 + b"]}\n", "expands to more than 20,000 values"),
    "a file of data": (b"# rows\n" + b"#" * 2**20, "r.yaml: has more than 1,048,576 bytes"),
    "a date": (b"run_name: 2024-01-01\n", "r.yaml:4: run_name: expected text, numbers, lists or mappings, got a date; put text in"),
    "a date inside": (b"model_config: {a: [2024-01-01 10:00:00]}\n", "r.yaml:4: model_config.a: expected text, numbers, lists or map"),
    "a date that does not exist": (b"run_name: 2024-13-45\n", "r.yaml:4: run_name: expected text, numbers, lists or mappings"),
    "a set": (b"model_config: !!set {a, b}\n", "r.yaml:4: model_config: expected text, numbers, lists or mappings, got a set"),
    "binary data": (b"run_name: !!binary aGk=\n", "r.yaml:4: run_name: expected text, numbers, lists or mappings, got binary data"),
    "a tag of Python": (b"run_name: !!python/object/apply:os.getcwd []\n", "got tag:yaml.org,2002:python/object"),
    "an unknown tag": (b"run_name: !x y\n", "r.yaml:4: run_name: expected text, numbers, lists or mappings, got !x"),
    "a tag that does not fit": (b"seed: !!int x\n", "not readable as YAML: it holds a value that cannot be read"),
    "an empty tagged number": (b"seed: !!int\n", "not readable as YAML: it holds a value that cannot be read"),
    "a truth value that is none": (b"bf16: !!bool x\n", "not readable as YAML: it holds a value that cannot be read"),
    "a tab": (b"model_config:\n\ta: 1\n", "r.yaml:5: not readable as YAML: found character"),
    "two documents": (b"---\nseed: 1\n", "not readable as YAML: but found another document"),
    "a key twice": (b"seed: 1\nseed: 2\n", "r.yaml:5: seed: written twice, first in line 4; keep one."),
    "a key that is a list": (b"? [a, b]\n: 1\n", "not readable as YAML: found unhashable key"),
    "a key that is null": (b"null: 1\n", "r.yaml:4: null: unknown key"),
    "a key that is a number": (b"7: 1\n", "r.yaml:4: 7: unknown key"),
    "a column that is a number": (b"retention: {path: a, columns: {1: a}}\n", "columns: expected names as keys, got 1"),
    "a long key": (b"x" * 100 + b": 1\n", "unknown key"),
    "a number of thousands of digits": (b"seed: " + b"9" * 5000, "r.yaml:4: seed: expected a number, got one of 5000 digits"),
    "a hexadecimal number of thousands of digits": (b"seed: 0x" + b"f" * 5000, "got one of 5002 digits"),
    "a large hexadecimal number": (b"seed: 0x" + b"f" * 50, "seed: expected a whole number, got one of 200 bits"),
    "a large fraction": (b"learning_rate: " + b"9" * 90, "learning_rate: expected a number of at most 1,000,000,000"),
    "a number beyond a float": (b"learning_rate: 1e999\n", "r.yaml:4: learning_rate: expected a number, got"),
    "infinity": (b"learning_rate: .inf\n", "r.yaml:4: learning_rate: expected a number, got Infinity"),
    "not a number": (b"weight_decay: .nan\n", "r.yaml:4: weight_decay: expected a number, got NaN"),
    "not a number inside": (b"model_config: {a: [.nan]}\n", "r.yaml:4: model_config.a[0]: expected a number, got NaN"),
    "true as a whole number": (b"max_steps: true\n", "r.yaml:4: max_steps: expected a whole number, got true"),
    "true as a number": (b"learning_rate: true\n", "r.yaml:4: learning_rate: expected a number, got true"),
    "a number as a truth value": (b"bf16: 1\n", "r.yaml:4: bf16: expected true or false, got 1"),
    "a fraction as a whole number": (b"max_steps: 2.5\n", "r.yaml:4: max_steps: expected a whole number, got 2.5"),
    "a list as a number": (b"max_steps: [1]\n", "r.yaml:4: max_steps: expected a whole number, got [1] (a list)"),
    "a mapping as text": (b"run_name: {a: 1}\n", "r.yaml:4: run_name: expected text, got"),
    "a negative seed": (b"seed: -1\n", "r.yaml:4: seed: expected a number at least 0, got -1"),
    "a seed above 32 bits": (b"seed: 4294967296\n", "seed: expected a number of at most 4,294,967,295, got 4,294,967,296"),
    "a batch without end": (b"train_batch_size: 1000000000000\n", "train_batch_size: expected a number of at most 1,048,"),
    "a micro-batch without end": (b"per_device_train_batch_size: 1000000000000\n", "expected a number of at most 1,048,576"),
    "a negative batch": (b"train_batch_size: -4\n", "r.yaml:4: train_batch_size: expected a number at least 1, got -4"),
    "steps without end": (b"max_steps: 1000000000000\n", "max_steps: expected a number of at most 1,000,000,000"),
    "epochs without end": (b"num_train_epochs: 1e30\n", "num_train_epochs: expected a number of at most 1,000,000,000"),
    "a length without end": (b"max_length: 1000000000000\n", "max_length: expected a number of at most 16,777,216"),
    "a rank without end": (b"lora_r: 1000000000000\n", "lora_r: expected a number of at most 1,048,576"),
    "a vocabulary without end": (b"tokenizer_vocab_size: 1000000000000\n", "tokenizer_vocab_size: expected a number of at"),
    "a weight without end": (b"retention: {path: a, weight: 1.0e9}\n", "retention[0].weight: expected a number of at most"),
    "a stage that is a list": (b"stage: [sft]\n", "r.yaml:4: stage: expected text, got [\"sft\"] (a list)"),
    "a path of 5000 characters": (b"deepspeed: " + b"x" * 5000, "deepspeed: expected a path, got one of 5000 characters"),
    "a long name in a path": (b"deepspeed: a/" + b"x" * 300, "deepspeed: expected a path, got a name of 300 bytes"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(("more", "said"), RECIPES.values(), ids=RECIPES)
def test_a_recipe(folder, more, said):
    (folder / "r.yaml").write_bytes(RECIPE + more)
    with pytest.raises(UserError) as error:
        load_recipe("sft", "r.yaml")
    message = str(error.value)
    assert said in message
    assert message.startswith("r.yaml")
    assert len(message) < 1000


@pytest.mark.parametrize(
    "key", ["output_dir", "model_name_or_path", "train_dataset", "chat_template_path", "deepspeed"]
)
@pytest.mark.parametrize("value", ["", "a\0b", "\ud800", "x" * 5000, "a/" + "ä" * 200])
def test_a_path_that_no_file_can_have(folder, key, value):
    keys = {"output_dir": "out", "train_dataset": "rows.jsonl", "model_name_or_path": "base", key: value}
    with pytest.raises(UserError, match=rf"^{key}(\[0\])?: expected (text|a path), got"):
        as_recipe(SFTRecipe, keys)


def fill(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def serve(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # the whole path may be too long


# What stands where a file should: how it gets there, and a part of the error.
ODD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a named pipe": (os.mkfifo, "expected a file, got a named pipe"),
    "a socket": (serve, "expected a file, got a socket"),
    "a folder": (Path.mkdir, "expected a file, got a folder"),
    "an endless device": (lambda path: path.symlink_to("/dev/zero"), "expected a file, got a device"),
    "a broken link": (lambda path: path.symlink_to("gone"), "is a link to gone, which is not there; correct the link"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "which is not there"),
    "a link of git-annex": (
        lambda path: path.symlink_to("../.git/annex/objects/aB/Cd/SHA256E-s1--0/SHA256E-s1--0"),
        "fetch the file by `git annex get`",
    ),
    "a pointer of git-annex": (lambda path: fill(path, b"/annex/objects/SHA256E-s1--0\n"), "`git annex get`"),
    "a pointer of git-lfs": (
        lambda path: fill(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "holds a pointer of git instead of the file; fetch the file by `git lfs pull`",
    ),
    "UTF-16": (lambda path: fill(path, "a: 1\n".encode("utf-16")), "is in UTF-16; save it in UTF-8"),
    "Latin-1": (lambda path: fill(path, "ok\nä: 1\n".encode("latin-1")), "line 2 is not UTF-8 (byte 0xe4)"),
}


@pytest.mark.parametrize(("make", "said"), ODD_FILES.values(), ids=ODD_FILES)
@pytest.mark.parametrize(
    "read", [lambda path: load_recipe("sft", path), read_deepspeed_file], ids=["recipe", "deepspeed"]
)
def test_what_is_no_text_file(folder, read, make, said):
    make(Path("file"))
    with pytest.raises(UserError) as error:
        read("file")
    message = str(error.value)
    assert "file: " in message
    assert said in message or (make is Path.mkdir and "expected a recipe file, got a folder" in message)


def test_a_byte_order_mark_of_utf8_is_accepted(folder):
    (folder / "r.yaml").write_bytes(b"\xef\xbb\xbf" + RECIPE)
    assert load_recipe("sft", "r.yaml").output_dir == "out"
    (folder / "d.json").write_bytes(b'\xef\xbb\xbf{"gradient_clipping": 1}')
    assert read_deepspeed_file("d.json") == {"gradient_clipping": 1}
    assert read_text("r.yaml").startswith("output_dir")


def test_what_yaml_may_hold(folder):
    more = "model_config: {model_type: llama, a: {7: [1, null, true, 1.5, 'x']}}\n"
    (folder / "r.yaml").write_text(RECIPE.decode().replace("model_name_or_path: base\n", more))
    assert load_recipe("sft", "r.yaml").model_config["a"] == {7: [1, None, True, 1.5, "x"]}
    aliased = "train_dataset: &rows [rows.jsonl]\neval_dataset: *rows\noutput_dir: out\nmodel_name_or_path: base\n"
    (folder / "r.yaml").write_text(aliased)
    recipe = load_recipe("sft", "r.yaml")
    assert recipe.eval_dataset == recipe.train_dataset


# Words after the recipe, and a part of the error.
OVERRIDES = {
    "--seed": "--seed: expected one value, got none",
    "--seed=": "--seed: expected a whole number, got nothing (null)",
    "--seed 4294967296": "--seed: expected a number of at most 4,294,967,295",
    "--seed 1 2": "--seed: expected one value, got 1 2",
    "--seed 2024-01-01": "--seed:1: expected text, numbers, lists or mappings, got a date",
    "--seed !!int x": "--seed: expected one value",
    "--seed [" + "[" * 2000: "--seed: expected a whole number",
    "--seed.x 1": "--seed: expected a whole number, got",
    "--=x": "unknown key",
    "--.x 1": "unknown key",
    "--model_config..a 1": "got both; empty one with null",
    "---seed 1": "_seed: unknown key; did you mean 'seed'?",
    "--run_name \ud800": "--run_name: expected text, got '\\ud800'",
    "--model_config.a 2024-01-01": "--model_config.a:1: expected text, numbers, lists or mappings, got a date",
    "--train_dataset.x.y 1": "--train_dataset.x: unknown key",
    "--run_name.x.y 1": "--run_name: expected text, got",
    "seed 1": "seed: expected `--key value` after the recipe, got this word alone",
}


@pytest.mark.parametrize(("words", "said"), OVERRIDES.items(), ids=[words[:30] for words in OVERRIDES])
def test_words_after_the_recipe(folder, words, said):
    (folder / "r.yaml").write_bytes(RECIPE)
    with pytest.raises(UserError) as error:
        load_recipe("sft", "r.yaml", words.split(" "))
    assert said in str(error.value)


def test_models_that_are_named_twice(folder):
    keys: Any = {"output_dir": "out", "eval_dataset": "rows.jsonl"}
    with pytest.raises(UserError, match=r"^models: 'base' is written twice; keep one, or give both names"):
        as_recipe(EvaluateRecipe, keys | {"models": ["base", "base"]})
    assert as_recipe(EvaluateRecipe, keys | {"models": {"a": "base", "b": "base"}}).models == {"a": "base", "b": "base"}


def test_a_module_that_exits(folder):
    (folder / "exits.py").write_text("import sys\nsys.exit(0)\n")
    sys.path.insert(0, str(folder))
    with pytest.raises(UserError, match=r"grader: importing 'exits' failed: SystemExit: 0"):
        resolve_function("exits:f", "grader")


def test_a_date_after_the_recipe_is_text_where_text_is_expected(folder):
    (folder / "r.yaml").write_bytes(RECIPE)
    assert load_recipe("sft", "r.yaml", ["--run_name", "2024-01-01"]).run_name == "2024-01-01"
    assert load_recipe("sft", "r.yaml", ["--run_name", "9" * 200]).run_name == "9" * 200


# Content of a DeepSpeed file, and a part of the error.
DEEPSPEED: dict[str, str] = {
    "": "is empty",
    "{": "not valid JSON: ",
    "[1]": "expected a JSON object, got a list",
    "null": "expected a JSON object, got null",
    '"zero2"': "expected a JSON object, got text",
    '{"a": 1} {"a": 2}': "not valid JSON: Extra data",
    '{"a": ' * 5000 + "1" + "}" * 5000: "not valid JSON: nested more than 64 deep",
    '{"gradient_clipping": ' + "9" * 5000 + "}": "not valid JSON: ",
    '{"gradient_clipping": NaN}': "not valid JSON: NaN is not a number of JSON",
    '{"gradient_clipping": -1}': "gradient_clipping: expected a number from 0, got -1",
    '{"gradient_clipping": [1]}': "gradient_clipping: expected a number from 0, got a list",
    '{"gradient_clipping": true}': "gradient_clipping: expected a number from 0, got true",
    '{"steps_per_print": 1.5}': "steps_per_print: expected a whole number from 0, got 1.5",
    '{"steps_per_print": "ten"}': 'steps_per_print: expected a whole number from 0, got "ten" (text)',
    '{"zero_allow_untested_optimizer": "yes"}': "zero_allow_untested_optimizer: expected true or false, got",
    '{"zero_optimization": []}': "zero_optimization: expected an object, got a list",
    '{"zero_optimization": null}': "zero_optimization: expected an object, got nothing (null)",
    '{"zero_optimization": 2}': "zero_optimization: expected an object, got 2",
    '{"zero_optimization": "auto"}': "zero_optimization: expected an object, got",
    '{"zero_optimization": {"stage": "three"}}': "zero_optimization: stage: expected a whole number from 0, got",
    '{"zero_optimization": {"stage": 4}}': "zero_optimization.stage: expected 0, 1, 2 or 3, got 4",
    '{"zero_optimization": {"stage": -1}}': "zero_optimization: stage: expected a whole number from 0, got -1",
    '{"zero_optimization": {"stage": true}}': "zero_optimization: stage: expected a whole number from 0, got true",
    '{"zero_optimization": {"stage": 2.5}}': "zero_optimization: stage: expected a whole number from 0, got 2.5",
    '{"zero_optimization": {"stage": "auto"}}': "zero_optimization.stage: expected 0, 1, 2 or 3, got",
    '{"zero_optimization": {"stage": null}}': "zero_optimization: stage: expected a whole number from 0, got nothing",
    '{"zero_optimization": {"stage": [3]}}': "zero_optimization: stage: expected a whole number from 0, got a list",
    '{"zero_optimization": {"stage": 1, "stage": 2}}': "not valid JSON: 'stage' is written twice",
    '{"zero_optimization": {"reduce_bucket_size": [1]}}': "reduce_bucket_size: expected a whole number from 0, got a list",
    '{"zero_optimization": {"overlap_comm": "maybe"}}': "overlap_comm: expected true or false, got",
    '{"zero_optimization": {"stage": 3, "offload_param": true}}': "offload_param: expected an object, got true",
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}': "device: expected one of none, cpu, nvme",
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": ["cpu"]}}}': "device: expected one of none, cpu, nvme",
    '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}': "offload_param: needs stage 3, got stage 2",
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}': "offload_param.nvme_path: expected an existing folder, got nothing (null)",
    '{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/gone"}}}': 'nvme_path: expected an existing folder, got "/gone"',
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}': "offload_optimizer: a state on NVMe",
    '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}': "offloaded in part",
    '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}': "offload_optimizer: needs stage 1 or more, got stage 0",
    '{"zero_optimisation": {"stage": 3}}': "zero_optimisation: unknown key; did you mean 'zero_optimization'?",
    '{"zero_optimization": {"stages": 3}}': "zero_optimization: stages: unknown key; did you mean 'stage'?",
    '{"csv_monitor": {"enabled": true, "output_path": "x"}}': "csv_monitor writes files of its own; leave it out",
    '{"tensorboard": {"enabled": true}}': "tensorboard writes files of its own; leave it out",
    '{"flops_profiler": {"enabled": true, "output_file": "notes"}}': "flops_profiler.output_file would be overwritten",
    '{"bf16": true}': "bf16: expected an object, got true",
    '{"bf16": {"enabled": "yes"}}': "bf16: enabled: expected true or false, got",
    '{"fp16": []}': "fp16: expected an object, got a list",
    '{"fp16": {"enabled": true}}': "switches fp16 on, which is not supported",
    '{"optimizer": "adam"}': 'optimizer: expected an object, got "adam" (text)',
    '{"optimizer": {"type": "AdamW"}}': "optimizer: is set by the recipe's keys (optim,",
    '{"scheduler": {}}': "scheduler: is set by the recipe's keys",
    '{"scheduler": []}': "scheduler: expected an object, got a list",
    '{"train_batch_size": {}}': "train_batch_size: expected a whole number from 0, got a mapping",
    '{"train_micro_batch_size_per_gpu": "4"}': "train_micro_batch_size_per_gpu: expected a whole number from 0, got",
}  # fmt: skip


@pytest.mark.parametrize(("content", "said"), DEEPSPEED.items(), ids=[content[:60] for content in DEEPSPEED])
def test_a_deepspeed_file(folder, content, said):
    (folder / "d.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        as_recipe(
            SFTRecipe, {"output_dir": "o", "train_dataset": "r", "model_name_or_path": "m", "deepspeed": "d.json"}
        )
    assert str(error.value).startswith("deepspeed: d.json: ") or "deepspeed: d.json switches" in str(error.value)
    assert said in str(error.value)


def test_deepspeed_files_that_are_right(folder):
    for path in (Path(__file__).parents[2] / "recipes/deepspeed").glob("*.json"):
        assert read_deepspeed_file(str(path)) == json.loads(path.read_text())
    odd = {
        "zero_optimization": {"stage": 3.0, "reduce_bucket_size": 5e8, "offload_param": None, "overlap_comm": "auto"},
        "_comment": "ours",
        "gradient_clipping": "auto",
        "use_data_before_expert_parallelism": True,
    }
    (folder / "d.json").write_text(json.dumps(odd))
    assert read_deepspeed_file("d.json") == odd
    assert {name for name in ZERO_TYPES if name in TOP_TYPES} == set()
