"""The `align` command: parse the command line, hand over to a stage or to a command of `align.cli`."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from align.cli.merge_folders import adapter_folder, reward_manifests
from align.cli.run import run as run_folder
from align.config.paths import expand, expand_output
from align.config.stages import STAGES
from align.errors import UserError, nearest
from align.runs.command_line import CommandParser, exit_code, stage_arguments
from align.runs.launch import command_arguments, import_frozen, run_stage
from align.runs.launchers import adopt_ranks
from align.runs.quiet import quiet
from align.terminal import printable, say

EPILOG = """\
`align COMMAND --help` explains a command, and lists the keys of a stage.
A stage also runs under the launcher: deepspeed --num_gpus N --module align.ppo RECIPE [--key value ...]
The same command continues a run that was interrupted."""
ALIASES = ("--num-gpus", "--num_accelerators", "--num-accelerators")  # of --num_gpus
KEYS = (
    "--key value sets a recipe key, here for each recipe that has it; `align STAGE --help` lists the keys of a stage."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for an error that the user can fix, 130 when interrupted, and
    that of `align diagnose`."""
    words = command_arguments(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _run(words))


def _run(words: list[str]) -> int:
    parser, commands = make_parser()
    if words[:1] == ["help"]:
        words = ["--help"]
    known = [*commands, "--version", "--help"]
    if not words or words[0] not in [*known, "-h"]:
        problem = f"unknown command {words[0]!r}{nearest(words[0], known)}" if words else "no command given"
        print(f"error: {printable(problem, one_line=True)}\n{parser.format_usage()}see: align --help", file=sys.stderr)
        return 2
    arguments, overrides = parser.parse_known_args(words)
    if words[0] not in STAGES:
        adopt_ranks()
        if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UserError(
                f"align {words[0]}: was started as {ranks} ranks; start it once, or start a stage as ranks."
            )
    return int(arguments.run(arguments, overrides))


