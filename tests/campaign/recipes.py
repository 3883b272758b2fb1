"""Bad recipe files, command lines and folders of recipes."""

# fmt: off
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign import world
from tests.campaign.cases import Case, Refusal, cut, fifo, folder, link_to, refusals

SFT = "".join(
    f"{key}: {value}\n" for key, value in world.recipe("sft").items()
).encode()


def text(content: bytes | str, *says: str) -> Refusal:
    """A recipe file with this content."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return Refusal(files={"sft.yaml": content}, says=says or ("sft.yaml",))


def line(more: bytes | str, *says: str) -> Refusal:
    """A good recipe with one more line."""
    return text(SFT + (more.encode() if isinstance(more, str) else more) + b"\n", "sft.yaml", *says)


def file(make: Callable[[Path], None], *says: str) -> Refusal:
    return Refusal(files={"sft.yaml": make}, says=says or ("sft.yaml",))


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12))

FILES = {
    "empty": text(b""),
    "blank": text(b"\n  \n\n"),
    "a comment alone": text(b"# nothing\n"),
    "null": text(b"null\n"),
    "a list": text(b"- output_dir: out\n"),
    "a word": text(b"out\n"),
    "a number": text(b"42\n"),
    "NUL in a value": line(b"run_name: a\0b"),
    "all NUL": text(b"\0" * 100),
    "Latin-1": line("run_name: caf\xe9".encode("latin-1")),
    "UTF-16": text(SFT.decode().encode("utf-16")),
    "random bytes": text(bytes(range(256)) * 4),
    "gzip": text(b"\x1f\x8b\x08\0\0\0\0\0\0\x03K\xcd\xe5\x02\0"),
    "tabs": line("adam:\n\tbeta: 1"),
    "open quote": line('run_name: "abc'),
    "open bracket": line("lora_target_modules: [a, b"),
    "open brace": line("train_dataset: {path: x"),
    "two documents": line("---\nrun_name: b"),
    "unknown tag": line("run_name: !mine x"),
    "python call": line('run_name: !!python/object/apply:os.system ["touch canary"]'),
    "python name": line("run_name: !!python/name:os.system"),
    "python module": line("run_name: !!python/module:antigravity"),
    "binary value": line("run_name: !!binary aGVsbG8=", "run_name"),
    "set value": line("run_name: !!set {a, b}", "run_name"),
    "set of modules": line("lora_target_modules: !!set {a, b}", "lora_target_modules"),
    "date": line("run_name: 2026-01-31", "run_name"),
    "impossible date": line("run_name: 2026-02-31"),
    "time": line("seed: 2026-01-31T10:00:00Z", "seed"),
    "omap": line("generator_kwargs: !!omap [a: 1]"),
    "pairs in config": line("model_config: !!pairs [a: 1]", "model_config"),
    "no such anchor": line("run_name: *x"),
    "list in itself": line("lora_target_modules: &a [*a]", "lora_target_modules", "sft.yaml"),
    "mapping in itself": line("model_config: &a {model_type: *a}", "model_config", "sft.yaml"),
    "billion laughs": line(LAUGHS + "lora_target_modules: *a9"),
    "billion laughs in an unknown key": line(LAUGHS),
    "nested merges": line(MERGES),
    "merge of a number": line("<<: 3"),
    "deep list": line("lora_target_modules: " + "[" * 20000 + "]" * 20000),
    "deep mapping": line("model_config: " + "{a: " * 5000 + "1" + "}" * 5000),
    "deep open brackets": line("x: " + "[" * 100000),
    "key twice": line("output_dir: elsewhere"),
    "null key": line("? \n: 1"),
    "list as key": line("? [a, b]\n: 1"),
    "mapping as key": line("? {a: b}\n: 1"),
    "number as key": line("5: 1"),
    "yes as key": line("yes: 1"),
    "date as key": line("2026-01-31: 1"),
    "escape in a key": line('"\\e[31mseed\\e[0m": 1'),
    "line break in a key": line('"se\\ned": 1'),
    "right-to-left in a key": line('"se\\u202eed": 1'),
    "bell in a value": line('lr_scheduler_type: "li\\anear"', "lr_scheduler_type"),
    "clear screen in a value": line('method: "\\e[2J"', "method"),
    "key of a megabyte": line("k" * 1_000_000 + ": 1"),
    "value of ten megabytes": line("method: " + "v" * 10_000_000, "method"),
    "100,000 unknown keys": line("".join(f"k{i}: 1\n" for i in range(100_000))),
    "YAML 3": text(b"%YAML 3.0\n---\n" + SFT),
    "seed of 5000 digits": line("seed: " + "1" * 5000),
    "lone surrogate": line('run_name: "a\\ud800b"'),
    "lone surrogate as output_dir": text(SFT.replace(b"output_dir: out", b'output_dir: "o\\ud800"'), "output_dir", "sft.yaml"),
    "other stage": Refusal(files={"sft.yaml": SFT.replace(b"stage: sft", b"stage: ppo")}, says=["stage", "sft.yaml:1"]),
    "stage is a list": Refusal(files={"sft.yaml": SFT.replace(b"stage: sft", b"stage: [sft]")}, says=["stage", "sft.yaml:1"]),
    "stage is a mapping": Refusal(files={"sft.yaml": SFT.replace(b"stage: sft", b"stage: {a: b}")}, says=["stage", "sft.yaml:1"]),
    "stage is a date": Refusal(files={"sft.yaml": SFT.replace(b"stage: sft", b"stage: 2026-01-31")}, says=["stage", "sft.yaml:1"]),
    "a folder": file(folder),
    "a pipe": file(fifo),
    "endless": file(link_to("/dev/zero")),
    "a link to nothing": file(link_to("gone.yaml")),
    "a link to itself": file(link_to("sft.yaml")),
    "half of it": file(cut),
    "no such file": Refusal(words=["sft", "sfd.yaml"], says=["sfd.yaml"]),
    "no such folder": Refusal(words=["sft", "no/such/sft.yaml"], says=["no/such/sft.yaml"]),
    "a name of 300 letters": Refusal(words=["sft", "n" * 300], says=["nnnn", "recipe"]),
    "an empty name": Refusal(words=["sft", ""], says=["recipe"]),
    "weights as recipe": Refusal(words=["sft", "base/model.safetensors"], says=["base/model.safetensors"]),
    "an escape in the name": Refusal(words=["sft", "\x1b[31m.yaml"], says=[".yaml"]),
}

COMMANDS = {
    "nothing": Refusal(words=["sft"], says=["recipe"]),
    "unknown command": Refusal(words=["stf", "sft.yaml"], says=["stf"]),
    "escape as command": Refusal(words=["\x1b[2J"], says=["unknown"]),
    "unknown key": Refusal(words=["sft", "sft.yaml", "--sead", "1"], says=["--sead", "sead"]),
    "stray word": Refusal(words=["sft", "sft.yaml", "extra"], says=["extra"]),
    "dashes alone": Refusal(words=["sft", "sft.yaml", "--", "x"], says=["--"]),
    "no value": Refusal(words=["sft", "sft.yaml", "--seed"], says=["--seed"]),
    "two values": Refusal(words=["sft", "sft.yaml", "--seed", "1", "2"], says=["--seed"]),
    "value of another type": Refusal(words=["sft", "sft.yaml", "--seed", "abc"], says=["--seed"]),
    "equals nothing": Refusal(words=["sft", "sft.yaml", "--seed="], says=["--seed"]),
    "no name": Refusal(words=["sft", "sft.yaml", "--=5"], says=["--"]),
    "dot at the end": Refusal(words=["sft", "sft.yaml", "--train_dataset.", "5"], says=["train_dataset"]),
    "dot at the start": Refusal(words=["sft", "sft.yaml", "--.x", "5"], says=["--", ".x"]),
    "part of a number": Refusal(words=["sft", "sft.yaml", "--seed.x", "5"], says=["seed"]),
    "part of a list": Refusal(words=["sft", "sft.yaml", "--lora_target_modules.a", "5"], says=["lora_target_modules"]),
    "bytes that are not UTF-8": Refusal(words=["sft", "sft.yaml", "--run_name", "a\udcff", "b"], says=["--run_name"]),
    "file name that is not UTF-8": Refusal(words=["sft", "\udcff.yaml"], says=[".yaml"]),
    "escape in an override": Refusal(words=["sft", "sft.yaml", "--\x1b[31mx", "1"], says=["unknown"]),
    "billion laughs in an override": Refusal(words=["sft", "sft.yaml", "--model_config", LAUGHS.replace("\n", " ")], says=["model_config"]),
    "nested override": Refusal(words=["sft", "sft.yaml", "--model_config", "[" * 5000], says=["model_config"]),
    "python in an override": Refusal(words=["sft", "sft.yaml", "--seed", '!!python/object/apply:os.system ["touch canary"]'], says=["seed"]),
    "5000 digits in an override": Refusal(words=["sft", "sft.yaml", "--seed", "1" * 5000], says=["seed"]),
    "run: a file": Refusal(words=["run", "sft.yaml"], says=["sft.yaml"]),
    "run: no such folder": Refusal(words=["run", "recipse"], says=["recipse"]),
    "run: no recipes": Refusal(words=["run", "data"], says=["data"]),
    "run: no processes": Refusal(words=["run", ".", "--num_gpus", "0"], says=["--num_gpus"]),
    "run: minus one process": Refusal(words=["run", ".", "--num_gpus", "-1"], says=["--num_gpus"]),
    "run: processes by name": Refusal(words=["run", ".", "--num_gpus", "two"], says=["--num_gpus"]),
    "run: digits of another script": Refusal(words=["run", ".", "--num_gpus", "²"], says=["--num_gpus"]),
    "run: a number twice": Refusal(files={"r/1_a.yaml": SFT, "r/01_b.yaml": SFT}, words=["run", "r"], says=["1_a.yaml", "01_b.yaml"]),
    "run: one output for two": Refusal(files={"r/1_a.yaml": SFT, "r/2_b.yaml": SFT}, words=["run", "r"], says=["output_dir"]),
    "run: outputs inside one another": Refusal(files={"r/1_a.yaml": SFT, "r/2_b.yaml": SFT.replace(b"output_dir: out", b"output_dir: out/b")}, words=["run", "r"], says=["output_dir"]),
    "run: a folder as recipe": Refusal(files={"r/1_a.yaml/x": b""}, words=["run", "r"], says=["1_a.yaml"]),
    "run: digits of another script in a name": Refusal(files={"r/²_a.yaml": SFT}, words=["run", "r"], says=["r"]),
    "run: stage is missing": Refusal(files={"r/1_a.yaml": b"output_dir: x\n"}, words=["run", "r"], says=["stage"]),
    "run: the second is wrong": Refusal(files={"r/1_a.yaml": SFT, "r/2_b.yaml": b"stage: sft\noutput_dir: b\n"}, words=["run", "r"], says=["2_b.yaml"]),
    "check: no such recipe": Refusal(words=["check", "nothing.yaml"], says=["nothing.yaml"]),
    "check: binary": Refusal(words=["check", "base/model.safetensors"], says=["base/model.safetensors"]),
    "merge: nothing": Refusal(words=["merge"], says=["merge"]),
    "merge: no adapter": Refusal(words=["merge", "base", "merged"], says=["base"]),
    "merge: no such folder": Refusal(words=["merge", "no", "merged"], says=["no"]),
    "merge: broken settings": Refusal(files={"ad/adapter_config.json": b"{"}, words=["merge", "ad", "merged"], says=["ad"]),
    "verify: unknown key": Refusal(words=["verify", "--nosuch", "1"], says=["nosuch"]),
}


def cases() -> Iterator[Case]:
    yield from refusals("recipe files", FILES)
    yield from refusals("command lines", COMMANDS)
