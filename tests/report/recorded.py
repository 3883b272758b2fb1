"""Metrics of real runs, kept small: `runs/NAME.json` has their values by step, and this makes run folders of them again.

python -m tests.report.recorded OUTPUT_DIR NAME "what was done"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.worlds import manifest, write_jsonl

RUNS = Path(__file__).parent / "runs"
ROWS = 96  # responses that are kept, without their texts


def record(folder: Path, name: str, about: str) -> None:
    """Keep the metrics of a finished run."""
    done = json.loads((folder / "stage.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in (lines[0], lines[-1])]
    columns: dict[str, Any] = {}
    for line in lines:
        for metric, value in line.items():
            if metric not in ("step", "time"):
                columns.setdefault(metric, {})[line["step"]] = rounded(value)
    rows = read_rows(folder)
    keys = ("total_episodes", "rollout_batch_size", "max_grad_norm", "kl_target", "response_length", "reward_funcs",
            "reward_model_path", "sft_model_path", "normalize_scores", "bf16", "seed", "max_steps")  # fmt: skip
    kept = {
        "about": about,
        "stage": done["stage"],
        "recipe": {key: done["recipe"][key] for key in keys if key in done["recipe"]},
        "results": {key: done["results"][key] for key in ("table", "steps", "pairs") if key in done["results"]},
        "score_mean": rounded(done.get("score_mean")),
        "times": times,
        "metrics": columns,
        "responses": {key: [rounded(row[key]) for row in rows] for key in (rows[0] if rows else ())},
    }
    kept["results"]["table"] = [[m, rounded(a), rounded(b)] for m, a, b in kept["results"].get("table", [])]
    (RUNS / f"{name}.json").write_text(json.dumps(kept, separators=(",", ":")).replace('},"', '},\n"') + "\n")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    numbers = [{k: v for k, v in row.items() if not isinstance(v, str)} for row in rows if row["name"] == "responses"]
    return numbers[:ROWS]


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def make_run(name: str, folder: Path, text: str = "as it was said") -> Path:
    """A run folder with the metrics of `runs/NAME.json`; responses have `text` and a number."""
    kept = json.loads((RUNS / f"{name}.json").read_text())
    record = manifest(kept["stage"], recipe={**kept["recipe"], "output_dir": str(folder)}, results=kept["results"])
    if kept["score_mean"] is not None:
        record["score_mean"] = kept["score_mean"]
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps(record))
    steps = sorted({int(step) for values in kept["metrics"].values() for step in values})
    lines = [
        {"step": step, "time": kept["times"][step == steps[-1]]}
        | {metric: values[str(step)] for metric, values in kept["metrics"].items() if str(step) in values}
        for step in steps
    ]
    write_jsonl(folder / "metrics.jsonl", lines)
    if responses := kept["responses"]:
        rows = [dict(zip(responses, values, strict=True)) for values in zip(*responses.values(), strict=True)]
        texts = [
            {"prompt": f"question {i}", "sft": f"{text} {i}", "response": f"{text}, {i}"} for i in range(len(rows))
        ]
        write_jsonl(
            folder / "samples.jsonl", [{"name": "responses", **t, **row} for t, row in zip(texts, rows, strict=True)]
        )
    return folder


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
