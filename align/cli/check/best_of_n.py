"""`align check` of a recipe for `align bon`: its models, prompts and rewards, without weights."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from align.best_of_n.inputs import prepare_inputs
from align.best_of_n.results import AGAIN, finished
from align.cli.check.findings import Context, describe, with_stand_ins, writable
from align.cli.check.sample_rows import marked
from align.config.best_of_n import BestOfNRecipe
from align.config.functions import resolve_function
from align.models.inspect_folder import inspect_inputs
from align.runs.measurement import check_measured_rows, unfinished_measurement
from align.runs.output_folder import find_mark


def check(recipe: BestOfNRecipe, context: Context) -> None:
    """Report what can be found out about a recipe without loading weights."""
    report, begun = context.report, None
    with report.part():
        mark = None if (done := finished(recipe)) else find_mark(recipe.output_dir)
        begun = None if done else unfinished_measurement(recipe, AGAIN)
        state = "is finished; the step would be skipped" if done else "which would be resumed" if mark else "new"
        report.say(f"output_dir: {writable(Path(recipe.output_dir))}, {state}")
    with report.part():
        for key in ("reward_funcs", "judge_reward_funcs"):
            for spec in getattr(recipe, key):
                resolve_function(spec, key)
                report.say(f"{key}: {spec}")
    with report.part():
        inspect_inputs(recipe, context.stand_ins)
        inputs = prepare_inputs(with_stand_ins(recipe, context.stand_ins, report))
        if begun is not None:
            check_measured_rows(recipe, begun, inputs.report, AGAIN)
        report.say(f"model: {recipe.model_name_or_path}, {describe(inputs.tokenizer)}; all inputs fit together")
        several = len(inputs.rewards) > 1
        named = {f"reward model{f' {n}' * several}": model for n, model in enumerate(inputs.rewards, start=1)}
        named |= {"judge": inputs.judge} if inputs.judge is not None else {}
        for name, model in named.items():
            report.say(f"{name}: its head is {model.head.name}")
        bad = "".join(
            f"; {entry['count']} skipped: {reason}"
            for reports in (inputs.report["bad_rows"], inputs.report["skipped"])
            for reason, entry in reports.items()
        )
        count = len(inputs.prompts)
        report.say(f"rows: {count} prompts, {count * recipe.num_generations} responses{bad}")
        ids = inputs.prompts[0][1]
        shown = Text("  prompt: ", style="bold") + marked(inputs.tokenizer, ids, [False] * len(ids))
        report.console.print(shown, soft_wrap=True)
        longest = max(len(each) for _, each in inputs.prompts)
        note = f"  (the model answers here, {recipe.num_generations} times; prompts have at most {longest} tokens)"
        report.console.print(Text(note, style="dim"), soft_wrap=True)
