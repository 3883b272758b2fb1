"""Several reward models of one recipe, and the mean of their weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import align.__main__ as cli
from align.cli.check.check import run as check
from align.cli.merge_rewards import run as merge
from align.config.ensemble import ensemble_members
from align.errors import OtherRun, UserError
from align.models.inspect_folder import inspect_folder
from align.reward import members as members_module
from align.reward.train import run
from align.runs.manifest import read_manifest
from reward_models.load import load_reward_model
from tests.ranks import run_stage
from tests.reward.test_train import HELD_OUT, recipe
from tests.worlds import deepspeed_file, save_recipe, unfinished


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two members with new heads in `out`; from the first, with its head kept, two more in `warm`."""
    folder = tmp_path_factory.mktemp("members")
    run(recipe(folder, eval_rows=HELD_OUT, ensemble_size=2, save_steps=1))
    base = str(folder / "out" / "member_1")
    run(recipe(folder, model_name_or_path=base, output_dir=str(folder / "warm"), ensemble_size=2))
    return folder


def test_a_member_is_the_single_model_of_its_seed_to_the_bit(trained, tmp_path):
    for number in (1, 2):
        alone = recipe(
            trained, eval_rows=HELD_OUT, output_dir=str(tmp_path / str(number)), seed=41 + number, save_steps=1
        )
        run(alone)
        member = trained / "out" / f"member_{number}"
        assert same(weights(alone.output_dir), weights(member))
        ours, theirs = read_manifest(alone.output_dir), read_manifest(member)
        assert ours["results"] == theirs["results"] and ours["score_mean"] == theirs["score_mean"]  # noqa: PT018
    assert not same(weights(trained / "out" / "member_1"), weights(trained / "out" / "member_2"))


def test_the_folder_says_what_its_members_are(trained):
    out = trained / "out"
    assert ensemble_members(str(out)) == [str(out / "member_1"), str(out / "member_2")]
    found = read_manifest(out)
    each = [read_manifest(path)["results"] for path in ensemble_members(str(out))]
    assert found["results"]["members"] == each
    assert found["results"]["table"][1] == [f"{each[1]['table'][0][0]} (member_2)", *each[1]["table"][0][1:]]
    assert not (out / "run.json").exists()
    with pytest.raises(UserError, match=r"judge_reward_model_path: .*out holds an ensemble of reward models; name one"):
        inspect_folder(str(out), "judge_reward_model_path")


def test_killed_in_the_second_member_it_goes_on_there(trained, tmp_path, monkeypatch, capsys):
    killed = Path(shutil.copytree(trained, tmp_path / "killed"))
    shutil.rmtree(killed / "warm")
    unfinished(killed / "out")
    unfinished(killed / "out" / "member_2")
    before = weights(killed / "out" / "member_2")
    (killed / "out" / "member_2" / "model.safetensors").unlink()  # written anew
    began = (killed / "out" / "member_1" / "stage.json").stat().st_mtime_ns
    loaded = []
    real = members_module.open_stage
    monkeypatch.setattr(members_module, "open_stage", lambda each: loaded.append(each.output_dir) or real(each))
    settings = recipe(trained, eval_rows=HELD_OUT, ensemble_size=2, save_steps=1, output_dir=str(killed / "out"))
    result = run(settings)
    assert result.steps == 4
    assert "member_1: this stage is finished already" in capsys.readouterr().err
    assert (killed / "out" / "member_1" / "stage.json").stat().st_mtime_ns == began
    assert same(weights(killed / "out" / "member_2"), before)
    assert len(loaded) == 2
    assert run(settings).steps == 4, "finished"
    with pytest.raises(UserError, match="holds a finished run that differs in ensemble_size"):
        run(dataclasses.replace(settings, ensemble_size=3))


def test_another_number_of_members_after_a_kill(trained, tmp_path):
    killed = Path(shutil.copytree(trained, tmp_path / "killed"))
    out = killed / "out"
    for folder in (out, out / "member_2"):
        unfinished(folder)
    keys = {"eval_rows": HELD_OUT, "save_steps": 1, "output_dir": str(out)}
    for size in (1, 3):
        with pytest.raises(OtherRun, match="holds an unfinished run that differs in ensemble_size; delete"):
            run(recipe(trained, ensemble_size=size, **keys))
    for folder in (out, *ensemble_members(str(out))):  # as a kill before the first checkpoint leaves it
        (Path(folder) / "stage.json").unlink(missing_ok=True)
        for checkpoint in Path(folder).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    run(recipe(trained, max_steps=1, **keys))
    assert not list(out.glob("member_*")), "PPO would take the folder as an ensemble of them"


