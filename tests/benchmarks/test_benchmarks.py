"""The benchmarks: work that is what it is said to be, counted right, and commands that run."""

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import episodes  # noqa: E402
import panels  # noqa: E402
import programs  # noqa: E402
import quickstart_episodes  # noqa: E402
import scaling  # noqa: E402
import trainers  # noqa: E402
from countdown import COUNTS, EOS, make_models, make_untrained, write_prompts, write_rows  # noqa: E402
from machine import decode_bytes, step_flops  # noqa: E402

from align.cli import verify_episodes  # noqa: E402
from align.data.collate import pad_left  # noqa: E402
from align.errors import UserError  # noqa: E402
from align.generation.ending import Ending  # noqa: E402
from align.generation.generate import generate  # noqa: E402
from align.generation.sampling import uniforms  # noqa: E402
from tests import ranks  # noqa: E402


def test_the_longest_responses_end_by_themselves(tmp_path):
    """One pass over prompt and response: the odds that sampling leaves this path are next to none."""
    model = AutoModelForCausalLM.from_pretrained(make_models(tmp_path, "1M")["policy"])
    write_prompts(tmp_path / "prompts.jsonl", "1M", 1, (9, 9), (1024, 1024))
    prompt = [int(word[1:]) for word in json.loads((tmp_path / "prompts.jsonl").read_text())["prompt"].split()]
    response = [*range(prompt[-1] - 1, prompt[-1] - 1024, -1), EOS]
    assert response[-2] % COUNTS == 0
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, 8:-1]
    logprobs = logits.log_softmax(dim=1)[range(1024), response]
    assert logprobs.sum() > -1e-3


def test_responses_are_as_long_as_their_prompts_say(tmp_path):
    paths = make_models(tmp_path, "1M")
    write_prompts(tmp_path / "prompts.jsonl", "1M", 24, (1, 20), (1, 64))
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(paths["policy"])
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    assert {len(row) for row in rows} <= set(range(1, 21))
    assert len({len(row) for row in rows}) > 5
    model = AutoModelForCausalLM.from_pretrained(paths["policy"])
    ids, mask = pad_left(rows, 0)
    responses, real, _ = generate(model, ids, mask, uniforms(0, "test", range(24), 64), 1.0, Ending(tokenizer))
    lengths = real.sum(1).tolist()
    assert lengths == [row[-1] % COUNTS + 1 for row in rows]
    assert sorted(lengths) == [round(1 + (i + 0.5) / 24 * 63) for i in range(24)]
    assert all(EOS in row for row in responses.tolist())


def test_the_script_for_a_gpu_says_what_it_leaves_out(tmp_path):
    """Without any time it leaves out everything; without a GPU what needs one."""
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        script, env={**os.environ, "LIMIT": "0", "PATH": path}, capture_output=True, text=True, check=True
    )
    status = {name: part["status"] for name, part in json.loads(done.stdout).items()}
    assert {*status} == {
        "quickstart",
        "sft_bf16",
        "reward_bf16",
        "ppo_bf16",
        "ppo_graphs",
        "decoding",
        "step",
        "step_vllm",
        "verify",
    }
    assert status["quickstart"] == "skipped: no time is left of 0 s"
    if not torch.cuda.is_available():
        assert status["decoding"] == status["step"] == status["step_vllm"] == "skipped: no GPU"
    (tmp_path / "out" / "parts").rename(tmp_path / "out" / "somebody's")
    assert subprocess.run(script, capture_output=True, check=False).returncode == 2


