"""The trust recipe: its preparation keeps the judge's pairs, the reward's and the test's apart, and its recipes read them so."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from pathlib import Path

from align.config.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "trust"
DATA = Path("outputs") / "trust" / "data"
DIALOGUES, ARTICLES = 60, 20


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def prepare(folder: Path, monkeypatch) -> None:
    """Three pairs of each dialogue, one of them too long, and of each article, in files of both kinds."""
    for name in ("hh-helpful", "hh-harmless"):
        rows = [
            {
                "prompt": message("user", f"Opening {number}?") + message("assistant", "Go on.") + message("user", f"{'w ' * 60}{turn}"),
                "chosen": message("assistant", f" good {number} "), "rejected": message("assistant", "bad " * (81 if turn == 2 else 3)),
            }
            for number in range(DIALOGUES)
            for turn in range(3)
        ]  # fmt: skip
        (folder / name).mkdir()
        with gzip.open(folder / name / "train.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "summeval-pairs").mkdir()
    rows = [
        {"prompt": f"Article {number} begins with these words and goes on", "chosen": f"sum {turn}", "rejected": "none"}
        for number in range(ARTICLES)
        for turn in range(3)
    ]
    (folder / "summeval-pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "."])
    runpy.run_path(str(RECIPES / "prepare.py"), run_name="__main__")


def pairs(name: str, part: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name / f"{part}.jsonl").read_text().splitlines()]


def test_pairs_of_one_opening_are_in_one_file_and_long_ones_are_counted(tmp_path, monkeypatch, capsys):
    prepare(tmp_path, monkeypatch)
    assert f"{DIALOGUES} with a response of more than 80 words" in capsys.readouterr().out
    parts = {part: pairs("hh-helpful", part) for part in ("half_a", "half_b", "test")}
    openings = {part: {pair["chosen"][0]["content"] for pair in found} for part, found in parts.items()}
    assert sum(map(len, openings.values())) == DIALOGUES == len(set().union(*openings.values()))
    assert sum(map(len, parts.values())) == 2 * DIALOGUES, "two pairs of each dialogue are short enough"
    assert len(openings["test"]) < len(openings["half_a"]) > DIALOGUES / 5
    assert pairs("hh-helpful", "prompts") == parts["test"][:96]
    pair = parts["test"][0]
    assert pair["prompt"] == message("user", f"{'w ' * 47}{pair['prompt'][0]['content'][-1]}"), (
        "48 words of the last turn"
    )
    assert pair["chosen"][0]["content"].startswith("good"), "without the spaces around it"
    assert [len(pairs("summeval-pairs", part)) % 3 for part in parts] == [0, 0, 0]
    article = pairs("summeval-pairs", "half_a")[0]
    assert article["prompt"][0]["content"].endswith(" begins with these words")
    assert article["rejected"] == message("assistant", "none")


def test_training_never_sees_what_judges(monkeypatch):
    monkeypatch.setenv("STORIES", "stories")
    monkeypatch.setenv("MINILM", "minilm")
    reward, judge, ppo = (load_recipe(stage, str(RECIPES / f"{name}.yaml"), []) for stage, name in
                          (("reward", "2_reward"), ("reward", "3_judge"), ("ppo", "4_ppo")))  # fmt: skip
    bon = load_recipe("bon", str(RECIPES / "best_of_n.yaml"), [])
    halves = {name: {Path(str(source.path)).stem for source in recipe.train_dataset}
              for name, recipe in {"reward": reward, "judge": judge, "ppo": ppo}.items()}  # fmt: skip
    assert halves["judge"] == {"half_b"}
    assert halves["reward"] == halves["ppo"] == {"half_a"}
    held_out = {"test"}, {"test"}, {"prompts"}, {"prompts"}  # the first rows of the test pairs
    for recipe, found in zip((reward, judge, ppo, bon), held_out, strict=True):
        sources = recipe.train_dataset if recipe is bon else recipe.eval_dataset
        assert {Path(str(source.path)).stem for source in sources} == found
    assert ppo.judge_reward_model_path == bon.judge_reward_model_path == judge.output_dir
    assert ppo.reward_model_path == bon.reward_model_path == [reward.output_dir]
