"""A reward model and its judge from halves of the pairs (`train_judge`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from align.cli.check.check import run as check
from align.cli.run import closing_tables
from align.config.ensemble import ensemble_members
from align.config.load import load_recipe
from align.config.reward import RewardRecipe, check_reward_rules
from align.data.rows import Preference
from align.data.split import is_for_judge
from align.errors import OtherRun, UserError
from align.ppo.train import run as run_ppo
from align.report.read import find_runs, read_run, with_members
from align.reward import members as members_module
from align.reward.train import run
from align.runs.manifest import is_finished, read_manifest
from align.runs.results import report_cards
from tests.ranks import run_stage
from tests.reward.test_members import same, weights
from tests.reward.test_train import HELD_OUT, ROWS, recipe
from tests.worlds import deepspeed_file, metrics, save_recipe, unfinished, write_jsonl


def judges(prompt: str) -> bool:
    digest = hashlib.sha256(json.dumps(["judge", [["user", prompt]]]).encode()).digest()
    return digest[0] < 128


HALVES = [[row for row in ROWS if judges(row[0]) is of_judge] for of_judge in (False, True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> RewardRecipe:
    """The recipe of a finished run: the judge has five pairs, the reward model three."""
    settings = recipe(tmp_path_factory.mktemp("judge"), eval_rows=HELD_OUT, train_judge=True, save_steps=1)
    run(settings)
    return settings


def test_each_is_the_model_that_a_plain_recipe_trains_on_its_half_to_the_bit(trained, tmp_path):
    assert [len(half) for half in HALVES] == [3, 5]
    assert sorted(HALVES[0] + HALVES[1]) == sorted(ROWS)
    out = Path(trained.output_dir)
    for folder, half, seed in ((out, HALVES[0], 42), (out / "judge", HALVES[1], 43)):
        rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in half]
        source = dataclasses.replace(trained.train_dataset[0], path=write_jsonl(tmp_path / f"{seed}.jsonl", rows))
        plain = dataclasses.replace(
            trained, train_judge=False, seed=seed, train_dataset=[source], output_dir=str(tmp_path / str(seed))
        )
        run(plain)
        assert same(weights(plain.output_dir), weights(folder)), folder
        ours, theirs = read_manifest(folder), read_manifest(plain.output_dir)
        assert ours["data"]["fingerprints"] == theirs["data"]["fingerprints"]
        assert ours["data"]["trained_rows"] == len(half)
        judge = ours["results"].pop("judge", None)
        assert (judge is None) == (folder != out)
        if judge is not None:
            assert judge == read_manifest(out / "judge")["results"]
            assert ours["results"].pop("table")[-1] == [f"{judge['table'][0][0]} (judge)", *judge["table"][0][1:]]
            del theirs["results"]["table"]
        assert ours["results"] == theirs["results"]
        for name in ("score_mean", "score_std", "score_check"):
            assert ours[name] == theirs[name]
    assert (out / "judge" / "card" / "card.md").is_file()
    for folder in (out, out / "judge"):
        assert "one for the reward model, the other for its judge" in (folder / "README.md").read_text()


@pytest.mark.parametrize("where", ["judge", "reward"])
def test_killed_in_either_it_goes_on_there(trained, where, tmp_path, monkeypatch):
    out = Path(shutil.copytree(Path(trained.output_dir).parent, tmp_path / "killed")) / "out"
    killed = dataclasses.replace(trained, output_dir=str(out))
    before = [weights(folder) for folder in (out, out / "judge")]
    stamp = (out / "judge" / "stage.json").stat().st_mtime_ns
    unfinished(out)
    if where == "judge":  # nothing of the reward model is there yet
        unfinished(out / "judge")
        (out / "judge" / "model.safetensors").unlink()  # written anew
        for entry in out.iterdir():
            if entry.name not in ("judge", "run.json"):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        record = json.loads((out / "run.json").read_text())
        (out / "run.json").write_text(json.dumps({**record, "files": ["judge"]}))
    calls = []
    real = members_module.record_run
    monkeypatch.setattr(members_module, "record_run", lambda *args: calls.append(args) or real(*args))
    run(killed)
    assert [same(one, weights(folder)) for one, folder in zip(before, (out, out / "judge"), strict=True)] == [True] * 2
    assert ((out / "judge" / "stage.json").stat().st_mtime_ns == stamp) == (where == "reward")
    assert len(calls) == (where == "judge"), "the record of a run with checkpoints is what its rows are compared with"


def test_rows_that_changed_since_are_refused_before_the_record_is_renewed(trained, tmp_path):
    out = Path(shutil.copytree(Path(trained.output_dir).parent, tmp_path / "killed")) / "out"
    unfinished(out)
    source = dataclasses.replace(trained.train_dataset[0], path=str(tmp_path / "other.jsonl"))
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": f"p{n}", "chosen": "zz", "rejected": "a"} for n in range(9)])
    for _ in range(2):
        with pytest.raises(UserError, match="train_dataset"):
            run(dataclasses.replace(trained, output_dir=str(out), train_dataset=[source]))


def killed_after_the_judge(trained: RewardRecipe, folder: Path, **changes) -> RewardRecipe:
    """The recipe of a run that is killed when its judge is finished, and its reward model has no checkpoint."""
    shutil.copytree(trained.output_dir, folder / "out")
    unfinished(folder / "out")
    for checkpoint in (folder / "out").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return dataclasses.replace(trained, output_dir=str(folder / "out"), **changes)


@pytest.mark.parametrize("key", ["train_judge", "ensemble_size", "learning_rate"])
def test_a_start_whose_judge_would_be_another_is_refused_by_the_name_of_the_key(trained, key, tmp_path):
    values = {"train_judge": False, "ensemble_size": 2, "learning_rate": 0.5}
    changed = killed_after_the_judge(trained, tmp_path, **{key: values[key]})
    with pytest.raises(OtherRun, match=f"holds an unfinished run that differs in {key}; delete"):
        run(changed)


def test_a_judge_of_other_pairs_is_no_judge_of_this_run_whatever_is_accepted(trained, tmp_path, capsys):
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS]
    rows[5] |= {"chosen": "zzz"}  # a pair of the judge
    assert judges(rows[5]["prompt"])
    source = dataclasses.replace(trained.train_dataset[0], path=write_jsonl(tmp_path / "other.jsonl", rows))
    settings = killed_after_the_judge(trained, tmp_path, train_dataset=[source])
    with pytest.raises(OtherRun, match=r"differs in train_dataset.*add `accept_changes: .train_dataset.`"):
        run(settings)
    accepting = dataclasses.replace(settings, accept_changes=["train_dataset"])
    saved = save_recipe(accepting, tmp_path / "recipe.yaml")
    words = "out/judge holds a finished model that was trained on other pairs than this run has: train_dataset"
    with pytest.raises(OtherRun, match=words):
        run(accepting)
    assert check(str(saved)) == 2
    said = capsys.readouterr()
    assert words in " ".join(said.out.split())
    assert "pairs for the reward model" not in said.out + said.err, "counts of pairs that no judge was trained on"
    shutil.rmtree(Path(accepting.output_dir) / "judge")
    run(accepting)
    out = Path(accepting.output_dir)
    assert not same(weights(out / "judge"), weights(Path(trained.output_dir) / "judge"))
    assert same(weights(out), weights(trained.output_dir)), "its pairs are the same"


def test_prompts_that_differ_in_case_space_and_punctuation_are_in_one_half():
    halves = []
    for number in range(40):
        text = f"Who feeds owl {number}?"
        forms = [text, f"  who feeds OWL {number} ", f"Who feeds owl \n{number}!!"]
        dialogues = [[{"role": "user", "content": form}] for form in forms]
        later = [{"role": "assistant", "content": "I."}, {"role": "user", "content": "When?"}]
        prompts = [*forms, *dialogues, [*dialogues[0], *later]]
        (half,) = {is_for_judge(Preference(prompt, "a", "b", "rows:1")) for prompt in prompts}
        halves.append(half)
    assert 10 < sum(halves) < 30


@pytest.mark.parametrize(
    "gone", ["judge", "judge/stage.json", "judge/model.safetensors", "model.safetensors", "tokenizer.json"]
)
def test_a_finished_run_without_a_part_of_its_result_is_named(trained, gone, tmp_path):
    out = Path(shutil.copytree(trained.output_dir, tmp_path / "out"))
    settings = dataclasses.replace(trained, output_dir=str(out))
    for name in ("README.md", "metrics.jsonl", "card/card.md", "judge/README.md"):
        (out / name).unlink()
    assert is_finished(settings), "what no later stage reads may have been deleted"
    shutil.rmtree(out / gone) if (out / gone).is_dir() else (out / gone).unlink()
    with pytest.raises(OtherRun, match=f"out(/judge)? is finished, but .*/{gone}.* is missing; put it back") as error:
        is_finished(settings)
    assert f"or delete {out} to run" in str(error.value), "without the judge's folder the stage is refused again"


def test_a_finished_run_whose_weights_are_cut_is_named(trained, tmp_path):
    out = Path(shutil.copytree(trained.output_dir, tmp_path / "out"))
    path = out / "judge" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(OtherRun, match=r"out/judge/model\.safetensors: is cut"):
        is_finished(dataclasses.replace(trained, output_dir=str(out)))


def test_members_and_their_judge_are_in_tables_and_report(trained, tmp_path):
    settings = dataclasses.replace(trained, output_dir=str(tmp_path / "three"), ensemble_size=2, max_steps=1)
    result = run(settings)
    out = Path(settings.output_dir)
    assert ensemble_members(str(out)) == [str(out / "member_1"), str(out / "member_2")]
    assert [read_manifest(out / name)["seed"] for name in ("member_1", "member_2", "judge")] == [42, 43, 44]
    of_members = [read_manifest(out / f"member_{n}")["data"]["fingerprints"] for n in (1, 2)]
    assert of_members[0] == of_members[1] == read_manifest(trained.output_dir)["data"]["fingerprints"]
    assert len(result.members) == 2
    assert result.judge == read_manifest(out / "judge")["results"]
    cards = report_cards(read_manifest(out)["results"])
    assert sorted(cards) == ["judge/card/card.md", "member_1/card/card.md", "member_2/card/card.md"]
    (table,) = closing_tables([("reward", read_manifest(out))])
    shown = list(table.columns[1].cells)
    assert "report card (judge/card/card.md)" in shown
    assert sum(cell.startswith("held-out pair accuracy") and cell.endswith("(judge)") for cell in shown) == 1
    runs = [read_run(folder) for folder in with_members(find_runs(out)[0])]
    assert [each.name for each in runs] == ["three", "three/member_1", "three/member_2", "three/judge"]
    single = read_run(Path(trained.output_dir))
    assert len(single.table) == 1, "the judge's rows are its own run's"


def test_ppo_is_judged_by_it(trained, tmp_path):
    out = Path(trained.output_dir)
    keys = {
        "stage": "ppo",
        "sft_model_path": str(out.parent / "base"),
        "reward_model_path": str(out),
        "judge_reward_model_path": str(out / "judge"),
        "train_dataset": str(out.parent / "train.jsonl"),
        "eval_dataset": str(out.parent / "eval.jsonl"),
        "output_dir": str(tmp_path / "ppo"),
    }
    sizes = {"rollout_batch_size": 4, "minibatch_size": 4, "total_episodes": 8, "response_length": 8, "eval_steps": 1}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump({**keys, **sizes, "learning_rate": 0.01}))
    settings = load_recipe("ppo", str(tmp_path / "ppo.yaml"))
    result = run_ppo(settings)
    assert "by judge" in result.verdict[0]
    found = [line["eval/judge"] for line in metrics(settings) if "eval/judge" in line]
    assert len(found) == 2
    assert result.best["eval/judge"] == max(found)


def test_align_check_says_the_halves_and_knows_the_judge_that_is_to_be_made(trained, tmp_path, capsys):
    folder, base = tmp_path / "recipes", Path(trained.output_dir).parent
    folder.mkdir()
    reward = {"stage": "reward", "output_dir": str(tmp_path / "rm"), "model_name_or_path": str(base / "base")}
    reward |= {"train_dataset": str(base / "train.jsonl"), "eval_fraction": 0.0, "train_judge": True}
    ppo = {"stage": "ppo", "output_dir": str(tmp_path / "ppo"), "sft_model_path": str(base / "base")}
    ppo |= {"reward_model_path": str(tmp_path / "rm"), "judge_reward_model_path": str(tmp_path / "rm" / "judge")}
    ppo |= {"train_dataset": str(base / "train.jsonl"), "eval_dataset": str(base / "eval.jsonl")}
    ppo |= {"rollout_batch_size": 4, "minibatch_size": 4, "total_episodes": 4}

    def checked() -> tuple[int, str]:
        (folder / "1_reward.yaml").write_text(yaml.safe_dump(reward))
        (folder / "2_ppo.yaml").write_text(yaml.safe_dump(ppo))
        return check(str(folder)), " ".join(capsys.readouterr().out.split())

    code, said = checked()
    assert code == 0, said
    assert (
        "train_judge: 3 pairs for the reward model and 5 for its judge; no prompt is in both, nor one that differs in case"
        in said
    )
    assert "rows: 3 to train on" in said
    for share, whose in ((r"16\.7", "reward model"), (r"80\.0", "judge")):
        assert re.search(rf"chosen one in {share}% \[[^]]+\] of the training pairs of the {whose}", said)
    reward["train_judge"] = False
    code, said = checked()
    assert code == 2
    assert f"judge_reward_model_path: no model at {tmp_path}/rm/judge" in said
    one = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS if judges(row[0])]
    reward |= {"train_judge": True, "train_dataset": write_jsonl(tmp_path / "one.jsonl", one)}
    code, said = checked()
    assert code == 2
    assert "train_judge: all 5 training pairs are in one half (each is drawn by its prompt)" in said
    ties = [{"prompt": "z", "chosen": "a", "rejected": "b", "strength": 0}]
    reward |= {"train_judge": False, "eval_dataset": write_jsonl(tmp_path / "ties.jsonl", ties)}
    code, said = checked()
    assert code == 2
    assert "every pair that is held out is a tie" in said


def test_the_last_seed_has_to_exist(trained):
    with pytest.raises(UserError, match="seed: of 3 models, the last one's would be too large"):
        check_reward_rules(dataclasses.replace(trained, ensemble_size=2, seed=2**32 - 2), str)


@pytest.mark.slow
def test_two_ranks_at_zero_3_train_the_same_two(trained, tmp_path):
    keys = {"deepspeed": deepspeed_file(tmp_path / "ds.json", 3), "per_device_train_batch_size": 2}
    settings = dataclasses.replace(trained, output_dir=str(tmp_path / "out"), **keys)
    done = run_stage("reward", save_recipe(settings, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in (".", "judge"):
        ours, theirs = weights(Path(trained.output_dir) / folder), weights(tmp_path / "out" / folder)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=0)
