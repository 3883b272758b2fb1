"""Damaged and forged files: a stage goes on to the same end, or says which file it cannot use. Nothing in them runs."""

# fmt: off
from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.cases import Case, Place, folder
from tests.campaign.judge import changed, refused
from tests.campaign.models import POINTER
from tests.campaign.runs import OUT, prepare, resumes, start, take, unfinished, whole

Harm = Callable[[Path, random.Random], object]


# What can happen to a file.
def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip(path: Path, draw: random.Random) -> None:
    """One bit."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def zero(path: Path, draw: random.Random) -> None:
    """Zeros instead of its last bytes, as after a crash of the machine."""
    keep = draw.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:keep] + bytes(path.stat().st_size - keep))


def garbage(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(path.stat().st_size))


def write(content: bytes) -> Harm:
    return lambda path, draw: path.write_bytes(content)


def lose(path: Path, draw: random.Random) -> None:
    path.unlink()


def become_folder(path: Path, draw: random.Random) -> None:
    folder(path)


def link_to_notes(path: Path, draw: random.Random) -> None:
    """The user's file takes its place."""
    path.unlink(missing_ok=True)
    path.symlink_to("../" * len(path.relative_to(_case_of(path)).parts[:-1]) + "notes.txt")


def _case_of(path: Path) -> Path:
    return next(parent for parent in path.parents if (parent / "notes.txt").exists())


def edit(**changes: Any) -> Harm:
    """Entries of a JSON file; None deletes one. The digest of `complete.json` is made to fit."""
    def harm(path: Path, draw: random.Random) -> None:
        content = json.loads(path.read_text()) | changes
        _write_signed(path, {name: value for name, value in content.items() if value is not None})
    return harm


def progress(**changes: Any) -> Harm:
    """Entries of what a checkpoint of PPO says of the run so far."""
    def harm(path: Path, draw: random.Random) -> None:
        found = json.loads(path.read_text())["progress"] | changes
        edit(progress={name: value for name, value in found.items() if value is not None})(path, draw)
    return harm


def _write_signed(path: Path, content: dict[str, Any]) -> None:
    """Whoever can write the file can write its sums too."""
    if "digest" in content:
        content.pop("digest")
        content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path.write_text(json.dumps(content))


def forge(checkpoint: Path) -> None:
    """Make `complete.json` fit the files of its checkpoint."""
    complete = checkpoint / "complete.json"
    content = json.loads(complete.read_text())
    content["files"] = {
        path.relative_to(checkpoint).as_posix(): [path.stat().st_size, zlib.crc32(path.read_bytes())]
        for path in sorted(checkpoint.rglob("*")) if path.is_file() and path != complete
    }
    _write_signed(complete, content)