def test_operations_by_hand():
    """Hidden size 2, one layer, MLP of 3, 5 words: 34 weights a token and layer, 10 in the head."""
    shape = (2, 1, 1, 3, 5)
    forward = 2 * 68 + 4 * 2 * 3  # two tokens; they look at 1 and 2 tokens, 8 operations each
    assert step_flops(shape, [1], [1], 1) == {
        "generate": 68 + 8 + 20,  # the last token is never put in
        "score": 3 * forward + 20,
        "update": 3 * (2 * forward + 20),
    }
    once, twice = step_flops(shape, [3], [2], 1), step_flops(shape, [3, 3], [2, 2], 1)
    assert all(twice[phase] == 2 * once[phase] for phase in once)
    assert step_flops(shape, [3], [2], 4)["update"] == 4 * once["update"]
    assert decode_bytes(shape, [2, 7], 4) == 4 * 7 * 44


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1M"])
def test_the_command_reports_every_phase(tmp_path, size):
    words = ["benchmarks/ppo.py", "--sizes", size, "--rounds", "1", "--updates", "2", "--batch", "8",
             "--epochs", "1", "--response_lengths", "2", "8", "--threads", "1", "--json", str(tmp_path / "found.json")]  # fmt: skip
    done = ranks.run(ranks.python, *words, ranks=1, cwd=ROOT, log=tmp_path / "command")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["rates"]["float32_gflops"] > 0
    mine = found[size]["align"]
    seconds = mine["seconds"]
    parts = [seconds[name] for name in ("generate", "score", "update", "communication", "other")]
    assert seconds["total"] == pytest.approx(sum(parts), rel=0.01)
    assert 0.05 < mine["peak_gib"] < 4
    assert all(0 < share < 1.5 for share in mine["share_of_limit"].values())
    paths = make_models(tmp_path, size)
    policy = AutoModelForCausalLM.from_pretrained(paths["policy"]).num_parameters()
    scorer = AutoModelForSequenceClassification.from_pretrained(paths["value"]).num_parameters()
    # float32 weights, gradients and two moments of policy and value model, and weights of reference and reward model
    expected = (16 + 4) * (policy + scorer)
    assert mine["plan_gib"]["models"] * 2**30 == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_sequence_parallelism_halves_what_is_kept(tmp_path):
    words = [
        "benchmarks/sequence_parallel.py",
        "--lengths",
        "64",
        "256",
        "--rounds",
        "1",
        "--width",
        "128",
        "--layers",
        "2",
    ]
    done = ranks.run(
        ranks.python, *words, "--json", str(tmp_path / "found.json"), ranks=1, cwd=ROOT, log=tmp_path / "log"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]
    kept = {(row["mode"], row["length"]): row["kept_mib"] for row in rows}
    assert kept["sequence", 256] / kept["data", 256] == pytest.approx(0.5, abs=0.06)
    assert kept["data", 256] / kept["data", 64] == pytest.approx(4, rel=0.1)
    assert all(row["seconds_per_row"] > 0 and row["peak_mib"] > 0 for row in rows)


