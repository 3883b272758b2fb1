"""`align verify`: the real PPO stage against the exact optimum, on languages small enough to enumerate.

A small transformer is policy, reference and value model; recipe and reward function are files, as a user's are. After
training every response is enumerated under the trained policy. Nothing is downloaded, and temporary files are deleted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from rich.table import Table
from transformers import AutoModelForCausalLM

from align.cli.report_file import json_report_path, write_json_report
from align.cli.run import run as run_folder
from align.cli.verify_languages import (
    DENSE,
    LARGE,
    LARGE_BY_VLLM,
    REWARDS,
    SMALL,
    SMALL_BY_VLLM,
    ExactResult,
    Language,
    exact_result,
)
from align.config.functions import resolve_function
from align.config.load import load_recipe
from align.config.objective import unread_keys
from align.config.ppo import PPORecipe
from align.config.read import apply_overrides
from align.ppo.train import run as run_ppo
from align.runs.quiet import quiet
from align.runs.tables import cell, make_console, make_table

MODULE = "align_verify_rewards"
BETAS = (0.5, 1.0)
MIN_NORMALISED = 0.98  # J of the trained policy, with the reference at 0 and the optimum at 1
MAX_DIVERGENCE = 0.02  # KL(pi || pi*) on the small language, nats
ROLLOUT = 256
SETTINGS: dict[str, Any] = {
    "stage": "ppo",
    "eval_fraction": 0,
    "rollout_batch_size": ROLLOUT,
    "minibatch_size": 128,
    "num_ppo_epochs": 1,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 256,
    "learning_rate": 1e-3,
    "value_learning_rate": 5e-3,
    "warmup_steps": 0.1,
    "adam_beta2": 0.95,
    "cliprange_value": 10.0,  # values start at 0 and are of the size of the scores
    "lam": 1.0,
    "logging_steps": 10,
}
LANGUAGES = (SMALL, LARGE)
BY_VLLM = (SMALL_BY_VLLM, LARGE_BY_VLLM)
UPDATES = {SMALL.name: 100, LARGE.name: 150, DENSE.name: 80}


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One run: the language, and the recipe that trains on it."""

    language: Language
    path: str
    recipe: PPORecipe

    @property
    def beta(self) -> float:
        return self.recipe.kl_coef


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a run."""

    language: Language
    beta: float
    result: ExactResult

    @property
    def passed(self) -> bool:
        near = self.language.name != SMALL.name or self.result.divergence < MAX_DIVERGENCE
        return near and self.result.normalised >= MIN_NORMALISED

    def as_dict(self) -> dict[str, Any]:
        """For JSON; divergences in nats per response."""
        return {
            "language": self.language.name,
            "prompts": len(self.language.prompts),
            "responses": len(self.language.responses()),
            "beta": self.beta,
            "j_reference": self.result.reference,
            "j": self.result.reached,
            "j_optimum": self.result.optimum,
            "normalised": self.result.normalised,
            "kl_to_optimum": self.result.divergence,
            "kl_to_reference": self.result.kl,
            "kl_of_optimum": self.result.optimal_kl,
            "passed": self.passed,
        }


def run(num_gpus: int | None = None, json_path: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Train on every language at every beta, and print the exact results; returns 0 when all pass, else 1.

    Args:
        num_gpus: processes under the `deepspeed` launcher; without it everything runs in this one.
        json_path: also write the numbers there; "-" prints them instead of the table.
        overrides: `--key value` for the recipes: another estimator, a DeepSpeed file.

    Raises:
        UserError: a wrong override, a file at `json_path` that is no earlier report, or a stage that failed.
    """
    quiet()
    json_path = json_report_path(json_path)
    began = time.monotonic()
    given: dict[str, Any] = {}
    apply_overrides(given, overrides, get_type_hints(PPORecipe))
    languages = BY_VLLM if given.get("rollout_engine") == "vllm" else LANGUAGES
    with tempfile.TemporaryDirectory(prefix="align-verify-") as folder:
        cases = [write_case(Path(folder), language, beta, overrides) for language in languages for beta in BETAS]
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for the result
            train(folder, cases, num_gpus, overrides)
        verdicts = [Verdict(case.language, case.beta, measure(case)) for case in cases]
    passed = sum(verdict.passed for verdict in verdicts)
    report = {
        "passed": passed == len(verdicts),
        "seconds": round(time.monotonic() - began, 1),
        "cases": [verdict.as_dict() for verdict in verdicts],
    }
    if write_json_report(report, json_path):
        console = make_console()
        console.print(verdict_table(verdicts))
        console.print(
            f"{passed} of {len(verdicts)} passed in {report['seconds']:.0f} s: a score of {MIN_NORMALISED} is wanted, "
            f"and on the small language less than {MAX_DIVERGENCE} nats from pi*.",
            soft_wrap=True,
        )
    return int(passed < len(verdicts))