class Payload:
    """A program in the form of a pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary_pickle",)


def pickled(path: Path, draw: random.Random) -> None:
    """A pickle with a program, as `torch.save` writes it."""
    import torch

    torch.save(Payload(), path)


def plainly_pickled(path: Path, draw: random.Random) -> None:
    path.write_bytes(pickle.dumps(Payload()))


@dataclass(frozen=True)
class Damage:
    """Harm to files of a killed run (or of a finished one), then the same command again.

    Attributes:
        files: a pattern in the output folder; of several, the seed draws one. A name without wildcards may be new.
        says: words of which an error has to have one; by default the file's name.
        forged: whether `complete.json` is made to fit.
        must: "resume": it may not refuse; "refuse": it may not go on; "say": either, with a word.
    """

    stage: str
    files: str
    harm: Harm
    layout: str = "alone"
    says: Sequence[str] = ()
    forged: bool = False
    finished: bool = False
    must: str = "say"

    def __call__(self, place: Place) -> list[str]:
        prepare(place, self.stage, self.layout)
        out = take(place, (whole if self.finished else unfinished)(place, self.stage, self.layout))
        found = sorted(path for path in out.glob(self.files) if path.is_file() and path.stat().st_size)
        if not found and "*" in self.files:
            return []  # this tree writes no such file
        path = place.random.choice(found) if found else out / self.files
        path.parent.mkdir(parents=True, exist_ok=True)
        self.harm(path, place.random)
        if self.forged:
            forge(out / path.relative_to(out).parts[0])
        says = self.says or [path.name, path.relative_to(out).parts[0], "differs in"]
        if self.must == "refuse":
            return refused(start(place, self.stage, self.layout), says)
        return [f"{problem} ({path.relative_to(out)})" for problem in resumes(place, self.stage, self.layout, says, may_refuse=self.must != "resume")]


def newest(place: Path) -> str:
    return max(place.glob("checkpoint-*")).name


LAST = "checkpoint-4"  # PPO saves no checkpoint of its last update
LAST_OF = {"sft": LAST, "reward": LAST, "classify": LAST, "mlm": LAST, "ppo": "checkpoint-3"}
OUTSIDE = {"../../notes.txt": 0}

FILES = {
    # Weights and states of a checkpoint: noticed by their sums, and the checkpoint before it is used.
    **{f"{stage}: {harm.__name__} {files}": Damage(stage, f"{LAST_OF[stage]}/{files}", harm, must="resume")
       for stage, files, harm in (
           ("sft", "model.safetensors", cut), ("sft", "*optimizer*", flip), ("sft", "*", zero), ("reward", "*", flip), ("reward", "*", garbage), ("reward", "model.safetensors", lose),
           ("ppo", "*", flip), ("ppo", "**/*.safetensors", zero), ("ppo", "**/*.json", cut), ("classify", "*", cut), ("mlm", "*", flip), ("mlm", "trainer_state.json", write(b"")))},
    "sft at zero2: flip a shard": Damage("sft", f"{LAST}/**/*", flip, "zero2", must="resume"),
    "ppo at zero2: cut a shard": Damage("ppo", "checkpoint-3/**/*", cut, "zero2", must="resume"),
    # complete.json
    **{f"complete.json: {name}": Damage("sft", f"{LAST}/complete.json", harm, must="resume") for name, harm in (
        ("cut", cut), ("empty", write(b"")), ("lost", lose), ("bit", flip), ("garbage", garbage), ("zeros", zero))},
    **{f"complete.json: {name}": Damage("sft", f"{LAST}/complete.json", harm) for name, harm in (
        ("list", write(b"[]")), ("nothing", write(b"{}")), ("null", write(b"null")), ("deep", write(b"[" * 100_000)), ("folder", become_folder), ("link", link_to_notes),
        ("records is a list", edit(records=[1])), ("records outside", edit(records=OUTSIDE)), ("records of text", edit(records={"metrics.jsonl": "all"})),
        ("negative record", edit(records={"metrics.jsonl": -1})), ("no records", edit(records=None)), ("files is a number", edit(files=5)), ("no files", edit(files=None)),
        ("files outside", edit(files={"../../notes.txt": [6, 0]})), ("best outside", edit(best_checkpoint="../../data")), ("no layout", edit(layout=None)), ("layout is a list", edit(layout=[1])))},
    "complete.json: absolute record": Damage("ppo", "checkpoint-3/complete.json", lambda path, draw: edit(records={str(_case_of(path) / "notes.txt"): 0})(path, draw)),
    # What a judged run has chosen, and counted
    **{f"ppo, judged: {harm.__name__} {files}": Damage("ppo", f"checkpoint-3/{files}", harm, "judged", must="resume")
       for files, harm in (("complete.json", flip), ("**/*", cut), ("policy/*", garbage), ("ema/*", zero), ("value/*", lose))},
    "ppo, judged at two: flip a shard": Damage("ppo", "checkpoint-3/**/*", flip, "judged two", must="resume"),
    **{f"ppo, judged: progress: {name}": Damage("ppo", "checkpoint-3/complete.json", progress(**changes), "judged", must="refuse") for name, changes in (
        ("worth of other prompts", {"best_worth": [0.5]}), ("worth of text", {"best_worth": ["a", "b", "c", "d"]}), ("worth is a number", {"best_worth": 1}), ("best is empty", {"best": {}}),
        ("best of text", {"best": {"update": "one", "eval/judge": "good", "eval/score": []}}), ("falls of text", {"falls": "two"}), ("negative falls", {"falls": -1}), ("history of numbers", {"history": [1]}),
        ("history of nothing", {"history": [{}]}), ("history of text", {"history": [{"update": "a", "eval/judge": "b", "eval/kl": "c"}]}), ("moments of text", {"score_moments": {"count": "a", "mean": 0, "squares": 0}}))},
    **{f"ppo, {layout}: {harm.__name__} best/{name}": Damage("ppo", f"best/{name}", harm, layout) for layout in ("judged", "better") for name, harm in (
        ("model.safetensors", flip), ("model.safetensors", cut), ("model.safetensors", lose), ("config.json", cut), ("*", link_to_notes))},
    **{f"members: {harm.__name__} {name}": Damage("reward", name, harm, "members", must=must) for name, harm, must in (
        ("member_1/checkpoint-4/*", flip, "resume"), ("member_1/checkpoint-4/*", cut, "resume"), ("member_1/run.json", lose, "refuse"), ("member_1/run.json", cut, "refuse"), ("run.json", cut, "refuse"), ("member_1/metrics.jsonl", cut, "say"))},
    **{f"finished members: {harm.__name__} {name}": Damage("reward", name, harm, "members", finished=True, must="refuse") for name, harm in (
        ("stage.json", cut), )},
    # Other records of a killed run
    **{f"run.json: {name}": Damage("sft", "run.json", harm) for name, harm in (
        ("cut", cut), ("empty", write(b"")), ("bit", flip), ("garbage", garbage), ("list", write(b"[]")), ("nothing", write(b"{}")), ("no recipe", edit(recipe=None)),
        ("recipe is a list", edit(recipe=[])), ("no inputs", edit(inputs=None)), ("pointer file", write(POINTER)), ("folder", become_folder))},
    "run.json: lost": Damage("sft", "run.json", lose, must="refuse"),
    "run.json: lost by ppo": Damage("ppo", "run.json", lose, must="refuse"),
    **{f"metrics.jsonl: {name}": Damage("sft", "metrics.jsonl", harm) for name, harm in (
        ("cut", cut), ("empty", write(b"")), ("lost", lose), ("bit", flip), ("garbage", garbage), ("zeros", zero), ("not JSON", write(b"hello\n" * 9)), ("numbers", write(b"1\n2\n3\n")),
        ("no steps", write(b'{"a": 1}\n')), ("step is text", write(b'{"step": "two"}\n')), ("folder", become_folder), ("link", link_to_notes))},
    "samples.jsonl: lost": Damage("ppo", "samples.jsonl", lose),
    "samples.jsonl: cut": Damage("ppo", "samples.jsonl", cut),
    "samples.jsonl: link": Damage("ppo", "samples.jsonl", link_to_notes),
    # Records of a finished run
    **{f"stage.json: {name}": Damage("sft", "stage.json", harm, finished=True, must="refuse") for name, harm in (
        ("cut", cut), ("empty", write(b"")), ("garbage", garbage), ("list", write(b"[]")), ("nothing", write(b"{}")), ("no results", edit(results=None)), ("recipe is text", edit(recipe="r")),
        ("results is a list", edit(results=[])), ("folder", become_folder))},
    **{f"results.json: {name}": Damage("evaluate", "results.json", harm, finished=True, must="refuse") for name, harm in (
        ("cut", cut), ("empty", write(b"")), ("list", write(b"[]")), ("nothing", write(b"{}")), ("results is text", edit(results="r")))},
    **{f"results.json of best-of-n: {name}": Damage("bon", "results.json", harm, finished=True, must="refuse") for name, harm in (
        ("cut", cut), ("nothing", write(b"{}")), ("frontier is text", edit(frontier="f")), ("an entry without n", edit(frontier=[{}])))},
    **{f"samples of best-of-n: {name}": Damage("bon", "parts/*", harm) for name, harm in (
        ("cut", cut), ("empty", write(b"")), ("list", write(b"[]")), ("garbage", garbage), ("bit", flip))},
    **{f"part of an evaluation: {name}": Damage("evaluate", "parts/*", harm) for name, harm in (
        ("cut", cut), ("empty", write(b"")), ("list", write(b"[]")), ("nothing", write(b"{}")), ("bit", flip))},
}

# Names from the layouts of this tree and of earlier ones: a file that is not there now is put there.
PICKLES = {
    f"{stage} at {layout}: {name}{', plainly' if harm is plainly_pickled else ''}": Damage(stage, f"{LAST_OF[stage]}/{name}", harm, layout, forged=True, says=[LAST_OF[stage], name])
    for stage, layout, name, harm in (
        ("sft", "alone", "optimizer.pt", pickled), ("sft", "alone", "scheduler.pt", pickled), ("sft", "alone", "rng_state.pth", pickled), ("sft", "alone", "training_args.bin", pickled),
        ("sft", "alone", "optimizer.pt", plainly_pickled), ("sft", "alone", "pytorch_model.bin", pickled), ("reward", "alone", "scheduler.pt", plainly_pickled), ("sft", "zero2", "rng_state_1.pth", pickled),
        ("sft", "zero2", "global_step4/mp_rank_00_model_states.pt", pickled), ("sft", "zero2", "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", pickled), ("sft", "zero2", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt", pickled),
        ("ppo", "zero2", "policy/mp_rank_00_model_states.pt", pickled), ("ppo", "zero2", "value/zero_pp_rank_1_mp_rank_00_optim_states.pt", pickled), ("ppo", "alone", "policy/optimizer.pt", pickled), ("ppo", "alone", "state.pt", pickled),
        ("mlm", "alone", "optimizer.pt", pickled), ("classify", "alone", "rng_state.pth", plainly_pickled))
}


def forged_state(**changes: Any) -> Harm:
    """A trainer's state that says something else, with sums that fit."""
    def harm(path: Path, draw: random.Random) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return harm


