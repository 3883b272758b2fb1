"""The report as a file: complete, within its size, and nothing that it shows is obeyed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from align.__main__ import main
from align.best_of_n.results import ESTIMATES
from align.cli.report import update
from align.errors import BadFile
from align.maths.overoptimization import rl_gain
from align.report.figures import thinned
from align.report.page import MAX_BYTES, write_report
from align.report.read import natural_key
from align.runs.files import write_json
from tests.report.recorded import make_run
from tests.worlds import write_jsonl

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
STAGES = ("0_base", "1_sft", "2_reward", "3_ppo")
EVIL = "<script>alert(1)</script>\x1b[31m\u202e&\"'{{ 7 * 7 }}"


class Parsed(HTMLParser):
    """Tags with their attributes, and text outside of scripts and styles."""

    VOID = ("meta", "input", "br", "path", "rect", "circle", "polyline", "polygon")

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = self.script = ""
        self.feed(html)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "quickstart"
    for stage in STAGES[:3]:
        make_run(f"quickstart_{stage}", folder / stage)
    make_run("sound_seed1", folder / "3_ppo", EVIL)
    return folder


@pytest.fixture(scope="module")
def page(pipeline) -> Parsed:
    assert main(["report", str(pipeline)]) == 0
    path = pipeline / "report.html"
    assert path.stat().st_size < MAX_BYTES
    return Parsed(path.read_text(encoding="utf-8"))


def test_it_shows_every_part(page):
    for heading in ("What was done", "Before and after", "Warnings and self-checks", "3_ppo", "Frontier", "Scores and lengths",
                    "Samples side by side", "Costs", "How to reproduce it"):  # fmt: skip
        assert heading in page.text
    for words in (
        "objective/kl",
        "nats per response",
        "eos_rate",
        "Nothing found",
        "align ppo",
        "Where PPO's time goes",
    ):
        assert words in page.text
    assert "5.301" in page.text  # the true reward after PPO


def test_each_chart_has_its_table_its_axes_and_a_name(page):
    figures, charts = page.count("figure"), [attributes for tag, attributes in page.tags if tag == "svg"]
    assert figures == len(charts) > 20
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert page.text.count("Table") >= figures
    assert page.count("caption") == page.count("table") >= figures


def test_nothing_is_fetched_and_only_its_own_script_runs(page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "image", "use")
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert page.count("script") == 1
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_what_data_holds_is_shown(page):
    assert "<script>alert(1)</script>\\x1b[31m\\u202e&\"'{{ 7 * 7 }} 5" in page.text
    assert not re.search("[\x00-\x08\x1b\u202e]", page.text)


def test_a_record_that_holds_markup(tmp_path):
    run = make_run("quickstart_3_ppo", tmp_path / "run")
    record = json.loads((run / "stage.json").read_text())
    record["results"]["table"].append([EVIL, 1.0, 2.0])
    record["results"]["verdict"] = [EVIL]
    record["versions"] = {EVIL: EVIL}
    record["recipe"]["reward_model_path"] = EVIL
    record["inputs"] = {EVIL: {EVIL: {EVIL: EVIL}}}
    (run / "stage.json").write_text(json.dumps(record))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"step": 21, "time": EVIL, f"eval/true/{EVIL}": 1.0, "huge": 1e308, "low": -1e308}) + "\n"
        )
        file.write('{"step": 22, "x": "text"}\n[]\n{"step": 23, "y": NaN, "z": 1}\n{"step": 24, "cut o')
    write_jsonl(
        run / "card" / "results.json", [{"card": {"verdicts": [{"line": EVIL, "verdict": "bad"}], "n": {EVIL: 0.5}}}]
    )
    assert main(["report", str(run)]) == 0
    page = Parsed((run / "report.html").read_text(encoding="utf-8"))
    assert page.count("script") == 1
    assert page.text.count("<script>alert(1)</script>") > 8
    shown = "<script>alert(1)</script>\\x1b[31m\\u202e&\"'{{ 7 * 7 }}"
    assert f"eval/true/{shown}" in {attributes.get("data-name") for _, attributes in page.tags}, (
        "escaped as an attribute"
    )
    assert "2 lines are damaged" in page.text


def test_a_record_that_no_stage_wrote(tmp_path):
    """Of another program, or of a stage that this version does not know."""
    wrong = {"inputs": {"model": 3}, "versions": {"torch": [1]}, "data": [], "results": {"table": [1], "verdict": 5}}
    for name, value in wrong.items():
        for file in ("results.json", "run.json"):
            run = tmp_path / name / file
            record = {"stage": "taste", "recipe": {}, "inputs": {}, name: value}
            write_json(run / file, record)
            write = partial(write_report, [[run]], tmp_path / "report.html", "x")
            if name == "results":
                assert len(write()) == 1, "they are a manifest's, and are not shown"
                continue
            with pytest.raises(BadFile, match=rf"{file}: {name}: expected"):
                write()


def test_several_seeds_are_drawn_over_each_other(tmp_path):
    for seed in ("seed1", "seed2"):
        make_run("sound_seed1", tmp_path / seed / "3_ppo")
    assert (
        main(["report", str(tmp_path / "seed1"), str(tmp_path / "seed2"), "--output", str(tmp_path / "both.html")]) == 0
    )
    html = (tmp_path / "both.html").read_text()
    both = Parsed(html)
    score = html[html.index("<h4>Score</h4>") :]
    chart = score[: score.index("</svg>")]
    assert chart.count("<polyline") == 4  # training and held-out, of both
    assert {a["data-name"] for tag, a in both.tags if "data-name" in a} >= {"seed1: eval/score", "seed2: eval/score"}
    assert main(["report", str(tmp_path)]) == 0  # the folder above finds both, too
    assert ">seed2<" in (tmp_path / "report.html").read_text()


def test_the_frontier_has_best_of_n_and_the_fitted_law(tmp_path):
    run = make_run("sound_seed1", tmp_path / "3_ppo")
    lines = [
        {
            "step": step,
            "eval/kl": step**2 / 4,
            "eval/true/f": 1 + rl_gain(step / 2, 0.5, 0.4),
            "eval/score": float(step),
        }
        for step in range(8)
    ]
    write_jsonl(run / "metrics.jsonl", lines)
    measures = {f"{name}{end}": None for name in ESTIMATES for end in ("", "_low", "_high")}
    points = [
        {
            **measures,
            "n": n,
            "prompts": 9,
            "kl": n / 10,
            "win_rate_bound": n / (n + 1),
            "proxy": 0.1 * n,
            "judge": 1 + 0.2 * n,
        }
        for n in (1, 2, 4)
    ]
    sampled = {
        "stage": "bon",
        "recipe": {"judge_reward_funcs": ["f"]},
        "inputs": {},
        "prompts": 9,
        "num_generations": 4,
    }
    write_jsonl(tmp_path / "4_bon" / "results.json", [{**sampled, "datasets": {}, "data": {}, "frontier": points}])
    assert main(["report", str(tmp_path)]) == 0
    text = Parsed((tmp_path / "report.html").read_text()).text
    assert text.count("best of n (4_bon)") == 4  # legend and table of two charts
    assert "a = 0.5, b = 0.4; its peak is at √KL 1.28, with a gain of 0.514." in text


def test_several_ppo_runs_of_one_folder_are_told_apart_and_their_judge_starts_at_sft(tmp_path):
    for name in ("4_ppo_a", "4_ppo_b"):
        run = make_run("sound_seed1", tmp_path / name)
        write_jsonl(run / "metrics.jsonl", [{"step": step, "eval/kl": step, "eval/judge": 0.5} for step in (1, 4)])
        stage = json.loads((run / "stage.json").read_text())
        stage["results"]["table"] = [["judge", 0.25, 0.5]]
        (run / "stage.json").write_text(json.dumps(stage))
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    frontier = page[page.index('id="frontier"') : page.index('id="histograms"')]
    assert all(f"PPO, {name}" in frontier for name in ("4_ppo_a", "4_ppo_b"))
    assert "c0 dash0" in frontier
    assert "c1 dash0" in frontier
    assert frontier.count("0.25") >= 2, "the judge of SFT, in the table of each"
    assert all(f"{name}: judge&#39;s reward" in page for name in ("4_ppo_a", "4_ppo_b"))


def test_an_ensemble_has_the_curves_and_cards_of_its_members(tmp_path):
    parent = make_run("quickstart_2_reward", tmp_path / "2_reward")
    record = json.loads((parent / "stage.json").read_text())
    rows = record["results"]["table"]
    record["results"] = {"members": [record["results"]] * 2, "table": [[f"{m} (member_1)", a, b] for m, a, b in rows]}
    (parent / "stage.json").write_text(json.dumps(record))
    (parent / "metrics.jsonl").unlink()
    for member in ("member_1", "member_2"):
        run = make_run("quickstart_2_reward", parent / member)
        verdicts = [{"line": f"words alone of {member}", "verdict": "good"}]
        write_jsonl(run / "card" / "results.json", [{"card": {"verdicts": verdicts}}])
    assert main(["report", str(tmp_path)]) == 0
    page = Parsed((tmp_path / "report.html").read_text())
    for member in ("2_reward/member_1", "2_reward/member_2"):
        assert page.text.count(f"{member}: {rows[0][0]}") == 1, "once, though the ensemble's table has it too"
    assert "good: words alone of member_1" in page.text
    assert "good: words alone of member_2" in page.text
    assert {a["data-name"] for _, a in page.tags if "data-name" in a} >= {"train/loss", "eval/accuracy"}


def test_costs_have_the_most_memory_of_each_phase(tmp_path):
    run = make_run("quickstart_1_sft", tmp_path / "1_sft")
    lines = [{"step": s, "memory/training": 1 + s % 2, "memory/evaluation": 0.5} for s in range(4)]
    write_jsonl(run / "metrics.jsonl", lines)
    assert main(["report", str(run)]) == 0
    assert "evaluation 0.5 GiB, training 2 GiB" in Parsed((run / "report.html").read_text()).text


def test_an_unfinished_run_with_a_damaged_neighbor(tmp_path):
    run = make_run("quickstart_3_ppo", tmp_path / "3_ppo")
    (run / "stage.json").rename(run / "run.json")
    assert main(["report", str(tmp_path)]) == 0
    assert "unfinished, at step 20 of 20" in (tmp_path / "report.html").read_text()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "report.html")
    assert main(["report", str(tmp_path)]) == 0
    assert "is a symbolic link" in (tmp_path / "report.html").read_text()


def test_much_stays_within_the_size(tmp_path):
    run = make_run("sound_seed1", tmp_path / "run", "πολλές λέξεις " * 150)  # the first choice of sizes is too large
    path = tmp_path / "report.html"
    write_report([[run]] * 8, path, "long")  # 8 times 96 samples of 4000 characters
    assert 0.3 * MAX_BYTES < path.stat().st_size < MAX_BYTES


def test_thinned_curves_keep_their_extremes():
    points = [(float(step), 100.0 if step == 4321 else step % 7) for step in range(10_000)]
    kept = thinned(points, 200)
    assert len(kept) <= 200
    assert (4321.0, 100.0) in kept
    assert kept == sorted(kept)


def test_a_folder_of_recipes_stands_for_what_they_have_written(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(QUICKSTART)]) == 2
    assert "have not been run" in capsys.readouterr().err
    shutil.copytree(pipeline / "1_sft", "outputs/quickstart/1_sft")
    assert main(["report", str(QUICKSTART)]) == 0
    assert "report: outputs/quickstart/report.html" in capsys.readouterr().out


def test_other_files_are_not_overwritten(pipeline, tmp_path, capsys):
    mine = tmp_path / "mine.html"
    mine.write_text("<html>mine</html>")
    (tmp_path / "link.html").symlink_to(mine)
    for path in (mine, tmp_path / "link.html"):
        assert main(["report", str(pipeline), "--output", str(path)]) == 2
        assert "is not a report of this command" in capsys.readouterr().err
    assert mine.read_text() == "<html>mine</html>"
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(pipeline), "--seed", "1"]) == 2


def test_a_pipelines_report_never_ends_it(pipeline, tmp_path, capsys):
    outputs = [pipeline / stage for stage in STAGES]
    assert update("quickstart", outputs) == pipeline / "report.html"
    assert update("quickstart", [tmp_path / "a", tmp_path / "b"]) is None  # nothing has been run yet
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stage.json").write_text("{}")
    assert update("quickstart", [tmp_path / "run", pipeline / "3_ppo"]) is None
    assert "no report: " in capsys.readouterr().err


def test_numbers_in_names_count():
    assert sorted(["run10", "run9", "run", "10", "9b"], key=natural_key) == ["9b", "10", "run", "run9", "run10"]
    decimals = ["3_rm", "4_ppo_kl0.05", "4_ppo_kl0.1", "4_ppo_kl0.2", "4_ppo_kl1", "10_ppo"]
    assert sorted(reversed(decimals), key=natural_key) == decimals