def write_case(folder: Path, language: Language, beta: float, overrides: Sequence[str] = (), **changes: Any) -> Case:
    """Write models, prompts, reward functions and a numbered recipe into `folder`, and read the recipe as a user's.

    Args:
        changes: recipe keys in place of SETTINGS, of which those are left out that the objective does not read.

    Raises:
        UserError: a wrong override.
    """
    start = folder / language.name
    chosen = dict(changes)
    apply_overrides(chosen, overrides, get_type_hints(PPORecipe))
    language.reference().save_pretrained(start)
    language.tokenizer().save_pretrained(start)
    (folder / f"{MODULE}.py").write_text(REWARDS, encoding="utf-8")
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in language.prompts]
    prompts = folder / f"{language.name}.jsonl"
    prompts.write_text("".join(rows) * 8, encoding="utf-8")  # every process wants a row
    number = len(list(folder.glob("*.yaml"))) + 1
    unread = unread_keys(chosen.get("objective", "ppo"), chosen.get("num_generations", 1))
    keys = {
        **{name: value for name, value in SETTINGS.items() if name not in unread},
        "output_dir": str(folder / f"out-{number}"),
        "sft_model_path": str(start),
        "reward_funcs": [f"{MODULE}:{language.reward}"],
        "train_dataset": str(prompts),
        "response_length": language.length,
        "kl_coef": beta,
        "total_episodes": UPDATES[language.name] * ROLLOUT,
        **changes,
    }
    path = folder / f"{number}_{language.name}.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    recipe = load_recipe("ppo", str(path), overrides)
    assert isinstance(recipe, PPORecipe)
    return Case(language, str(path), recipe)


def train(folder: str, cases: Sequence[Case], num_gpus: int | None = None, overrides: Sequence[str] = ()) -> None:
    """Run the recipes of `folder`, which are those of `cases`: in this process, or as `align run` does with `num_gpus`.

    Raises:
        UserError: a stage failed.
    """
    if num_gpus is not None or any(case.recipe.deepspeed for case in cases):
        run_folder(folder, num_gpus, overrides)
        return
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)}: {case.language.name} language, beta {case.beta}", file=sys.stderr)
        run_ppo(case.recipe)


def measure(case: Case) -> ExactResult:
    """The exact result of a case, from the folders that the stage started from and wrote."""
    recipe = case.recipe
    trained, start = (
        case.language.logprobs(AutoModelForCausalLM.from_pretrained(path), recipe.temperature)
        for path in (recipe.output_dir, recipe.sft_model_path)
    )
    score = case.language.scores(resolve_function(recipe.reward_funcs[0], "reward_funcs"))
    found = exact_result(trained, start, score, case.beta)
    missing = found.optimum - found.reached - case.beta * found.divergence
    assert abs(missing) < 1e-5, f"J* - J - beta KL(pi || pi*) is {missing}, not 0: not every response was counted"
    return found


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """A row for each run. Mean over prompts of J in units of score, and of KL in nats per response."""
    columns = ("language", "prompts", "responses", "beta", "J(ref)", "J(pi)", "J*", "score", "KL(pi|pi*)", "KL(pi|ref)")
    table = make_table("score = (J(pi) - J(ref)) / (J* - J(ref)), exact", *columns, "KL(pi*|ref)", "")
    for verdict in verdicts:
        *numbers, passed = verdict.as_dict().values()
        table.add_row(*map(cell, numbers), "pass" if passed else "FAIL")
    return table
