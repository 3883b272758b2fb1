#!/usr/bin/env bash
# What one GPU makes of the package, in under ten minutes, as JSON for benchmarks/README.md. Parts that need a GPU are skipped without one.
#
#   benchmarks/gpu.sh [FOLDER]                            # outputs/gpu by default; logs of the parts are there
#   VLLM_PYTHON=vllm-env/bin/python benchmarks/gpu.sh     # with vLLM in an environment of its own, see docs/ppo.md
#   LIMIT=1800 benchmarks/gpu.sh                          # more seconds in all, as on a slow CPU
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
folder="${1:-$root/outputs/gpu}"
if [ -n "$(ls -A "$folder" 2>/dev/null)" ] && [ ! -f "$folder/parts" ]; then
    echo "$folder: expected a folder that is empty or does not exist; name another" >&2
    exit 2
fi
mkdir -p "$folder"
cd "$folder" # the quickstart's recipes write below the current folder
export PYTHONPATH="$root" WANDB_MODE=offline
limit="${LIMIT:-600}"
: >parts

part() { # NAME COMMAND...: runs it with its output in NAME.log, and notes how it ended
    local name="$1" began="$SECONDS" status=ok
    shift
    if ((SECONDS >= limit)); then
        status="skipped: no time is left of $limit s"
    else
        echo "== $name" >&2
        timeout "$((limit - SECONDS))" "$@" >"$name.log" 2>&1 </dev/null || status="failed: exit code $?, see $name.log"
        if [[ "$status" == *"code 124,"* ]]; then status="stopped: no time was left of $limit s"; fi
    fi
    printf '%s\t%s\t%s\n' "$name" "$((SECONDS - began))" "$status" >>parts
}
skip() { # NAME REASON
    echo "== $1: skipped: $2" >&2
    printf '%s\t0\tskipped: %s\n' "$1" "$2" >>parts
}

part quickstart python -m align run "$root/recipes/quickstart"
bf16=(--bf16 true --num_train_epochs 2)
part sft_bf16 python -m align sft "$root/recipes/quickstart/1_sft.yaml" "${bf16[@]}" --output_dir outputs/sft_bf16
part reward_bf16 python -m align reward "$root/recipes/quickstart/2_reward.yaml" "${bf16[@]}" --output_dir outputs/reward_bf16
ppo=(python -m align ppo "$root/recipes/quickstart/3_ppo.yaml" --bf16 true --total_episodes 256)
part ppo_bf16 "${ppo[@]}" --output_dir outputs/ppo_bf16

step=(python "$root/benchmarks/ppo.py" --sizes 0.5B --bf16 --batch 64 --micro_batch 16 --epochs 1 --updates 2 --rounds 1
    --prompt_lengths 64 256 --response_lengths 64 384)
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    part ppo_graphs "${ppo[@]}" --cuda_graphs true --output_dir outputs/ppo_graphs
    part decoding python "$root/benchmarks/decoding.py" --sizes 0.5B --bf16 --rows 256 --batch 64 --mean 128 --rounds 1 --json decoding.json
    part step "${step[@]}" --json step.json
    if [ -n "${VLLM_PYTHON:-}" ]; then
        part step_vllm "${step[@]}" --vllm "$VLLM_PYTHON" --json step_vllm.json
    else
        skip step_vllm "VLLM_PYTHON is not set"
    fi
else
    skip ppo_graphs "no GPU"
    skip decoding "no GPU"
    skip step "no GPU"
    skip step_vllm "no GPU"
fi
part verify python -m align verify --json verify.json

python - <<'REPORT'
import json
from pathlib import Path


def read(path):
    return json.loads(Path(path).read_text()) if Path(path).exists() else None


def results(folder):
    manifest = read(f"{folder}/stage.json") or {}
    numbers = {name: value for name, value in manifest.get("results", {}).items() if isinstance(value, (int, float))}
    metrics = Path(folder, "metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    checks = {name: value for line in lines for name, value in line.items() if name.startswith("self_check/")}
    return {**numbers, **checks}


parts = [line.split("\t") for line in Path("parts").read_text().splitlines()]
folders = {"quickstart": "outputs/quickstart/3_ppo", "ppo_graphs": "outputs/ppo_graphs", **{f"{stage}_bf16": f"outputs/{stage}_bf16" for stage in ("sft", "reward", "ppo")}}
found = {name: {"seconds": int(seconds), "status": status} for name, seconds, status in parts}
for name, part in found.items():
    if part["status"] == "ok":
        part["results"] = results(folders[name]) if name in folders else read(f"{name}.json")
print(json.dumps(found, indent=2))
REPORT