PICKLES |= {
    f"trainer_state.json: {name}": Damage("sft", f"{LAST}/trainer_state.json", harm, forged=True, says=[LAST, "trainer_state"], must="refuse") for name, harm in (
        ("list", write(b"[]")), ("nothing", write(b"{}")), ("step is text", forged_state(global_step="four")), ("log is a number", forged_state(log_history=5)), ("not JSON", write(b"{")))
}


def names(*found: str, as_file: bool = False) -> Callable[[Place], list[str]]:
    """A user's folders or files beside the checkpoints of a killed run, with names that look like ours."""
    def check(place: Place) -> list[str]:
        prepare(place, "sft")
        out = take(place, unfinished(place, "sft"))
        for name in found:
            if as_file:
                (out / name).write_text("mine")
            else:
                shutil.copytree(out / LAST, out / name)
                (out / name / "mine.txt").write_text("mine")
        theirs = [each for each in place.snapshot() if each.startswith(tuple(f"{OUT}/{name}" for name in found))]
        before = {name: digest for name, digest in place.snapshot().items() if name in theirs}
        problems = resumes(place, "sft", says=found)
        after = {name: digest for name, digest in place.snapshot().items() if name in theirs}
        # They stay as they are: no leftover of the run.
        return [each for each in problems if not each.startswith("leftover")] + changed(before, after)
    return check