def test_the_mean_of_copies_is_the_model_to_the_bit(trained, tmp_path, capsys):
    path = trained / "warm" / "member_1"
    copies = [str(shutil.copytree(path, tmp_path / name)) for name in "abcdefg"]  # by 7: a sum of 7 float32 is rounded
    assert cli.main(["merge", *copies, "--output", str(tmp_path / "mean")]) == 0
    assert capsys.readouterr().out.strip().endswith(f"g: {tmp_path / 'mean'}")
    assert same(weights(tmp_path / "mean"), weights(path))
    configs = [json.loads((Path(each) / "config.json").read_text()) for each in (tmp_path / "mean", path)]
    assert configs[0] == configs[1]
    records = [read_manifest(each) for each in (tmp_path / "mean", path)]
    assert records[0]["score_check"]["scores"] == pytest.approx(records[1]["score_check"]["scores"], abs=1e-6)
    assert records[0]["recipe"]["seed"] == 42


def test_the_mean_of_members_by_hand(trained, tmp_path):
    paths = ensemble_members(str(trained / "warm"))
    merge(paths, str(tmp_path / "mean"))
    found, each = weights(tmp_path / "mean"), [weights(path) for path in paths]
    for name in found:
        assert torch.equal(found[name], ((each[0][name].double() + each[1][name].double()) / 2).float()), name
    means = [read_manifest(path)["score_mean"] for path in paths]
    loaded = load_reward_model(str(tmp_path / "mean"))
    assert loaded.config.score_mean == pytest.approx(sum(means) / 2)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean")
    record = read_manifest(tmp_path / "mean")
    assert "seed" not in record["recipe"], "the members' differ"
    with torch.no_grad():
        for ids, expected in zip(*record["score_check"].values(), strict=True):
            logit = float(plain(input_ids=torch.tensor([ids])).logits)
            assert logit - loaded.config.score_mean == pytest.approx(expected, abs=1e-5)
    assert set(record["merged"]) == set(paths)


def test_models_without_the_same_start_are_refused(trained, tmp_path, capsys):
    out, warm = (ensemble_members(str(trained / name)) for name in ("out", "warm"))

    def refused(message: str, *paths: str, output: Path = tmp_path / "mean") -> None:
        with pytest.raises(UserError, match=message):
            merge(paths, str(output))
        assert not (tmp_path / "mean").exists()

    refused("member_2 and .*heads that started apart .new, seed 43 and new, seed 42.; merge reward models", *out)
    refused("have other base models", warm[0], out[0])
    refused("two reward models or more before --output, got one", warm[0])
    refused("base: expected the output of the reward stage", warm[0], str(trained / "base"))
    refused("nowhere: expected the output of the reward stage", warm[0], str(trained / "nowhere"))
    refused("lies in .*member_2; name a new folder", *warm, output=Path(warm[1]) / "mean")
    refused("out: exists already", *warm, output=trained / "out")
    other = shutil.copytree(warm[1], tmp_path / "other")
    record = json.loads((other / "stage.json").read_text())
    (other / "stage.json").write_text(json.dumps({**record, "tokenizer": {**record["tokenizer"], "vocabulary": "0"}}))
    refused("other tokenizers", warm[0], str(other))
    (other / "stage.json").write_text(json.dumps(record))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    refused(r"other architectures \(config.json: rope_theta\)", warm[0], str(other))
    assert cli.main(["merge", *warm, "--seed", "1"]) == 2
    assert "expected an adapter's folder" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_at_zero_3_train_the_same_members(trained, tmp_path):
    keys = {"deepspeed": deepspeed_file(tmp_path / "ds.json", 3), "per_device_train_batch_size": 2}
    settings = recipe(trained, eval_rows=HELD_OUT, ensemble_size=2, output_dir=str(tmp_path / "out"), **keys)
    done = run_stage("reward", save_recipe(settings, tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    for number in (1, 2):
        ours, theirs = (weights(folder / "out" / f"member_{number}") for folder in (trained, tmp_path))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=0)


def test_align_check_counts_the_members_that_are_yet_to_be_made(trained, tmp_path, capsys):
    folder = tmp_path / "recipes"
    folder.mkdir()
    settings = recipe(trained, output_dir=str(tmp_path / "rm"), ensemble_size=2)
    save_recipe(settings, folder / "1_reward.yaml")
    ppo = {"stage": "ppo", "output_dir": str(tmp_path / "ppo"), "sft_model_path": str(trained / "base")}
    ppo |= {"reward_model_path": str(tmp_path / "rm"), "train_dataset": str(trained / "train.jsonl")}
    (folder / "2_ppo.yaml").write_text(
        yaml.safe_dump({**ppo, "rollout_batch_size": 4, "minibatch_size": 4, "total_episodes": 4})
    )
    code = check(str(folder))
    said = capsys.readouterr().out
    assert code == 0, said
    assert "reward model 2: its head is" in said
    assert "reward 2" in said, "in the table of memory"