def make_parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, which has a subparser for each command, and the names of the commands."""
    parser = CommandParser(
        prog="align", usage="align COMMAND ...", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"align {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", prog="align", parser_class=CommandParser)
    for stage in STAGES.values():
        about = " ".join(str(stage.recipe.__doc__).split("\n\n")[0].split())
        each = commands.add_parser(
            stage.name, help=(about.partition(": ")[2] or about).rstrip("."), **stage_arguments(stage)
        )
        each.set_defaults(run=functools.partial(_stage, stage.name))
    run = commands.add_parser(
        "run",
        help="run a folder's numbered recipes in order",
        usage="align run DIR [--num_gpus N | --hostfile FILE] [--key value ...]",
        description=f"Run a folder's numbered recipes in order; skip finished ones, resume interrupted ones. {KEYS}",
        no_path="expected a folder of numbered recipes first, as in `align run recipes/quickstart`.",
    )
    run.add_argument(
        "--hostfile", metavar="FILE", help="nodes for each stage, in lines of `HOST slots=GPUS`, reached by pdsh"
    )
    run.set_defaults(run=_run_folder)
    check = commands.add_parser(
        "check",
        help="say whether a recipe or a folder of them would run, and in how much memory",
        usage="align check RECIPE|DIR [--num_gpus N] [--key value ...]",
        description=f"Check keys, rows, tokens and models without loading weights, and estimate the memory. {KEYS}",
        no_path="expected a recipe or a folder of them first, as in `align check recipes/quickstart`.",
    )
    check.set_defaults(run=_check)
    merge = commands.add_parser(
        "merge",
        help="merge an adapter into the model that it was trained on, or average reward models",
        usage="align merge ADAPTER OUTPUT\n       align merge REWARD_MODEL REWARD_MODEL ... --output FOLDER",
        description="Merge an adapter into the model that it was trained on, and save that as a plain model; or, with --output, save "
        "the mean of the weights of reward models that started from the same model, head included (WARM, arXiv 2401.12187).",
    )
    merge.add_argument("folders", nargs="*", help=argparse.SUPPRESS)
    merge.add_argument("--output", metavar="FOLDER", help="a new folder, for the mean of several reward models")
    merge.set_defaults(run=_merge)
    predict = commands.add_parser(
        "predict",
        help="write a trained model's spans, answers or labels for the rows of a file",
        usage="align predict MODEL ROWS OUTPUT [--columns OURS=THEIRS ...]",
        description="Write each row of the file ROWS with what a model of the stages token-classification, question-answering or "
        "classify predicts for it, as JSON lines. Rows have text or tokens, question and context, or text and text_pair.",
    )
    predict.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    predict.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="names of the file's columns")
    predict.set_defaults(run=_predict)
    verify = commands.add_parser(
        "verify",
        help="train PPO on languages with a known optimum, and compare; or try architectures, or your model",
        usage="align verify [--num_gpus N] [--episodes [N ...]] [--architectures [TYPE ...]] [--model FOLDER] "
        "[--json [FILE]] [--key value ...]",
        description="Train PPO on languages small enough to compute the optimal policy, and compare with it. With --episodes: "
        "every objective, and RLOO, on a larger one, by the number of responses that they sample. With "
        "--architectures or --model: compare log-probabilities, scores and values with plain transformers', packed rows "
        "with single ones, and run two steps of sft, reward and ppo. --key value sets a key of the recipes.",
    )
    verify.add_argument(
        "--architectures", nargs="*", metavar="TYPE", help="small random models of these types, or of all known ones"
    )
    verify.add_argument(
        "--episodes", nargs="*", metavar="N", help="a curve over these numbers of episodes, by default 2560 and 5120"
    )
    verify.add_argument("--model", metavar="FOLDER", help="the model in this folder")
    verify.add_argument("--json", nargs="?", const="-", metavar="FILE", help="print JSON, or write it to a file")
    verify.set_defaults(run=_verify)
    report = commands.add_parser(
        "report",
        help="write one HTML file that shows what runs did",
        usage="align report DIR [DIR ...] [--output FILE]",
        description="Write one HTML file: recipes, curves, frontier, samples, warnings, costs. A DIR is a run's output folder, a "
        "folder of those, or a folder of numbered recipes that have been run, finished or not; several are drawn over each other.",
        no_path="expected a folder first, as in `align report outputs/quickstart`.",
    )
    report.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    report.add_argument("--output", metavar="FILE", help="the file; by default report.html in DIR")
    report.set_defaults(run=_report)
    diagnose = commands.add_parser(
        "diagnose",
        help="name what is wrong with a run by its metrics",
        usage="align diagnose RUN",
        description="Name what is wrong with a finished or dead run, with the numbers that show it and what to do. RUN is an output "
        "folder, or a folder of those. Exit code: 0 if nothing was found, 3 for warnings, 4 for severe faults.",
        no_path="expected a run's output folder first, as in `align diagnose outputs/quickstart/3_ppo`.",
    )
    diagnose.set_defaults(run=_diagnose)
    for each in (run, check, verify):
        each.add_argument("--num_gpus", nargs="?", const="", metavar="N", help="number of processes, one per GPU")
        each.add_argument(
            *ALIASES, nargs="?", const="", dest="num_gpus", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser, list(commands.choices)


def _stage(stage: str, arguments: argparse.Namespace, overrides: list[str]) -> int:
    return run_stage(stage, arguments.path, overrides)


def _run_folder(arguments: argparse.Namespace, overrides: list[str]) -> int:
    return run_folder(arguments.path, _num_gpus(arguments), overrides, arguments.hostfile)


def _check(arguments: argparse.Namespace, overrides: list[str]) -> int:
    check = import_frozen("align.cli.check.check")
    return int(check.run(arguments.path, _num_gpus(arguments), overrides))


def _merge(arguments: argparse.Namespace, others: list[str]) -> int:
    if arguments.output is not None and not others:
        folders = [expand(each, "align merge") for each in arguments.folders]
        reward_manifests(
            folders, expand_output(arguments.output, "--output")
        )  # mistakes are told before torch is imported
        say(str(import_frozen("align.cli.merge_rewards").run(arguments.folders, arguments.output)), sys.stdout)
        return 0
    if len(arguments.folders) != 2 or others:
        raise UserError(
            "align merge: expected an adapter's folder and a new folder, as in `align merge out/adapter merged`."
        )
    adapter, output = arguments.folders
    adapter_folder(expand(adapter, "align merge"), expand_output(output, "align merge"))
    say(str(import_frozen("align.cli.merge").run(*arguments.folders)), sys.stdout)
    return 0


def _predict(arguments: argparse.Namespace, others: list[str]) -> int:
    _take_all("predict", others)
    if len(arguments.paths) != 3:
        raise UserError(
            "align predict: expected a model, a file of rows and a new file, as in `align predict out/tagger rows.jsonl "
            "predicted.jsonl`."
        )
    say(str(import_frozen("align.cli.predict").run(*arguments.paths, arguments.columns)), sys.stdout)
    return 0


def _verify(arguments: argparse.Namespace, overrides: list[str]) -> int:
    num_gpus = _num_gpus(arguments)
    quiet()
    if arguments.architectures is not None or arguments.model is not None:
        if arguments.episodes is not None:
            raise UserError("--episodes: expected no --architectures and no --model beside it; leave one out.")
        if num_gpus is not None:
            raise UserError("--num_gpus: --architectures and --model take no number of processes; leave it out.")
        matrix = import_frozen("align.cli.architectures.command")
        return int(matrix.run(arguments.architectures, arguments.model, arguments.json, overrides))
    if arguments.episodes is not None:
        if wrong := [word for word in arguments.episodes if not word.isdecimal()]:
            raise UserError(f"--episodes: expected whole numbers, got {wrong[0]}")
        curve = import_frozen("align.cli.verify_episodes")
        return int(curve.run([int(word) for word in arguments.episodes], num_gpus, arguments.json, overrides))
    return int(import_frozen("align.cli.verify").run(num_gpus, arguments.json, overrides))


def _report(arguments: argparse.Namespace, others: list[str]) -> int:
    _take_all("report", others)
    return int(import_frozen("align.cli.report").run([arguments.path, *arguments.more], arguments.output))


def _diagnose(arguments: argparse.Namespace, others: list[str]) -> int:
    _take_all("diagnose", others)
    return int(import_frozen("align.cli.diagnose").run(arguments.path))


def _take_all(command: str, others: list[str]) -> None:
    if others:
        raise UserError(f"align {command}: unexpected argument {others[0]}; see `align {command} --help`.")


def _num_gpus(arguments: argparse.Namespace) -> int | None:
    found: str | None = arguments.num_gpus
    if found is None:
        return None
    if not (found.isascii() and found.isdigit()) or not 1 <= int(found[:9]) < 10**6:
        raise UserError(f"--num_gpus: expected a number of processes from 1, got {found or 'nothing'}")
    return int(found)


def _version() -> str:
    try:
        return importlib.metadata.version("align")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
