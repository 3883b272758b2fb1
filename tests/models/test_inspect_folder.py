"""Model folders that cannot be used: one error that names key and file, from the files alone where they tell it."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.cli import merge
from align.config.base import StageRecipe
from align.config.evaluate import EvaluateRecipe
from align.config.ppo import PPORecipe
from align.config.reward import RewardRecipe
from align.config.sft import SFTRecipe
from align.errors import UserError
from align.evaluate import compare
from align.models import adapter_patterns
from align.models.check_weights import check_report
from align.models.context_length import check_rows_fit
from align.models.from_scratch import scratch_config
from align.models.inspect_folder import StoredTensor, inspect_folder, inspect_inputs
from align.models.load import load_config, load_policy, load_pretrained
from align.models.tokenizer import load_tokenizer
from align.models.trainable import check_target_modules
from align.runs.manifest import open_stage
from tests.worlds import letter_tokenizer, save_tiny_policy, tiny_llama

KEY = "model_name_or_path"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Change = Callable[[Path], Any]


def make(folder: Path) -> None:
    save_tiny_policy(folder / "model", layers=1)
    tiny_llama(layers=1).save_pretrained(folder / "sharded", max_shard_size="10KB")
    letter_tokenizer().save_pretrained(folder / "sharded")
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(layers=1), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(folder / "adapter"))
    change("adapter_config.json", base_model_name_or_path="model")(folder / "adapter")


def put(name: str, content: bytes | str) -> Change:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def link(name: str, target: str) -> Change:
    return lambda folder: ((folder / name).unlink(), (folder / name).symlink_to(target))


def pipe(name: str) -> Change:
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: float = 0.5) -> Change:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * size))


def change(name: str, **changes: Any) -> Change:
    """Change entries of a JSON file."""

    def write(folder: Path) -> None:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))

    return write


def config(**changes: Any) -> Change:
    return change("config.json", **changes)


def header(content: Any, data: int = 0, length: int | None = None) -> Change:
    """A safetensors file with this header and so many bytes of data."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return put(WEIGHTS, struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))


