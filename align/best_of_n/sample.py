"""Best-of-n sampling: `align bon`.

    align bon recipes/mine/4_bon.yaml
    deepspeed --num_gpus 8 --module align bon recipes/mine/4_bon.yaml

Samples N responses to each prompt with PPO's sampler and scores them as PPO does. From these come the frontier for
every n up to N, the best response to each prompt with a random one as its control, and preference pairs. The noise of a
response depends on the seed and its number alone, and batches do not depend on the number of processes, each of which holds
complete models. A run that was killed goes on after the last batches that it finished.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.best_of_n.datasets import BEST, PAIRS, RANDOM, RESPONSES, count_left_out, data_sets
from align.best_of_n.frontier import frontier
from align.best_of_n.inputs import Inputs, prepare_inputs
from align.best_of_n.progress import Sample, SampleFile
from align.best_of_n.results import AGAIN, CHART, REPORT, chart, eos_warning, finished, report_text, tables
from align.config.best_of_n import BestOfNRecipe
from align.data.rows import render_text
from align.engine.distributed import World, connect, disconnect
from align.engine.engine import WholeModel
from align.engine.faults import during
from align.engine.sharding import load_device
from align.engine.user_functions import user_function
from align.errors import UserError
from align.evaluate.reward_model import RewardModel, load_whole_reward, model_sources
from align.generation.responses import decode_responses, unpadded
from align.generation.sampler import PromptBatch, Sampler
from align.maths.advantages import missing_eos_scores
from align.models.load import load_policy
from align.runs.files import digest, write_json, write_text
from align.runs.measurement import claim_measurement, print_finished, record_rows
from align.runs.output_folder import PARTS, RESULTS, one_run_per_folder, share
from align.runs.own_files import RUN, delete, own
from align.runs.progress import Display
from align.runs.quiet import quiet
from align.runs.results import BestOfNResult
from align.runs.same_run import COSMETIC_KEYS
from align.runs.tables import make_console
from align.terminal import say
from reward_models.combine import RewardSum
from reward_models.responses import Responses, RewardSource

SAMPLES = "samples.jsonl"  # in the folder of an unfinished run


@one_run_per_folder
def run(recipe: BestOfNRecipe) -> BestOfNResult | None:
    """Sample, score and write; returns the content of `results.json` on rank 0, None on the others."""
    quiet()
    if (earlier := finished(recipe)) is not None:
        print_finished(recipe, f"sampled already; see {REPORT} there")
        return BestOfNResult.from_json(recipe.output_dir, earlier)
    this = claim_measurement(recipe, AGAIN)
    inputs = prepare_inputs(recipe)
    world = connect(deepspeed_files=False, reward_timeout=recipe.reward_timeout, tf32=recipe.tf32)
    folder = Path(recipe.output_dir)
    if world.is_main:
        own(folder / PARTS).mkdir(exist_ok=True)
    else:
        share(folder)
    this = record_rows(recipe, this, inputs.report, AGAIN)
    plain = {name: value for name, value in this["recipe"].items() if name not in COSMETIC_KEYS}
    key = digest([plain, this["inputs"], inputs.report["skipped"]])
    samples = BestOfN(recipe, inputs, world).sample(SampleFile(folder / PARTS / SAMPLES, key))
    result = None
    if world.is_main:
        size = recipe.num_generations
        groups = [samples[start : start + size] for start in range(0, len(samples), size)]
        names = [render_text(prompt.prompt) for prompt, _ in inputs.prompts]
        lines = data_sets(inputs.tokenizer, inputs.prompts, groups, recipe.rejected, recipe.seed)
        results = {
            **this,
            "prompts": len(groups),
            "num_generations": size,
            "frontier": frontier(groups, names, recipe.bootstrap_iters, recipe.seed),
            "eos_rate": sum(each.ended for each in samples) / len(samples),
            "left_out": count_left_out(lines, size),
            "datasets": {name: len(rows) for name, rows in lines.items()},
            "data": inputs.report,
        }
        with during("records", folder):
            own(*(folder / name for name in (BEST, RANDOM, PAIRS, RESPONSES, CHART, REPORT, RESULTS)))
            for name, rows in lines.items():
                write_text(folder / name, "".join(rows))
            write_text(folder / CHART, chart(results["frontier"]))
            write_text(folder / REPORT, report_text(results))
            write_json(folder / RESULTS, results)  # the last: it marks the run as finished
        delete(folder / PARTS)
        (folder / RUN).unlink()
        result = BestOfNResult.from_json(recipe.output_dir, results)
        console = make_console()
        for table in tables(results):
            console.print(table.to_rich())
        if warning := eos_warning(results):
            say(warning)
    world.barrier()
    disconnect()
    return result


class BestOfN:
    """The model to sample from and the rewards, on one rank."""

    def __init__(self, recipe: BestOfNRecipe, inputs: Inputs, world: World):
        self.recipe, self.inputs, self.world = recipe, inputs, world
        model: Any = load_policy(
            recipe.model_name_or_path,
            dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            device=load_device(world),
        )
        self.model = WholeModel(model, world)
        self.rewards = RewardSum(self._sources("reward", inputs.rewards), recipe.reward_weights or None)
        judges = self._sources("judge_reward", [] if inputs.judge is None else [inputs.judge])
        self.judge = RewardSum(judges) if judges else None
        self.sampler = Sampler(
            tokenizer=inputs.tokenizer,
            temperature=recipe.temperature,
            response_length=recipe.response_length,
            batch_size=recipe.per_device_eval_batch_size,
            seed=recipe.seed,
            stop_strings=recipe.stop_strings,
        )

    def _sources(self, kind: str, given: Sequence[RewardModel]) -> list[RewardSource]:
        """The sources of the keys `{kind}_model_path`, whose models are `given`, and `{kind}_funcs`, in this order."""
        recipe, key = self.recipe, f"{kind}_funcs"
        load = partial(load_whole_reward, recipe=recipe, world=self.world)
        models = model_sources(f"{kind}_model", given, load, recipe.reward_ensemble, recipe.reward_variance_coef or 0.0)
        return models + [user_function(name, key, recipe.reward_timeout) for name in getattr(recipe, key)]

    def sample(self, file: SampleFile) -> list[Sample]:
        """All samples on rank 0, N of each prompt in the order of the prompts; those in the file are not sampled again.

        Raises:
            UserError: a reward failed; the message shows the row.
        """
        world, size = self.world, self.recipe.per_device_eval_batch_size
        total = len(self.inputs.prompts) * self.recipe.num_generations
        samples = file.read() if world.is_main else []
        done = int(world.gather_text(str(len(samples)))[0])
        score = sum(each.score for each in samples)
        display = Display("bon", total) if world.is_main else None
        with contextlib.ExitStack() as stack:
            if display is not None:
                display.start(done)
                stack.callback(display.stop)
                display.update(done, {})
            while done < total:
                starts = [done + rank * size for rank in range(world.size) if done + rank * size < total]
                mine: list[Sample] = []
                if world.rank < len(starts):
                    mine = self._batch(range(starts[world.rank], min(starts[world.rank] + size, total)))
                gathered = world.gather_text(json.dumps([asdict(each) for each in mine]))
                batches = [[Sample(**row) for row in json.loads(text)] for text in gathered[: len(starts)]]
                if world.is_main:
                    file.append(done, batches)
                    samples += (new := [each for batch in batches for each in batch])
                    score += sum(each.score for each in new)
                done += sum(map(len, batches))
                if display is not None:
                    display.update(done, {"score": score / len(samples)})
        return samples

    def _batch(self, numbers: Sequence[int]) -> list[Sample]:
        """Sample and score the responses with these numbers; response i belongs to prompt i // N."""
        prompts = [self.inputs.prompts[number // self.recipe.num_generations] for number in numbers]
        batch = PromptBatch([prompt for prompt, _ in prompts], [ids for _, ids in prompts], "best of n", list(numbers))
        sampled = self.sampler.sample(self.model, self.world, batch)
        responses = decode_responses(self.inputs.tokenizer, batch.prompts, sampled)
        scores, sources = self._score(self.rewards, responses)
        judged = [None] * len(prompts) if self.judge is None else self._score(self.judge, responses)[0].tolist()
        ended = sampled.ended.cpu()
        scores = missing_eos_scores(scores, ended, self.recipe.missing_eos_penalty, self.recipe.missing_eos_score)
        of_sources = zip(*(each.tolist() for each in sources.values()), strict=True)
        return [
            Sample(ids, has_ended, score, [None if math.isnan(each) else each for each in own], judge)
            for ids, has_ended, score, own, judge in zip(
                unpadded(sampled.response_ids, sampled.mask),
                ended.tolist(),
                scores.tolist(),
                of_sources,
                judged,
                strict=True,
            )
        ]

    @during("score_reward")
    def _score(self, rewards: RewardSum, responses: Responses) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            scores, sources, _ = rewards.score(responses)
        except ValueError as error:
            raise UserError(f"{'the judge: ' * (rewards is self.judge)}{error}") from error
        return scores, sources
