"""Recipes of `align evaluate` as steps of `align run DIR`, and under `align check`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import yaml

from align.cli import run as pipeline
from align.cli.check import check
from align.errors import UserError
from tests.evaluate.test_compare import ROWS, TRAIN, rows
from tests.worlds import save_tiny_policy, write_jsonl


def write_recipe(path: str, **keys) -> None:
    Path(path).write_text(yaml.safe_dump(keys), encoding="utf-8")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a tiny model, an SFT recipe that is never run, and an evaluation of it beside the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a wrong path is not looked up for long
    for seed, name in enumerate(("base", "other")):
        save_tiny_policy(tmp_path / name, seed)
    write_jsonl(tmp_path / "r/train.jsonl", rows(TRAIN))
    write_jsonl(tmp_path / "r/eval.jsonl", rows(ROWS))
    write_recipe(
        "r/1_sft.yaml",
        stage="sft",
        output_dir="out/1",
        train_dataset="train.jsonl",
        eval_fraction=0,
        model_name_or_path="base",
    )
    evaluation("base", "out/1")
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def evaluation(*names: str, **changes) -> None:
    settings = {
        "stage": "evaluate",
        "output_dir": "out/2",
        "models": list(names),
        "train_dataset": "train.jsonl",
        "eval_dataset": "eval.jsonl",
        "metrics": ["perplexity", "exact_match"],
        "max_new_tokens": 4,
        "bootstrap_iters": 20,
    }
    write_recipe("r/2_evaluate.yaml", **{**settings, **changes})


class TestRun:
    def test_it_runs_once_and_its_tables_are_shown_each_time(self, world, capfd):
        Path("r/1_sft.yaml").unlink()
        evaluation("base", "other")
        assert pipeline.run("r") == 0
        said = capfd.readouterr().out
        assert "2_evaluate.yaml: evaluate, one process, into out/2" in said
        results = json.loads(Path("out/2/results.json").read_text())
        assert results["recipe"]["models"] == [["base", "base"], ["other", "other"]]
        table = said[said.index("Results") : said.index("2_evaluate.yaml: finished in")].strip()
        assert f"{results['results'][0]['value']:.4g}" in table
        assert "Differences from base" in table
        before = Path("out/2/results.json").stat().st_mtime_ns
        assert pipeline.run("r") == 0
        again = capfd.readouterr().out
        assert "2_evaluate.yaml: finished already, in out/2" in again
        assert table in again
        assert Path("out/2/results.json").stat().st_mtime_ns == before
        evaluation("base", "other", max_new_tokens=5)
        with pytest.raises(UserError, match="out/2 holds results that differ in max_new_tokens"):
            pipeline.run("r")

    def test_alone_or_launched(self, world, monkeypatch):
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        alone = pipeline.command(pipeline.read_steps("r", None, ["--seed", "3", "--learning_rate", "1"])[1])
        assert alone == [sys.executable, "-m", "align", "evaluate", "r/2_evaluate.yaml", "--seed", "3"]
        words = pipeline.command(pipeline.read_steps("r", 2, ["--max_new_tokens", "3"])[1])
        assert words[1:3] == ["-m", "deepspeed.launcher.runner"]
        assert words[words.index("--num_accelerators") + 1] == "2"
        assert words[words.index("--module") :] == [
            "--module",
            "align",
            "evaluate",
            "r/2_evaluate.yaml",
            "--max_new_tokens",
            "3",
        ]

    def test_a_wrong_one_is_known_before_the_first_step(self, world, monkeypatch):
        monkeypatch.setattr(pipeline, "run_process", lambda *_: pytest.fail("a step was started"))
        evaluation("base", num_shots=[-1])
        with pytest.raises(UserError, match=r"r/2_evaluate.yaml:\d+: num_shots"):
            pipeline.run("r")
        evaluation("base", output_dir="out/1")
        with pytest.raises(UserError, match=r"is also the output_dir of r/1_sft.yaml; give each recipe its own"):
            pipeline.run("r")


def outcome(capsys, *overrides: str) -> tuple[int, str]:
    code = check.run("r", 1, overrides)
    return code, " ".join(capsys.readouterr().out.split())


class TestCheck:
    def test_with_a_model_that_an_earlier_recipe_makes(self, world, capsys):
        evaluation("base", "out/1", num_shots=[0, 1])
        code, said = outcome(capsys)
        assert code == 0, said
        assert "output_dir: out/2, new" in said
        assert "measures: perplexity, exact_match" in said
        assert "model base: base, tokenizer of 29 tokens, without a chat template" in said
        assert "model 1: out/1 (made by 1_sft.yaml), tokenizer of 29 tokens" in said
        assert "rows: 7 to evaluate on, 12 to take examples from" in said
        assert "0-shot row: xyz⟦zy</s>⟧" in said.replace("x y z", "xyz").replace("z y", "zy")
        assert "1-shot row: " in said
        # zzzz, abcabc and its end, behind an example of four letters and a blank line
        assert "the models write after the prompt; at most 17 tokens" in said
        assert not Path("out").exists()
        code, said = outcome(capsys, "--metrics", "perplexity")
        assert "nothing is written, the reference is judged" in said

    def test_a_single_recipe(self, world, capsys):
        evaluation("base")
        assert check.run("r/2_evaluate.yaml") == 0
        assert "0-shot row: " in capsys.readouterr().out

    def test_one_that_is_finished(self, world, capsys):
        from align.config.load import load_recipe
        from align.evaluate.compare import run

        evaluation("base")
        run(load_recipe("evaluate", "r/2_evaluate.yaml"))
        capsys.readouterr()
        assert "out/2 is finished" not in outcome(capsys, "--seed", "8")[1]
        assert "output_dir: out/2, is finished; the step would be skipped" in outcome(capsys)[1]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"models": ["base", "out/3"]}, "models: no model at out/3"),
            ({"metrics": ["perplexitty"]}, "did you mean 'perplexity'"),
            ({"grader": "json:nothing"}, "grader: no function 'nothing'"),
            ({"eval_dataset": "gone.jsonl"}, "gone.jsonl: no such file"),
            ({"max_length": 7}, "longer than 7 tokens"),
            ({"num_shots": [13]}, "13"),
            ({"models": ["out/1"], "output_dir": "r/eval.jsonl/x"}, "output_dir: cannot write to r/eval.jsonl/x"),
        ],
    )
    def test_mistakes(self, world, capsys, changes, said):
        evaluation(**{"models": ["base"], **changes} if "models" not in changes else changes)
        code, told = outcome(capsys)
        assert code == 2
        assert said in told
        assert "1 mistake to fix" in told

    def test_a_reward_model_writes_nothing(self, world, capsys):
        """Also when it is yet to be made: its configuration is that of a decoder."""
        write_jsonl(world / "r/pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": "a"} for p, c in ROWS])
        write_recipe("r/1_sft.yaml", stage="reward", output_dir="out/1", train_dataset="pairs.jsonl", eval_fraction=0,
                     model_name_or_path="base")  # fmt: skip
        code, said = outcome(capsys)
        assert code == 2
        assert "models: out/1 (made by 1_sft.yaml) was made by the reward stage and does not generate text" in said