def within(path: str, stage: str = "sft", harm: Harm | None = None) -> Callable[[Place], list[str]]:
    """A user's file in a folder of the run that the run deletes in the end: it is kept beside it."""
    def check(place: Place) -> list[str]:
        prepare(place, stage)
        out = take(place, unfinished(place, stage))
        (out / path / "mine").mkdir(parents=True)
        (out / path / "mine" / "notes.txt").write_text("mine")
        if harm is not None:
            harm(out / path / "complete.json", place.random)
        problems = [each for each in resumes(place, stage, says=[path]) if not each.startswith("leftover")]
        if not any(each.read_text() == "mine" for each in out.rglob("mine/notes.txt")):
            problems.append(f"lost file: {path}/mine/notes.txt")
        return problems
    return check


def linked_checkpoint(place: Place) -> list[str]:
    """A checkpoint that is a link to a folder of the user's: neither followed nor emptied."""
    prepare(place, "sft")
    out = take(place, unfinished(place, "sft"))
    shutil.move(out / "checkpoint-3", place.folder / "backup")
    (out / "checkpoint-3").symlink_to("../backup")
    return [each for each in resumes(place, "sft", says=["checkpoint-3"]) if not each.startswith("leftover")]


def forged_pointer(place: Place) -> list[str]:
    """The W&B record of another program."""
    prepare(place, "sft", keys={"report_to": "wandb"})
    out = take(place, unfinished(place, "sft"))
    (out / "wandb_run.json").write_text(place.random.choice(["[]", "{", '{"id": 5}', '{"id": "../../x", "processes": 0}', '{"id": "a", "processes": "many"}', "null"]))
    return [each for each in resumes(place, "sft", says=["wandb_run.json"]) if not each.startswith("leftover")]


def altered(stage: str, path: str, harm: Harm, *says: str) -> Callable[[Place], list[str]]:
    """An input that is another one when a killed run goes on: named, and refused."""
    def check(place: Place) -> list[str]:
        prepare(place, stage)
        take(place, unfinished(place, stage))
        harm(place.folder / path, place.random)
        before = place.snapshot()
        return refused(start(place, stage), says or [path, Path(path).name]) + changed(before, place.snapshot(), [f"{OUT}/run.lock"])
    return check


def append(line: bytes) -> Harm:
    return lambda path, draw: path.write_bytes(path.read_bytes() + line)