@pytest.mark.parametrize(("stage", "answers"), [("sft", ["completion"]), ("reward", ["chosen", "rejected"])])
def test_rows_to_train_on_have_the_tokens_that_are_counted(tmp_path, stage, answers):
    make_untrained(tmp_path, "1M")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / stage)
    counted = write_rows(tmp_path / "rows.jsonl", stage, "1M", 200)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    prompts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    lengths = [len(tokenizer(row[name] + "</s>")["input_ids"]) for row in rows for name in answers]
    assert (min(prompts), max(prompts)) == (16, 64)
    assert (min(lengths), max(lengths)) == (8, 63)
    assert 18 < sorted(lengths)[len(lengths) // 2] < 27  # the geometric mean of 8 and 64 is 22.6
    assert counted == len(answers) * sum(prompts) + sum(lengths)


def steps(*seconds, tokens=100, loss=2.0):
    return [
        {"step": i + 1, "seconds": each, "loss": loss, "tokens": tokens * (i + 1)} for i, each in enumerate(seconds)
    ]


def test_comparison_by_hand():
    """Step 1 warms up. Medians by step: align 2 and 4 s, TRL 3 and 9 s, for 200 tokens."""
    runs = {
        "align": [steps(9, 2, 4), steps(9, 1, 99), steps(9, 3, 4)],
        "trl": [steps(9, 3, 9, loss=2.25), steps(9, 3, 9), steps(9, 3, 9)],
    }
    peaks = {"align": [2**30, 2**30, 2**32], "trl": [3 * 2**29, 2**30, 2**31]}
    found = trainers.compare(runs, peaks, warm_up=1)
    assert (found["tokens"], found["steps"], found["largest_loss_difference"]) == (200, 2, 0.25)
    assert found["align"] == {"seconds_per_step": 3, "tokens_per_second": pytest.approx(200 / 6), "peak_gib": 1}
    assert found["trl"] == {"seconds_per_step": 6, "tokens_per_second": pytest.approx(200 / 12), "peak_gib": 1.5}
    assert found["ratio"] == {
        "tokens_per_second": 2.0, "tokens_per_second_by_round": [2.0, 0.12, pytest.approx(12 / 7)], "peak_gib": 1.5
    }  # fmt: skip
    runs["trl"][0] = steps(9, 3, 9, tokens=99)
    with pytest.raises(SystemExit, match="not the same work"):
        trainers.compare(runs, peaks, warm_up=1)


def test_seconds_of_our_steps_are_from_line_to_line():
    times = ["2026-01-01T00:00:59.500+00:00", "2026-01-01T00:01:00.000+00:00", "2026-01-01T00:01:02.250+00:00"]
    lines = [
        json.dumps({"step": i + 1, "time": each, "train/loss": 7.0 + i, "train/num_tokens": 10.0 * i})
        for i, each in enumerate(times)
    ]
    found = trainers.read_steps([*lines, json.dumps({"step": 3, "time": times[2], "eval/loss": 1.0})])
    assert [step["seconds"] for step in found[1:]] == [0.5, 2.25]
    assert [(step["step"], step["loss"], step["tokens"]) for step in found] == [(1, 7, 0), (2, 8, 10), (3, 9, 20)]


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """Programs as forks that need not import the libraries; `test_the_command_reports_every_phase` starts real ones."""

    def run(words: list[str], threads: int) -> tuple[str, int]:
        started, peak = (
            ranks.start(
                ranks.python, *words[1:], cwd=ROOT, log=tmp_path / "program", env={"TOKENIZERS_PARALLELISM": "false"}
            ),
            0,
        )
        while started.running():
            peak = max(peak, programs.peak_memory(started.processes[0].pid))
            time.sleep(0.05)
        assert started.wait() == [0], started.stderr[-2000:]
        return started.stdout, peak

    for module in (programs, trainers, scaling.ppo):
        monkeypatch.setattr(module, "run", run)


def test_the_stages_do_the_same_work_as_plain_trl(forked, tmp_path, monkeypatch):
    words = ["--sizes", "1M", "--modes", "sft, padding-free", "reward", "--rows", "12", "--batch", "4", "--micro_batch", "2",
             "--warm_up", "1", "--rounds", "1", "--threads", "1", "--json", f"{tmp_path}/found.json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["", *words])
    threads = torch.get_num_threads()
    trainers.main()
    torch.set_num_threads(threads)
    modes = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["1M"]
    assert list(modes) == ["sft, padding-free", "reward"]
    for found in modes.values():
        assert found["steps"] == 2
        assert len(set(found["losses"]["align"])) == 3  # other rows each time, so that the order shows
        assert found["largest_loss_difference"] < 1e-5
        assert all(0.05 < found[name]["peak_gib"] < 4 for name in ("align", "trl"))
        assert found["align"]["tokens_per_second"] > 0


def test_cost_along_an_axis_by_hand():
    def cost(*phases):
        return dict(zip(("generate", "score", "update", "other", "total"), phases, strict=True))

    found = scaling.summarise(
        [cost(1, 2, 4, 1, 8), cost(6, 4, 8, 2, 20)], [cost(10, 20, 30, 0, 60), cost(20, 60, 60, 0, 140)], [10, 20]
    )
    assert found["seconds_per_token"] == {
        "generate": [0.1, 0.3], "score": [0.2, 0.2], "update": [0.4, 0.4], "total": [0.8, 1.0]
    }  # fmt: skip
    assert found["relative_seconds"]["total"] == [1, 1.25]
    assert found["relative_operations"]["total"] == [1, pytest.approx(7 / 6)]
    assert found["relative_operations"]["score"] == [1, 1.5]
    assert found["spread"]["total"] == 0.25
    assert found["spread"]["generate"] == pytest.approx(2.0)


def test_points_are_measured_as_they_say(monkeypatch):
    asked = []

    def measure(arguments, size, folder, machine):
        asked.append(arguments)
        return {"align": {"seconds": {"tokens_per_second": 50.0, "total": tokens / 50}, "peak_gib": 1.0}}

    monkeypatch.setattr(scaling.ppo, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--batches", "--threads", "2", "--zeros", "0", "3"])
    arguments = scaling.parse()
    axes = scaling.axes(arguments)
    assert list(axes) == ["response_length", "size", "ranks", "zero"]
    base = scaling.Point(64, 16, "10M", 1, 0)
    assert all(base in axes[name] for name in ("response_length", "size", "ranks"))
    assert axes["zero"] == [base._replace(ranks=2), base._replace(ranks=2, zero=3)]
    tokens = 16 * 64
    scaling.measure(arguments, axes["zero"][1], {})
    scaling.measure(arguments, base, {})
    assert [(each.ranks, each.zero, each.threads) for each in asked] == [(2, 3, 2), (1, None, 2)]
    assert (asked[0].sizes, asked[0].batch, asked[0].response_lengths) == (["10M"], 16, [64, 64])
    tokens = 16 * 40  # responses that ended early
    with pytest.raises(SystemExit, match="other work"):
        scaling.measure(arguments, base, {})
    work = scaling.operations(arguments, base)
    assert work["total"] == work["generate"] + work["score"] + work["update"]


def test_panels_by_hand():
    panel = panels.Panel("words & numbers", [1, 10, 100], {"up": [1, 10, 100], "expected": [1, 0, 100]})
    root = ElementTree.fromstring(panels.draw([panel, panel], "ms", "expected"))
    up, expected = [line.get("points") for line in root.findall(".//{*}g/{*}polyline")][:2]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in up.split()]
    assert (x1 - x0, y1 - y0) == pytest.approx((x2 - x1, y2 - y1))  # both axes are logarithmic
    assert x0 < x1
    assert y0 > y1
    assert len(expected.split()) == 2  # a logarithm has no 0
    assert len(root.findall(".//{*}polyline[@stroke-dasharray]")) == 3  # in the legend too
    assert panels.ticks([0.3, 4]) == [0.2, 0.5, 1, 2, 5]
    assert panels.ticks([0.03, 400]) == [0.01, 0.1, 1, 10, 100, 1000]
    assert panels.ticks([2, 2]) == [2, 5]


def test_scaling_measures_and_draws_every_axis(forked, tmp_path, monkeypatch):
    rates = dict.fromkeys(("float32_gflops", "bfloat16_gflops", "memory_gbytes"), 10.0)
    monkeypatch.setattr(scaling, "rates", lambda device: rates)  # seconds that another test spends
    words = ["--response_lengths", "4", "8", "--batches", "4", "--sizes", "1M", "--ranks", "1", "--zeros", "0", "--zero_ranks", "1",
             "--response_length", "8", "--batch", "4", "--size", "1M", "--updates", "2", "--threads", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["", *words, "--json", f"{tmp_path}/found.json", "--picture", f"{tmp_path}/a.svg"])
    threads = torch.get_num_threads()
    scaling.main()
    torch.set_num_threads(threads)
    axes = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["axes"]
    assert [axis["values"] for axis in axes.values()] == [[4, 8], [4], ["1M"], [1], [0]]
    for axis in axes.values():
        assert axis["seconds_per_token"]["total"][-1] == axes["response_length"]["seconds_per_token"]["total"][1]
        assert 0.05 < axis["peak_gib"][0] < 4
    assert axes["batch"]["spread"]["total"] == 0
    root = ElementTree.fromstring((tmp_path / "a.svg").read_text(encoding="utf-8"))
    shown = [[text.text for text in group.findall("{*}text")] for group in root.findall("{*}g")]
    assert all(title in texts for title, texts in zip(scaling.TITLES.values(), shown, strict=True))
    assert all("ms per response token" in texts for texts in shown)


def test_a_curve_over_episodes(monkeypatch, tmp_path, capsys):
    """Runs of two updates, by the command; then by the benchmark, which repeats none that it has."""
    for name, settings in list(verify_episodes.OBJECTIVES.items()):
        few = {"gradient_steps": 3} if "replay_size" in settings else {"num_ppo_epochs": 1}
        small = {"minibatch_size": 256, "warmup_steps": 0, "learning_rate": 1e-3, **few}
        monkeypatch.setitem(verify_episodes.OBJECTIVES, name, settings | small)
    monkeypatch.setattr(verify_episodes, "BETAS", (0.5,))
    for words, said in (
        (["--seed"], "--seed: expected one value"),
        (["--kl_coef", "1"], "--kl_coef: --episodes compares several"),
    ):
        with pytest.raises(UserError, match=said):
            verify_episodes.run([512], None, None, words)
    with pytest.raises(UserError, match="expected multiples of 256, the responses of an update, got 500"):
        verify_episodes.run([512, 500])
    path = tmp_path / "found.json"
    code = verify_episodes.run([512], None, str(path), ["--seed", "3"])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert code == int(not found["passed"])
    scores = {case["objective"]: case["score"] for case in found["cases"]}
    assert list(scores) == ["ppo", "rloo", "trajectory_balance", "path_consistency"]
    assert found["passed"] == (max(scores, key=scores.get) in ("trajectory_balance", "path_consistency"))
    assert all(0.02 < score < 0.9 for score in scores.values())
    assert all(case["seed"] == 3 and case["kl_to_optimum"] > 0 for case in found["cases"])
    assert f"{scores['rloo']:.3f}" in capsys.readouterr().out

    lines = tmp_path / "found.jsonl"
    points = [(512, 3, 0.5, "ppo"), (512, 4, 0.5, "ppo")]
    for case in found["cases"]:
        episodes.add(lines, case)
    assert episodes.missing(points, lines) == [points[1]]
    episodes.add(lines, found["cases"][0] | {"seed": 4, "score": scores["ppo"] + 0.02})
    assert not episodes.missing(points, lines)
    ends = f"({scores['ppo']:.3f} to {scores['ppo'] + 0.02:.3f})"
    console = Console(width=140)
    console.print(episodes.scores_table(episodes.read(lines)))
    assert f"{scores['ppo'] + 0.01:.3f} {ends}" in capsys.readouterr().out
    root = ElementTree.fromstring(episodes.picture(episodes.read(lines)))
    assert "episodes, beta 0.5" in [text.text for text in root.findall(".//{*}g/{*}text")]


def test_curves_of_the_quickstart(capsys):
    """From the lines of `metrics.jsonl`: evaluations have no time, and count for no seconds."""

    def run(seed: int, *rewards: float) -> dict:
        names = quickstart_episodes.MEASURED.values()
        rows = []
        for update, reward in enumerate(rewards, 1):
            rows += [{"step": update, "episode": 128.0 * update, "time/total": 2.0 + seed}]
            rows += [{"step": update, **dict.fromkeys(names, 0.5), quickstart_episodes.TRUE: reward}]
        curve = quickstart_episodes.curve_of(rows, 2.5)
        return {"recipe": "PPO", "episodes": 256, "seed": seed, "curve": curve}

    runs = [run(1, 3.0, 4.0), run(2, 5.0, 5.5)]
    assert [(point["episode"], point["seconds"]) for point in runs[0]["curve"]] == [(0, 0), (128, 3.0), (256, 6.0)]
    assert runs[0]["curve"][2]["true"] == 4.0
    Console(width=140).print(quickstart_episodes.table_of(runs))
    assert "| 256      | 256 | 7.00        | 4.75 | 4.00, 5.50 | 0.50 | 0.50" in capsys.readouterr().out
    root = ElementTree.fromstring(quickstart_episodes.picture(runs))
    circles = [[circle.get("cx") for circle in panel.findall("{*}circle")] for panel in root.findall(".//{*}g")]
    assert [len(each) for each in circles] == [2, 2]
    words = [text.text for text in root.findall(".//{*}g/{*}text")]
    assert "CPU seconds" in words
    assert "3.5" not in words, "only the labels are written"
