"""The benchmarks: work that is what it is said to be, counted right, and commands that run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from countdown import EOS, make_models, write_prompts  # noqa: E402
from machine import decode_bytes, step_flops  # noqa: E402

from align.generation import generate, pad_left, uniforms  # noqa: E402


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
    responses, real, _ = generate(model, ids, mask, uniforms(0, "test", range(24), 64), 1.0, EOS, 0)
    lengths = real.sum(1).tolist()
    assert lengths == [row[-1] % 64 + 1 for row in rows]
    assert sorted(lengths) == [round(1 + (i + 0.5) / 24 * 63) for i in range(24)]
    assert all(EOS in row for row in responses.tolist())


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


@pytest.mark.parametrize("size", ["1M"])
def test_the_command_reports_every_phase(tmp_path, size):
    words = [sys.executable, "benchmarks/ppo.py", "--sizes", size, "--rounds", "1", "--updates", "2", "--batch", "8",
             "--epochs", "1", "--response_lengths", "2", "8", "--threads", "1", "--json", str(tmp_path / "found.json")]  # fmt: skip
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["rates"]["float32_gflops"] > 0
    mine = found[size]["align"]
    seconds = mine["seconds"]
    parts = [seconds[name] for name in ("generate", "score", "update", "communication", "other")]
    assert seconds["total"] == pytest.approx(sum(parts), rel=0.01)
    assert 0.05 < mine["peak_gib"] < 4
    assert all(0 < share < 1.5 for share in mine["share_of_limit"].values())