def replace(old: bytes, new: bytes) -> Harm:
    def harm(path: Path, draw: random.Random) -> None:
        assert old in path.read_bytes(), path
        path.write_bytes(path.read_bytes().replace(old, new, 1))
    return harm


def one_weight(path: Path, draw: random.Random) -> None:
    """The lowest bit of a weight: of the header nothing."""
    content = bytearray(path.read_bytes())
    content[-4 * draw.randrange(1, 99)] ^= 1
    path.write_bytes(content)


ALTERED = {
    "a training row": altered("sft", "data/answers.jsonl", replace(b"bcd", b"bce")),
    "a training row more": altered("reward", "data/pairs.jsonl", append(b'{"prompt": "ab", "chosen": "cd", "rejected": "e"}\n')),
    "an evaluation row": altered("sft", "data/answers_eval.jsonl", replace(b"xyz", b"xyy")),
    "an evaluation prompt of ppo": altered("ppo", "data/prompts_eval.jsonl", replace(b'"st"', b'"su"')),
    "prompts in another order": altered("ppo", "data/prompts.jsonl", lambda path, draw: path.write_bytes(b"".join(sorted(path.read_bytes().splitlines(keepends=True), reverse=True)))),
    "a label": altered("classify", "data/labels.jsonl", replace(b'"yes"', b'"no"')),
    "a text": altered("mlm", "data/texts.jsonl", replace(b"zyxyz", b"zyxyy")),
    "a weight of the model": altered("sft", "base/model.safetensors", one_weight, "base", "model_name_or_path"),
    "a weight of the reference": altered("ppo", "base/model.safetensors", one_weight, "base", "sft_model_path"),
    "a weight of the encoder": altered("mlm", "encoder/model.safetensors", one_weight, "encoder", "model_name_or_path"),
    "a reward function": altered("ppo", "functions.py", replace(b'count("a")', b'count("b")'), "functions"),
    "a number in the recipe": altered("sft", "sft.yaml", replace(b"learning_rate: 0.01", b"learning_rate: 0.02"), "learning_rate"),
    "the model's tokenizer": altered("sft", "base/tokenizer.json", replace(b'"z":', b'"Z":'), "base", "tokenizer", "model_name_or_path"),
    "a model that is compared": altered("evaluate", "other/model.safetensors", one_weight, "other"),
    "a row that models are compared on": altered("evaluate", "data/answers_eval.jsonl", replace(b"xyz", b"xyy")),
    "a weight of the model that is sampled": altered("bon", "base/model.safetensors", one_weight, "model_name_or_path"),
    "a prompt of best-of-n": altered("bon", "data/prompts.jsonl", append(b'{"prompt": "ab"}\n')),
    "a number in the recipe of best-of-n": altered("bon", "bon.yaml", replace(b"num_generations: 3", b"num_generations: 4"), "num_generations"),
    "the reward of best-of-n": altered("bon", "functions.py", replace(b'count("a")', b'count("b")'), "functions"),
}


def cases() -> Iterator[Case]:
    yield from (Case("damaged files", name, damage) for name, damage in FILES.items())
    yield from (Case("forged files", name, damage) for name, damage in PICKLES.items())
    yield from (Case("altered inputs", name, check) for name, check in ALTERED.items())
    for name, check in {
        "a folder checkpoint-mine": names("checkpoint-mine"), "a folder checkpoint-99": names("checkpoint-99"), "a folder of many digits": names("checkpoint-" + "9" * 30), "a copy of a checkpoint": names("checkpoint-4 (copy)"),
        "a file checkpoint-5": names("checkpoint-5", as_file=True), "a damaged checkpoint of the user": names("damaged-checkpoint-9"), "a partial folder of the user": names(".mine.partial"), "a log of the user": names("mine.jsonl", as_file=True),
        "a file like one of ours that is being written": names(".metrics.jsonl.5", as_file=True), "one like the manifest's": names(".stage.json.1", as_file=True),
        "notes in a checkpoint": within("checkpoint-3"), "notes in a partial checkpoint": within(LAST, harm=lose), "notes in a damaged checkpoint": within(LAST, harm=garbage),
        "notes among the parts of an evaluation": within("parts", "evaluate"),
        "notes of the user": names("notes.md", as_file=True), "a linked checkpoint": linked_checkpoint, "wandb_run.json": forged_pointer,
    }.items():
        yield Case("users' files", name, check)
