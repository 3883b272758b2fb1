"""Stage 3: PPO against the reward, with a KL penalty against the frozen SFT reference; one update is `align/ppo/step.py`.

Run by `align ppo recipes/quickstart/3_ppo.yaml` or `deepspeed --num_gpus 8 --module align.ppo recipes/hh-rlhf/3_ppo.yaml`.
"""

from __future__ import annotations

from align.config.ppo import PPORecipe
from align.engine.batch_plan import batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import connect, disconnect
from align.engine.stopping import stops_between_steps
from align.errors import UserError
from align.ppo.checkpoint import save_if_due
from align.ppo.collapse import CollapseWatch
from align.ppo.data import load_data
from align.ppo.evaluation import Evaluation
from align.ppo.inputs import check_ppo_inputs
from align.ppo.outputs import save_outputs
from align.ppo.rollout_server import rollout_server
from align.ppo.self_checks import check_start
from align.ppo.setup import set_up
from align.ppo.tracking import tracked_step
from align.runs.checkpoint import step_of
from align.runs.manifest import open_stage
from align.runs.output_folder import one_run_per_folder
from align.runs.quiet import quiet
from align.runs.results import PPOResult
from align.runs.stage import finished_results, last_checkpoint
from align.runs.tracker import Tracker


@one_run_per_folder
def run(recipe: PPORecipe) -> PPOResult:
    """Train a policy by PPO; returns the results, which are also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return PPOResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe), max(recipe.reward_timeout, recipe.vllm_server_timeout), recipe.tf32)
    if recipe.cuda_graphs and world.device.type != "cuda":
        raise UserError("cuda_graphs: needs a GPU, and torch sees none; leave it out.")
    plan = batch_plan(recipe, world.size)
    inputs = check_ppo_inputs(recipe)
    data = load_data(recipe, inputs, world)
    checkpoint = last_checkpoint(recipe, world, data.report)
    start = step_of(checkpoint)
    tracked = Tracker(recipe, "ppo", recipe.num_updates, resume_step=start)
    longest = data.longest_prompt + recipe.response_length
    with tracked as tracker, rollout_server(recipe, world, longest) as vllm:
        tracker.say(plan.describe(), *inputs.describe_heads(recipe.estimator.value_model))
        ppo = set_up(recipe, inputs, data, plan, world, checkpoint, vllm)
        checks = check_start(ppo, tracker, start)
        evaluation = Evaluation(ppo, data.held_out, start)
        watch = CollapseWatch(recipe, ppo.progress, evaluation.sft_eos_rate, checks.get("self_check/eos_rate"))
        with stops_between_steps():
            for done in range(start + 1, ppo.updates + 1):
                tracked_step(ppo, tracker, watch, done, checks if done == 1 else {})
                evaluation.track_if_due(tracker, done)
                if evaluation.stops or done == ppo.updates:
                    break
                save_if_due(ppo, done)
        results = {"updates": done, "best": ppo.progress.best, **evaluation.results()}
        save_outputs(ppo, tracker, data.report, results, evaluation.chart())
    disconnect()
    return PPOResult.from_json(recipe.output_dir, results)
