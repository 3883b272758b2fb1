"""`python -m align.judge RECIPE`, alone or under the `deepspeed` launcher."""

from align.runs.launch import run_stage_cli

if __name__ == "__main__":
    run_stage_cli("judge-reward")
