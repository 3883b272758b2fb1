"""Broken model folders and DeepSpeed files."""

# fmt: off
from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaign.cases import Case, Content, Refusal, cut, fifo, folder, link_to, refusals

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
CANARY_PICKLE = b"cos\nsystem\n(S'touch canary_pickle'\ntR."  # a program in the form of a pickle
CANARY_CODE = b"open('canary_code', 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change entries of a JSON file."""
    def change(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


def header(content: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header alone."""
    return struct.pack("<Q", len(content) if length is None else length) + content


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the tensors of a safetensors file."""
    def rewrite(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        found = load_file(path)
        change(found)
        save_file(found, path, {"format": "pt"})
    return rewrite


def poison(value: float) -> Callable[[dict[str, Any]], object]:
    return lambda found: next(iter(found.values())).view(-1).__setitem__(0, value)


def clip(found: dict[str, Any]) -> None:
    name = next(name for name in found if "layers" in name and found[name].ndim == 2)
    found[name] = found[name][:-1].contiguous()


def pickled(path: Path) -> None:
    path.write_bytes(CANARY_PICKLE)
    path.with_name("model.safetensors").unlink()


def sharded(*files: str) -> Callable[[Path], None]:
    """An index that names these files."""
    def write(path: Path) -> None:
        names = {f"w{i}": file for i, file in enumerate(files)}
        path.write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": names}))
        path.with_name("model.safetensors").unlink()
    return write


def in_base(name: str, content: Content, *says: str, stage: str = "sft", **more: Any) -> Refusal:
    return Refusal(stage, files={f"base/{name}": content}, says=says or ("base",), **more)


def config(*says: str, **changes: Any) -> Refusal:
    return in_base("config.json", edit(**changes), *says)


def adapter(settings: Content, **files: Content) -> Refusal:
    """The model is an adapter in the folder `ad`."""
    paths = {f"ad/{name.replace('__', '.')}": content for name, content in files.items()}
    return Refusal(files={"ad/adapter_config.json": settings, **paths}, keys={"model_name_or_path": "ad"}, says=["ad", "model_name_or_path"])


LORA = {"peft_type": "LORA", "base_model_name_or_path": "base", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
WEIGHTS = "model.safetensors"
MODELS = {
    "weights are gone": in_base(WEIGHTS, None),
    "weights are empty": in_base(WEIGHTS, b""),
    "weights are cut": in_base(WEIGHTS, cut),
    "weights are garbage": in_base(WEIGHTS, bytes(range(256)) * 99),
    "weights are text": in_base(WEIGHTS, b"hello\n"),
    "weights are a pointer file": in_base(WEIGHTS, POINTER),
    "weights are a folder": in_base(WEIGHTS, folder),
    "weights are a link to nothing": in_base(WEIGHTS, link_to("gone")),
    "weights are a pipe": in_base(WEIGHTS, fifo),
    "header of eight exabytes": in_base(WEIGHTS, header(b"{}", 2**63)),
    "header of 100 GB": in_base(WEIGHTS, header(b"{}", 10**11)),
    "header is not JSON": in_base(WEIGHTS, header(b"{not json")),
    "header without tensors": in_base(WEIGHTS, header(b"{}")),
    "header is a list": in_base(WEIGHTS, header(b"[1, 2]")),
    "tensor beyond the end": in_base(WEIGHTS, header(b'{"w": {"dtype": "F32", "shape": [999], "data_offsets": [0, 3996]}}')),
    "tensor of an unknown type": in_base(WEIGHTS, header(b'{"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4)),
    "NaN in a weight": in_base(WEIGHTS, tensors(poison(float("nan")))),
    "infinity in a weight": in_base(WEIGHTS, tensors(poison(float("inf")))),
    "a tensor is missing": in_base(WEIGHTS, tensors(lambda found: found.pop(next(name for name in found if "mlp" in name)))),
    "a tensor of another shape": in_base(WEIGHTS, tensors(clip)),
    "pickled weights alone": in_base("pytorch_model.bin", pickled),
    "index names a missing file": in_base("model.safetensors.index.json", sharded("model-00001-of-00001.safetensors")),
    "index leaves the folder": in_base("model.safetensors.index.json", sharded("../scorer/model.safetensors")),
    "index names /etc": in_base("model.safetensors.index.json", sharded("/etc/passwd")),
    "index is garbage": in_base("model.safetensors.index.json", lambda path: (path.write_bytes(b"{"), path.with_name(WEIGHTS).unlink())),
    "config is gone": in_base("config.json", None),
    "config is empty": in_base("config.json", b""),
    "config is cut": in_base("config.json", cut),
    "config is a list": in_base("config.json", b"[]"),
    "config is null": in_base("config.json", b"null"),
    "config has nothing": in_base("config.json", b"{}"),
    "config is not UTF-8": in_base("config.json", b'{"model_type": "\xff"}'),
    "config is a folder": in_base("config.json", folder),
    "config is a pipe": in_base("config.json", fifo),
    "config is deep": in_base("config.json", b"[" * 100_000),
    **{f"generation_config.json: {key} {value!r:.20}": in_base("generation_config.json", edit(**{key: value}), "generation_config.json", key)
       for key, value in [("eos_token_id", -5), ("eos_token_id", 10**30), ("eos_token_id", [2, -1]), ("watermarking_config", "x"),
                          ("watermarking_config", {"a": 1}), ("pad_token_id", "x"), ("temperature", [1])]},
    **{f"tokenizer_config.json: {key}": in_base("tokenizer_config.json", edit(**{key: value}), "tokenizer_config.json", key)
       for key, value in [("model_max_length", "x"), ("chat_template", {"default": 5}), ("added_tokens_decoder", {"x": 1})]},
    "hidden size 0": config(hidden_size=0),
    "hidden size -1": config(hidden_size=-1),
    "hidden size is text": config(hidden_size="big"),
    "hidden size of 5000 digits": in_base("config.json", b'{"model_type": "llama", "hidden_size": ' + b"1" * 5000 + b"}"),
    "hidden size a billion": config(hidden_size=10**9, intermediate_size=10**9),
    "no layers": config(num_hidden_layers=0),
    "layers is text": config(num_hidden_layers="two"),
    "layers -1": config(num_hidden_layers=-1),
    "a million layers": config(num_hidden_layers=10**6),
    "heads 0": config(num_attention_heads=0),
    "vocabulary 0": config(vocab_size=0),
    "vocabulary too small": config(vocab_size=5),
    "vocabulary is text": config(vocab_size="all"),
    "positions 0": config(max_position_embeddings=0),
    "positions is text": config(max_position_embeddings="many"),
    "unknown type": config(model_type="nosuch"),
    "type is a list": config(model_type=["llama"]),
    "type with escapes": config(model_type="\x1b[31mllama"),
    "unknown activation": config(hidden_act="nosuch"),
    "code of its own": Refusal(files={"base/config.json": edit(auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}, model_type="mine"), "base/mine.py": CANARY_CODE}, says=["base"]),
    "kernel of the hub": config(attn_implementation="kernels-community/flash-attn"),
    "kernel of the hub, by a private name": config(_attn_implementation="some/code@main:attend"),
    "tokenizer is gone": in_base("tokenizer.json", None),
    "tokenizer is empty": in_base("tokenizer.json", b""),
    "tokenizer is cut": in_base("tokenizer.json", cut),
    "tokenizer is a list": in_base("tokenizer.json", b"[]"),
    "tokenizer is a pointer file": in_base("tokenizer.json", POINTER),
    "tokenizer settings are cut": in_base("tokenizer_config.json", cut),
    "tokenizer settings are a list": in_base("tokenizer_config.json", b"[]"),
    "no end of text": in_base("tokenizer_config.json", edit(eos_token=None)),
    "end of text is a number": in_base("tokenizer_config.json", edit(eos_token=5)),
    "end of text is new": in_base("tokenizer_config.json", edit(eos_token="<nosuch>")),
    "tokenizer with code of its own": Refusal(files={"base/tokenizer_config.json": edit(tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Tokenizer", None]}), "base/mine.py": CANARY_CODE}, says=["base"]),
    "unfinished stage": in_base("run.json", b"{}"),
    "manifest is empty": in_base("stage.json", b""),
    "manifest is a list": in_base("stage.json", b"[]"),
    "manifest has nothing": in_base("stage.json", b"{}"),
    "manifest is cut": in_base("stage.json", b'{"stage": "sft", "rec'),
    "manifest of another tokenizer": in_base("stage.json", json.dumps({"stage": "sft", "tokenizer": 5, "recipe": {}, "inputs": {}, "results": {}}).encode()),
    "ppo: reward model is cut": Refusal("ppo", keys={"reward_model_path": "scorer"}, files={"scorer/model.safetensors": cut}, says=["scorer"]),
    "ppo: reward model without a head": Refusal("ppo", keys={"reward_model_path": "scorer"}, files={"scorer/model.safetensors": tensors(lambda found: found.pop("score.weight"))}, says=["scorer"]),
    "ppo: reward model with NaN": Refusal("ppo", keys={"reward_model_path": "scorer"}, files={"scorer/model.safetensors": tensors(poison(float("nan")))}, says=["scorer"]),
    "mlm: weights are cut": Refusal("mlm", files={"encoder/model.safetensors": cut}, says=["encoder"]),
    "classify: weights are a pointer file": Refusal("classify", files={"encoder/model.safetensors": POINTER}, says=["encoder"]),
    "evaluate: the second model is cut": Refusal("evaluate", files={"other/model.safetensors": cut}, says=["other"]),
    "reward: weights are garbage": in_base(WEIGHTS, bytes(range(256)) * 99, stage="reward"),
    "adapter: settings are cut": adapter(b'{"peft_type": "LO'),
    "adapter: settings are a list": adapter(b"[]"),
    "adapter: a module to import": adapter({**LORA, "megatron_config": {"a": 1}, "megatron_core": "mine"}),
    "adapter: no base named": adapter({"peft_type": "LORA"}),
    "adapter: base is null": adapter({**LORA, "base_model_name_or_path": None}),
    "adapter: base is gone": adapter({**LORA, "base_model_name_or_path": "no/such/base"}),
    "adapter: base is itself": adapter({**LORA, "base_model_name_or_path": "ad"}),
    "adapter: no weights": adapter(LORA),
    "adapter: weights are cut": adapter(LORA, adapter_model__safetensors=header(b"{}", 99)),
    "adapter: pickled weights": adapter(LORA, adapter_model__bin=CANARY_PICKLE),
    "adapter: unknown kind": adapter({**LORA, "peft_type": "MAGIC"}),
    "adapter: rank is text": adapter({**LORA, "r": "two"}, adapter_model__safetensors=header(b"{}")),
}  # fmt: skip


def deepspeed(content: Content, *says: str, stage: str = "sft") -> Refusal:
    return Refusal(stage, files={"ds.json": content}, keys={"deepspeed": "ds.json"}, says=says or ("ds.json", "deepspeed"))


DEEPSPEED = {
    "gone": Refusal(keys={"deepspeed": "no_ds.json"}),
    "empty": deepspeed(b""),
    "not JSON": deepspeed(b"{zero"),
    "a list": deepspeed(b"[]"),
    "null": deepspeed(b"null"),
    "not UTF-8": deepspeed(b'{"a": "\xff"}'),
    "NUL": deepspeed(b"\0\0"),
    "a folder": deepspeed(folder),
    "a pipe": deepspeed(fifo),
    "endless": deepspeed(link_to("/dev/zero")),
    "deep": deepspeed(b"[" * 100_000),
    "a number of 5000 digits": deepspeed(b'{"zero_optimization": {"stage": ' + b"1" * 5000 + b"}}"),
    "fp16 is true": deepspeed({"fp16": True}),
    "fp16 is a list": deepspeed({"fp16": [True]}),
    "bf16 is a number": deepspeed({"bf16": 5}),
    "zero is a number": deepspeed({"zero_optimization": 3}),
    "zero is a list": deepspeed({"zero_optimization": [3]}),
    "stage is a word": deepspeed({"zero_optimization": {"stage": "three"}}),
    "stage is null": deepspeed({"zero_optimization": {"stage": None}}),
    "stage 7": deepspeed({"zero_optimization": {"stage": 7}}),
    "stage -1": deepspeed({"zero_optimization": {"stage": -1}}),
    "stage is a fraction": deepspeed({"zero_optimization": {"stage": 2.5}}),
    "offload to the moon": deepspeed({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "moon"}}}),
    "offload is a word": deepspeed({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}),
    "bucket is a word": deepspeed({"zero_optimization": {"stage": 2, "reduce_bucket_size": "lots"}}),
    "batch size of its own": deepspeed({"train_batch_size": 7, "zero_optimization": {"stage": 2}}),
    "batch size is a word": deepspeed({"train_batch_size": "seven", "zero_optimization": {"stage": 2}}),
    "an optimizer of its own": deepspeed({"optimizer": 5, "zero_optimization": {"stage": 2}}),
    "clipping is a word": deepspeed({"gradient_clipping": "tight", "zero_optimization": {"stage": 2}}),
    "ppo: zero is a number": deepspeed({"zero_optimization": 3}, stage="ppo"),
    "ppo: bucket is a word": deepspeed({"zero_optimization": {"stage": 2, "reduce_bucket_size": "lots"}}, stage="ppo"),
}  # fmt: skip


def cases() -> Iterator[Case]:
    yield from refusals("models", MODELS)
    yield from refusals("deepspeed files", DEEPSPEED)