def tensor(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def write(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return write


def index(files: Any) -> Change:
    return lambda folder: (gone(WEIGHTS)(folder), put(INDEX, json.dumps({"weight_map": files}))(folder))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
ANNEX = "../.git/annex/objects/aB/Cd/SHA256E-s1--0/SHA256E-s1--0"
HEADER_WRONG = "model.safetensors: its header describes w wrongly"
NO_SAFETENSORS = "model.safetensors: is not a safetensors file"

# What happens to a folder with a model, and a part of the error. Found in the files, before anything is loaded.
FOLDERS: dict[str, tuple[Change, str]] = {
    "no config": (gone("config.json"), "no model at model (config.json is missing)"),
    "config is empty": (put("config.json", ""), "config.json: it is empty; copy or download the file again"),
    "config is cut": (cut("config.json"), "config.json: not valid JSON: "),
    "config is a list": (put("config.json", "[1]"), "config.json: expected a JSON object, got [1] (a list)"),
    "config is not UTF-8": (put("config.json", b'{"a": "\xe9"}'), "config.json: line 1 is not UTF-8"),
    "config is UTF-16": (put("config.json", "{}".encode("utf-16")), "config.json: is in UTF-16"),
    "config is deep": (put("config.json", '{"a": ' * 100_000), "config.json: not valid JSON"),
    "config is a pointer": (put("config.json", LFS), "config.json: holds a pointer of git"),
    "config is a pipe": (pipe("config.json"), "config.json: expected a file, got a named pipe"),
    "config is a device": (link("config.json", "/dev/zero"), "config.json: expected a file, got a device"),
    "hidden size 0": (config(hidden_size=0), "config.json: hidden_size: expected a whole number from 1 to 1,048,576, got 0"),
    "hidden size -1": (config(hidden_size=-1), "hidden_size: expected a whole number from 1 to 1,048,576, got -1"),
    "hidden size is text": (config(hidden_size="32"), 'hidden_size: expected a whole number from 1 to 1,048,576, got "32"'),
    "hidden size is true": (config(hidden_size=True), "hidden_size: expected a whole number from 1 to 1,048,576, got true"),
    "hidden size is a fraction": (config(hidden_size=32.5), "hidden_size: expected a whole number from 1 to 1,048,576, got"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers: expected a whole number from 1 to 10,000"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads: expected a whole number from 1 to 65,536, got 0"),
    "no words": (config(vocab_size=0), "vocab_size: expected a whole number from 1 to 268,435,456, got 0"),
    "positions -1": (config(max_position_embeddings=-1), "max_position_embeddings: expected a whole number from 1 to"),
    "a size inside": (config(text_config={"hidden_size": 0}), "config.json: text_config: hidden_size: expected a whole number"),
    "a size of 5000 digits": (put("config.json", '{"hidden_size": ' + "1" * 5000 + "}"), "config.json: not valid JSON: Exceeds"),
    "no weights": (gone(WEIGHTS), "no weights at model (model.safetensors is missing)"),
    "weights are empty": (put(WEIGHTS, ""), "model.safetensors: is empty; copy or download the file again"),
    "weights of 5 bytes": (put(WEIGHTS, "hello"), "model.safetensors: is cut, it has 5 bytes"),
    "weights are text": (put(WEIGHTS, "<html>not found</html>" * 9), NO_SAFETENSORS),
    "weights are garbage": (put(WEIGHTS, bytes(range(256)) * 99), NO_SAFETENSORS),
    "weights are cut": (cut(WEIGHTS), "model.safetensors: is cut: "),
    "weights are cut in the header": (cut(WEIGHTS, 0.005), "model.safetensors: is cut, it has "),
    "weights lack a byte": (cut(WEIGHTS, 0.99999), "model.safetensors: is cut: "),
    "weights go on": (lambda folder: (folder / WEIGHTS).open("ab").write(b"x"), "has bytes after its last tensor"),
    "weights are a pointer": (put(WEIGHTS, LFS), "holds a pointer of git instead of the file; fetch the file by `git lfs"),
    "weights are a link of git-annex": (link(WEIGHTS, ANNEX), "which is not there; fetch the file by `git annex get`"),
    "weights are a pipe": (pipe(WEIGHTS), "model.safetensors: expected a file, got a named pipe"),
    "header of eight exabytes": (header(b"{}", length=2**63), NO_SAFETENSORS),
    "header is not JSON": (header(b"{not json"), NO_SAFETENSORS),
    "header is a list": (header([1]), NO_SAFETENSORS),
    "header is deep": (header(b"[" * 100_000), NO_SAFETENSORS),
    "header without tensors": (header({"__metadata__": {}}), "model.safetensors: holds no tensors"),
    "tensor without a shape": (header({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, 8), NO_SAFETENSORS),
    "tensor is text": (header({"w": "x"}), NO_SAFETENSORS),
    "tensor with odd offsets": (header({"w": {"dtype": "F32", "shape": [2], "data_offsets": ["a"]}}, 8), NO_SAFETENSORS),
    "tensor of another size": (header(tensor(shape=[3]), 8), HEADER_WRONG),
    "tensor of a negative size": (header(tensor(shape=[-1, -2]), 8), HEADER_WRONG),
    "tensor that ends before it begins": (header(tensor(begin=8, end=0), 8), HEADER_WRONG),
    "tensor of an unknown type": (header(tensor(dtype="X9"), 8), "w has a type that the format does not know"),
    "a gap between tensors": (header(tensor(begin=8, end=16), 16), HEADER_WRONG),
    "tensor beyond the end": (header(tensor(shape=[200], end=800), 8), "model.safetensors: is cut: "),
    "index is cut": (lambda folder: (gone(WEIGHTS)(folder), put(INDEX, "{")(folder)), f"{INDEX}: not valid JSON"),
    "index without a map": (index(None), f"{INDEX}: weight_map: expected names of tensors and their files"),
    "index with numbers": (index({"w": 1}), f"{INDEX}: weight_map: expected names of tensors and their files"),
    "index is empty": (index({}), "holds no tensors"),
    "index leaves the folder": (index({"w": "../other/model.safetensors"}), "is not the name of a safetensors file in this"),
    "index names /etc": (index({"w": "/etc/passwd"}), "is not the name of a safetensors file in this folder"),
    "index names a pickle": (index({"w": "pytorch_model.bin"}), "is not the name of a safetensors file in this folder"),
    "index names a missing file": (index({"w": "a.safetensors"}), "a.safetensors: missing, although"),
    "pickled weights": (pickled, "pytorch_model.bin: a pickle, which could run any program, and no model.safetensors"),
    "generation settings are cut": (cut("generation_config.json"), "generation_config.json: not valid JSON"),
    "tokenizer settings are a list": (put("tokenizer_config.json", "[]"), "tokenizer_config.json: expected a JSON object"),
    "tokenizer is a pointer": (put("tokenizer.json", LFS), "tokenizer.json: holds a pointer of git"),
    "template is not UTF-8": (put("chat_template.jinja", b"\xff"), "chat_template.jinja: line 1 is not UTF-8"),
}  # fmt: skip
SHARDED: dict[str, tuple[Change, str]] = {
    "a shard is missing": (gone("model-00001-of-00006.safetensors"), "model-00001-of-00006.safetensors: missing, although"),
    "a shard is cut": (cut("model-00002-of-00006.safetensors"), "model-00002-of-00006.safetensors: is cut"),
    "a shard is another": (
        lambda folder: shutil.copy(folder / "model-00001-of-00006.safetensors", folder / "model-00002-of-00006.safetensors"),
        "is not in model-00002-of-00006.safetensors; copy or download the model again",
    ),
}  # fmt: skip
ADAPTERS: dict[str, tuple[Change, str]] = {
    "settings are cut": (cut("adapter_config.json"), "adapter/adapter_config.json: not valid JSON"),
    "no kind": (change("adapter_config.json", peft_type=None), "adapter_config.json: peft_type: expected text, got nothing"),
    "a module": (change("adapter_config.json", megatron_config={"a": 1}, megatron_core="os"), "adapter_config.json: megatron_config: expected"),
    "no base": (change("adapter_config.json", base_model_name_or_path=None), "base_model_name_or_path: expected text, got"),
    "base is a list": (change("adapter_config.json", base_model_name_or_path=["x"]), "base_model_name_or_path: expected text"),
    "base is gone": (change("adapter_config.json", base_model_name_or_path="./gone"), "adapter is an adapter of ./gone: no model"),
    "base is itself": (change("adapter_config.json", base_model_name_or_path="adapter"), "base model leads back to adapter"),
    "base is cut": (lambda folder: cut(WEIGHTS)(folder.with_name("model")), "adapter is an adapter of model: model/model.saf"),
    **{f"regex in {key}": (change("adapter_config.json", **{key: value}), f"adapter/adapter_config.json: {key}: matching the regular expression") for key, value in {
        "target_modules": r"(.*\w*)*q_projx", "exclude_modules": r"(\w+\.?)+!", "rank_pattern": {r"(.*)*x": 4}, "alpha_pattern": {"q_proj": 2, r"(.*)*x": 4},
        "layers_pattern": [r"(\w*\.?)*y"], "modules_to_save": [r"(\w*\.?)*y"]}.items()},
    "no regex": (change("adapter_config.json", target_modules="(q_proj"), "adapter_config.json: target_modules: expected a regular expression, got"),
    "no weights": (gone("adapter_model.safetensors"), "no weights at adapter (adapter_model.safetensors is missing)"),
    "weights are cut": (cut("adapter_model.safetensors"), "adapter_model.safetensors: is cut"),
    "pickled weights": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "adapter/adapter_model.bin: a pickle, which could run any program, and no adapter_model.safetensors",
    ),
}  # fmt: skip
CASES = [
    *(pytest.param("model", *case, id=name) for name, case in FOLDERS.items()),
    *(pytest.param("sharded", *case, id=f"sharded: {name}") for name, case in SHARDED.items()),
    *(pytest.param("adapter", *case, id=f"adapter: {name}") for name, case in ADAPTERS.items()),
]


@pytest.fixture
def models(tmp_path, monkeypatch, shared_folder) -> Path:
    """A folder with a model, one in shards and an adapter, to break."""
    shutil.copytree(shared_folder("models to inspect", make), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(adapter_patterns, "SECONDS", 0.1)
    return tmp_path


@pytest.mark.parametrize(("name", "change", "said"), CASES)
def test_what_the_files_tell(models, name, change, said):
    change(models / name)
    with pytest.raises(UserError) as error:
        inspect_folder(name, KEY)
    message = str(error.value)
    assert said in message
    assert message.startswith(f"{KEY}: ")
    assert "\n" not in message
    assert len(message) < 600


def test_what_a_whole_folder_holds(models):
    found = inspect_folder("model", KEY)
    assert found is not None
    assert found.config["hidden_size"] == 32
    assert found.tensors["model.embed_tokens.weight"] == StoredTensor(WEIGHTS, "F32", (29, 32))
    sharded = inspect_folder("sharded", KEY)
    assert sharded is not None
    assert {name: (each.dtype, each.shape) for name, each in sharded.tensors.items()} == {
        name: (each.dtype, each.shape) for name, each in found.tensors.items()
    }
    adapter = inspect_folder("adapter", KEY)
    assert adapter is not None
    assert adapter.is_adapter
    assert adapter.base == found
    assert {each.shape for each in adapter.tensors.values()} == {(2, 32), (32, 2)}
    assert inspect_folder("some/model", KEY) is None  # on the hub
    for path, said in [
        ("model/config.json", "got a file"),
        ("gone/x/model", "no model at gone/x/model"),
        ("", "no model at"),
    ]:
        with pytest.raises(UserError, match=said):
            inspect_folder(path, KEY)


def test_the_links_of_the_hubs_cache_are_followed(models):
    (models / "blobs").mkdir()
    for file in list((models / "model").iterdir()):
        file.rename(models / "blobs" / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert inspect_folder("model", KEY) is not None


def rewrite(folder: Path, name: str, value: float) -> None:
    weights(lambda found: found[name].view(-1).__setitem__(3, value))(folder)


def tokenizer(**changes: Any) -> Change:
    return change("tokenizer_config.json", **changes)


# What only transformers can tell, by what loads it, and a part of the error.
LOADS: dict[str, Callable[[str], Any]] = {
    "config": lambda path: load_config(path, KEY),
    "tokenizer": load_tokenizer,
    "weights": load_policy,
    "rows": lambda path: check_rows_fit([[3], [load_tokenizer(path).eos_token_id]], load_config(path, KEY)),
}
LOADED: dict[str, tuple[str, Change, str]] = {
    "unknown type": ("config", config(model_type="nosuch"), "transformers cannot read its config.json. ValueError: The"),
    "type is a list": ("config", config(model_type=["llama"]), "transformers cannot read its config.json"),
    "no type": ("config", put("config.json", "{}"), "transformers cannot read its config.json"),
    "kernel of the hub": ("config", config(attn_implementation="kernels-community/flash-attn"), "its config.json names the kernel kernels-community/flash-attn"),
    "kernel by a private key": ("config", config(_attn_implementation="some/code@main:f"), "its config.json names the kernel some/code@main:f"),
    "kernel of experts": ("config", config(experts_implementation="some/code"), "its config.json names the kernel some/code"),
    "sizes that do not fit": ("weights", config(num_attention_heads=5), "model: cannot load the model"),
    "unknown activation": ("weights", config(hidden_act="nosuch"), "model: cannot load the model. KeyError"),
    "too many words": ("weights", config(vocab_size=1000), "model: cannot load the model. RuntimeError"),
    "more layers": ("weights", config(num_hidden_layers=2), "LlamaForCausalLM lack model.layers.1."),
    "a tensor is missing": ("weights", weights(lambda found: found.pop("lm_head.weight")), "lack lm_head.weight"),
    "a tensor of another shape": (
        "weights",
        weights(lambda found: found.update({"lm_head.weight": torch.zeros(5, 32)})),
        "model: cannot load the model. RuntimeError",
    ),
    "NaN": ("weights", lambda folder: rewrite(folder, "model.norm.weight", math.nan), "NaN or infinity, in model.norm.weight"),
    "infinity": ("weights", lambda folder: rewrite(folder, "lm_head.weight", -math.inf), "NaN or infinity, in lm_head.weight"),
    "no tokenizer": ("tokenizer", lambda folder: (gone("tokenizer.json")(folder), gone("tokenizer_config.json")(folder)), "model: has no tokenizer"),
    "tokenizer is cut": ("tokenizer", cut("tokenizer.json"), "model/tokenizer.json: "),
    "tokenizer is empty": ("tokenizer", put("tokenizer.json", ""), "model/tokenizer.json: "),
    "tokenizer is a list": ("tokenizer", put("tokenizer.json", "[]"), "model/tokenizer.json: "),
    "no end of text": ("tokenizer", tokenizer(eos_token=None), "model: the tokenizer has no end-of-text token"),
    "end of text is new": ("rows", tokenizer(eos_token="<new>"), "model: the tokenizer gives token 29, and the model knows"),
    "end of text is a number": ("tokenizer", tokenizer(eos_token=5), "model: the tokenizer cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize(("what", "change", "said"), LOADED.values(), ids=LOADED)
def test_what_loading_tells(models, what, change, said):
    change(models / "model")
    with pytest.raises(UserError) as error:
        LOADS[what]("model")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_are_checked_too(models):
    assert load_policy("adapter") is not None
    found = load_file("adapter/adapter_model.safetensors")
    next(iter(found.values())).view(-1)[0] = math.nan
    save_file(found, "adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter: the weights hold NaN or infinity, in .*q_proj"):
        load_policy("adapter")
    change("adapter_config.json", r="two")(models / "adapter")
    with pytest.raises(UserError, match=r"adapter: cannot load the adapter"):
        load_policy("adapter")


def test_adapters_on_modules_that_are_not_there():
    model = tiny_llama(layers=1)
    check_target_modules(model, ["q_proj", "layers.0.mlp.up_proj", "embed_tokens"])
    for targets, said in [
        (
            ["q_proj", "qproj"],
            r"lora_target_modules: 'qproj' is not in this model; did you mean '\w_proj'\?; name some of down_proj,",
        ),
        (["("], r"lora_target_modules: '\(' is not in this model; name some of"),
        (["input_layernorm"], r"lora_target_modules: 'input_layernorm' takes no adapter"),
        (["q_proj", "lm_head"], r"lora_target_modules: 'lm_head' belongs to the head, which takes no adapter here;"),
    ]:
        with pytest.raises(UserError, match=said):
            check_target_modules(model, targets)


def test_a_kernel_that_is_not_there(models):
    with pytest.raises(UserError, match=r"^model: cannot load the model with attn_implementation: nosuch"):
        load_policy("model", attn_implementation="nosuch")


def test_a_new_head_is_no_missing_weight():
    model = tiny_llama(layers=1)
    report = {
        "missing_keys": {"score.weight", "model.pooler.dense.weight"},
        "mismatched_keys": {("score.bias", (2,), (1,))},
    }
    report["unexpected_keys"] = {"lm_head.bias"}
    check_report(model, report, "m", new_head=True)
    report["missing_keys"] |= {"model.layers.0.x", "model.layers.0.y"}
    with pytest.raises(UserError, match=r"m: the weights of this LlamaForCausalLM lack model.layers.0.x and 1 more"):
        check_report(model, report, "m", new_head=True)


def test_a_generate_function_of_the_folder_is_never_loaded(models):
    (models / "model" / "custom_generate").mkdir()
    put("custom_generate/generate.py", "import os; os.mkdir('ran')\ndef generate(model, **keys): pass\n")(
        models / "model"
    )
    assert load_policy("model").generate.__module__.startswith("transformers")
    assert not Path("ran").exists()


def test_a_pickle_is_never_loaded(models):
    """A file that would run a program, where a folder or transformers would take it: beside nothing, and by name."""
    torch.save(load_file(models / "model" / WEIGHTS), models / "model/pytorch_model.bin")
    (models / "model" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="cannot load the model"):  # even of tensors alone, which torch would load
        load_pretrained(AutoModelForCausalLM, "model")
    (models / "model/pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(UserError, match="cannot load the model"):
        load_pretrained(AutoModelForCausalLM, "model")
    assert not (models / "ran").exists()


def recipes() -> dict[str, StageRecipe | EvaluateRecipe]:
    """A recipe for each stage and key that names a model, with the broken one there."""
    rows: Any = {"output_dir": "out", "train_dataset": ["rows.jsonl"]}
    return {
        "sft": SFTRecipe(**rows, model_name_or_path="broken"),
        "reward": RewardRecipe(**rows, model_name_or_path="broken"),
        "reward, sft": RewardRecipe(**rows, model_name_or_path="model", sft_model_path="broken"),
        "ppo": PPORecipe(**rows, sft_model_path="broken"),
        "ppo, reward": PPORecipe(**rows, sft_model_path="model", reward_model_path="broken"),
        "ppo, value": PPORecipe(**rows, sft_model_path="model", value_model_path="broken"),
        "evaluate": EvaluateRecipe(output_dir="out", models={"a": "model", "b": "broken"}),
    }


@pytest.mark.parametrize("name", recipes())
def test_every_stage_inspects_its_models_before_it_writes_anything(models, name):
    (models / "model").rename("broken")
    shutil.copytree("broken", "model")
    cut(WEIGHTS)(models / "broken")
    recipe = recipes()[name]
    with pytest.raises(
        UserError, match=r"^(model_name_or_path|\w+_model_path|models\.b): broken/model.safetensors: is cut"
    ):
        compare.run(recipe) if isinstance(recipe, EvaluateRecipe) else open_stage(recipe)
    assert not Path("out").exists()
    inspect_inputs(recipe, made={Path("broken").resolve()})


OWN_CODE = {
    "model": (
        "config.json",
        {"auto_map": {"AutoConfig": "mine.A", "AutoModelForCausalLM": "mine.A"}, "model_type": "mine"},
    ),
    "model class": ("config.json", {"auto_map": {"AutoModelForCausalLM": "mine.A"}, "model_type": "bert"}),
    "kernel": ("config.json", {"attn_implementation": "some/code"}),
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["mine.A", None]}, "tokenizer_class": "A"}),
}


@pytest.mark.parametrize("what", [*OWN_CODE, "tokenizer of the base"])
def test_merge_runs_no_code_of_a_model(models, what):
    name, changes = OWN_CODE[what.removesuffix(" of the base")]
    if what == "tokenizer":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"model/{file}", "adapter")
    for folder in (models / "model", models / "adapter"):
        put("mine.py", "import os; os.mkdir('ran')")(folder)
        if (folder / name).exists():
            change(name, **changes)(folder)
    said = (
        "names the kernel some/code"
        if what == "kernel"
        else "cannot read its config.json|cannot be loaded on its base model"
    )
    with pytest.raises(UserError, match=said):
        merge.run("adapter", "merged")
    assert not Path("ran").exists()
    assert not Path("merged").exists()


def test_merge_inspects_its_adapter(models):
    assert "merged into model" in merge.run("adapter", "whole")
    for name, (change, said) in ADAPTERS.items():
        shutil.copytree("adapter", "adapter copy")
        shutil.copytree("model", "model copy")
        change(models / "adapter")
        with pytest.raises(UserError, match=r"^align merge: ") as error:
            merge.run("adapter", "merged")
        assert said in str(error.value), name
        assert not Path("merged").exists()
        for folder in ("adapter", "model"):
            shutil.rmtree(folder)
            Path(f"{folder} copy").rename(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 0}, "model_config: hidden_size: expected a whole number from 1"),
        ({"hidden_size": "big"}, "model_config: hidden_size: expected a whole number from 1"),
        ({"num_hidden_layers": 10**9}, "model_config: num_hidden_layers: expected a whole number from 1 to 10,000"),
        ({"hidden_size": 10, "num_attention_heads": 3}, "model_config: transformers cannot make this llama"),
        ({"hidden_act": "nosuch"}, "model_config: transformers cannot make this llama"),
    ],
)
def test_sizes_of_a_model_from_scratch(changes, said):
    with pytest.raises(UserError, match=said):
        scratch_config(
            {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, **changes}, 300
        )


def test_what_align_writes_passes(models):
    load_policy("model").save_pretrained("again")
    AutoTokenizer.from_pretrained("model").save_pretrained("again")
    assert inspect_folder("again", KEY) is not None


def test_an_adapter_without_a_tokenizer(tmp_path):
    LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="some/base").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer; copy tokenizer.json, .* from its base some/base"):
        load_tokenizer(str(tmp_path))
