"""Imports point one way only, from the command down to the formulas, and each side effect has one owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The folders from the top down. A file imports from its own folder and from those in lines below, never from one in the
# same line or above: no stage imports a stage.
FOLDERS = [
    {"align.__main__"},
    {"align.cli"},
    {"align.report"},
    {"align.sft", "align.reward", "align.ppo", "align.encoders", "align.best_of_n"},
    {"align.judge"},
    {"align.evaluate", "align.trainer"},
    {"align.generation", "align.runs"},
    {"align.engine"},
    {"align.models"},
    {"align.data"},
    {"align.config"},
    {"align.maths", "align.errors", "align.compat", "align.terminal", "reward_models"},
]
# `python -m align.STAGE` starts the launcher of all stages, which lies below them.
OWNERS = {
    "deepspeed": {
        "align.compat.deepspeed",
        "align.engine.deepspeed_engine",
        "align.engine.distributed",
        "align.engine.sharding",
    },
    "wandb": {"align.runs.wandb_run"},
    "evaluate": {"align.evaluate.metrics", "align.evaluate.text_metrics"},
    "sacrebleu": {"align.evaluate.text_metrics"},
    "rouge_score": {"align.evaluate.text_metrics"},
    "sklearn": {"align.evaluate.text_metrics", "align.judge.baselines", "align.judge.length"},
}
HEAVY = {"torch", "transformers", "trl", "datasets", "evaluate", "wandb", "deepspeed", "accelerate", "peft"}
LIGHT = (
    "align.config",
    "align.errors",
    "align.compat",
    "align.runs.manifest",
    "align.runs.checkpoint",
    "align.runs.files",
)
STANDARD = {*sys.stdlib_module_names, "__future__"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted([*ROOT.glob("align/**/*.py"), *ROOT.glob("reward_models/**/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST, inside_functions: bool = True) -> set[str]:
    """Dotted names that a module imports when imported or run, and those for type checking alone.

    `from package import name` counts as `package.name` when that is one of our modules.
    """
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else str(node.module))
        elif inside_functions or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_typing_block(node)
        ):
            names |= imports(node, inside_functions)
    return names


def ours(name: str) -> set[str]:
    return {imported for imported in imports(MODULES[name]) if imported.split(".")[0] in ("align", "reward_models")}


def folder(name: str) -> str:
    """The entry of `FOLDERS` that a module belongs to."""
    (found,) = (f for line in FOLDERS for f in line if name == f or name.startswith(f"{f}."))
    return found


def depth(name: str) -> int:
    """The line of `FOLDERS` that a module belongs to."""
    return next(number for number, line in enumerate(FOLDERS) if folder(name) in line)


def test_the_walk_sees_imports():
    tree = ast.parse(
        "import a.b\nfrom c import d\nfrom align.config import keys\ndef f():\n    import g\n"
        "if TYPE_CHECKING:\n    import h\nif __name__ == '__main__':\n    import i\n"
    )
    assert imports(tree) == {"a.b", "c", "align.config.keys", "g", "h", "i"}
    assert imports(tree, inside_functions=False) == {"a.b", "c", "align.config.keys", "i"}
    assert set.union(*OWNERS.values()) <= set(MODULES)


def test_every_file_lies_in_a_folder_of_the_list():
    folders = set.union(*FOLDERS)
    assert {folder(name) for name in MODULES if name != "align"} == folders


@pytest.mark.parametrize("name", [name for name in MODULES if name != "align"])
def test_no_file_imports_upwards_or_sideways(name):
    wrong = [i for i in ours(name) if i != "align" and folder(i) != folder(name) and depth(i) <= depth(name)]
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_there_is_no_circle():
    """Following imports down from any module never leads back to it."""
    done: set[str] = set()

    def follow(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for imported in ours(name) & set(MODULES):
                follow(imported, (*trail, name))
            done.add(name)

    for name in MODULES:
        follow(name, ())


@pytest.mark.parametrize("library", OWNERS)
def test_few_files_own_each_side_effect(library):
    importers = {name for name, tree in MODULES.items() if library in {i.split(".")[0] for i in imports(tree)}}
    assert importers == OWNERS[library]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("align.maths")])
def test_maths_needs_torch_only(name):
    foreign = {i for i in imports(MODULES[name]) if i.split(".")[0] not in STANDARD | {"torch"}}
    assert {i for i in foreign if not i.startswith("align.maths")} == set()


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("reward_models")])
def test_reward_models_need_torch_and_transformers_only(name):
    allowed = STANDARD | {"torch", "transformers", "safetensors", "reward_models"}
    assert {i for i in imports(MODULES[name]) if i.split(".")[0] not in allowed} == set()


def test_the_command_starts_without_heavy_libraries():
    code = "import sys, align.__main__; from align import sft, reward, ppo, encoders, evaluate; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "align" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(LIGHT)])
def test_checkpoints_and_recipes_are_light_too(name):
    assert not {i.split(".")[0] for i in imports(MODULES[name], inside_functions=False)} & HEAVY
