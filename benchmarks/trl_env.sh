#!/usr/bin/env bash
# A virtual environment with TRL 1.12.0, the last release with PPO, to compare with: benchmarks/trl_env.sh [FOLDER]
set -euo pipefail
folder="${1:-outputs/trl-1.12}"
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet "trl==1.12.0" "torch>=2.7,<2.14" "transformers>=5.23,<5.24"
echo "$folder/bin/python"
