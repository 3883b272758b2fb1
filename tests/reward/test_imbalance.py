"""What preference pairs give away: shares by hand, their intervals, warnings, and where they are said."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.cli.check import check
from align.data.rows import Preference
from align.evaluate.statistics import wilson_interval
from align.reward.imbalance import describe_imbalance, imbalance_section, measure_imbalance, warn_of_imbalance
from align.reward.train import run
from align.runs.manifest import read_manifest
from tests.reward.test_train import recipe
from tests.worlds import save_recipe


def pair(prompt: str, chosen: str, rejected: str, **extra) -> Preference:
    return Preference(prompt, chosen, rejected, "rows:1", {"task": "rows", **extra})


def test_shares_by_hand():
    rows = [
        pair("a", "long", "s", chosen_first=True),
        pair("b", "s", "long", chosen_first=1),
        pair("c", "same", "size", chosen_first=False),
        pair("d", "long", "s"),
        pair("e", "long", "s", tie=True, chosen_first=False),
    ]
    found = measure_imbalance(rows)
    low, high = wilson_interval(2.5, 4)
    assert found["longer_chosen"] == {"accuracy": 2.5 / 4, "low": low, "high": high, "n": 4}
    assert found["chosen_first"]["accuracy"] == pytest.approx(2 / 3)
    assert found["chosen_first"]["n"] == 3
    assert describe_imbalance(found) == [
        f"the longer response is the chosen one in 62.5% [{low:.1%}, {high:.1%}] of the training pairs",
        "the chosen response was shown first in 66.7% [20.8%, 93.9%] of the training pairs",
    ]
    assert warn_of_imbalance(found) == [], "with so few pairs the share may be a half"
    assert measure_imbalance([rows[-1]]) == {}


def test_an_interval_by_prompt_is_wider():
    rows = [pair(prompt, "long", "s") for prompt in "ab"] + [pair("c", "s", "long")]
    once = measure_imbalance([*rows * 8])["longer_chosen"]
    spread = measure_imbalance([pair(f"{row.prompt}{i}", row.chosen, row.rejected) for i in range(8) for row in rows])
    assert once["accuracy"] == spread["longer_chosen"]["accuracy"] == pytest.approx(2 / 3)
    assert once["low"] < spread["longer_chosen"]["low"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "word", "other"), [("long", "s", "longer", "shorter"), ("s", "long", "shorter", "longer")]
)
def test_length_that_predicts_as_well_as_annotators_is_warned_of(chosen, rejected, word, other):
    def warned(of_hundred: int) -> list[str]:
        rows = [pair(str(i), *((chosen, rejected) if i < of_hundred else (rejected, chosen))) for i in range(100)]
        return warn_of_imbalance(measure_imbalance(rows))

    assert warned(62) == []
    (line,) = warned(63)
    assert line.startswith(
        f"choosing the {word} response is right in 63.0% of the training pairs, at least as often as annotators"
    )
    assert f"add pairs of which the {other} is better" in line


def test_sources_have_shares_of_their_own():
    rows = [pair(str(i), "long", "s", source="forum" if i % 4 else "help desk") for i in range(8)]
    rows.append(pair("z", "s", "long", source="help desk"))
    line = describe_imbalance(measure_imbalance(rows))[-1]
    assert line == "training pairs by source: help desk 33.3% (longer: 66.7%), forum 66.7% (longer: 100.0%)"
    by_data_set = [pair("1", "long", "s", task="x"), pair("2", "s", "long", task="y")]
    assert describe_imbalance(measure_imbalance(by_data_set))[-1].startswith("training pairs by source: x 50.0%")


def test_the_stage_and_align_check_say_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [(chr(97 + i), "zzzz"[: 2 + i % 3], "y") for i in range(20)]
    settings = recipe(tmp_path, rows, max_steps=1, normalize_prompts=2)
    assert check.run(str(save_recipe(settings, tmp_path / "recipe.yaml")), 1) == 0
    run(settings)
    said = capsys.readouterr()
    found = read_manifest(settings.output_dir)["data"]["imbalance"]
    assert found["longer_chosen"]["accuracy"] == 1.0
    (line,), (warning,) = describe_imbalance(found), warn_of_imbalance(found)
    card = (Path(settings.output_dir) / "README.md").read_text()
    assert line in said.err
    assert warning in said.err
    assert line in " ".join(said.out.split())
    assert warning in " ".join(said.out.split())
    assert imbalance_section(found) in card
    assert warning in card
