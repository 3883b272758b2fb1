"""Imports point one way only: __main__ -> stages -> their rooms -> recipes and config; maths and reward_models stand alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"align.sft", "align.reward", "align.ppo", "align.classify", "align.mlm", "align.evaluate"}
# Layers from the top. A module imports from layers below its own, and from its own layer apart from stages.
ENTRY = {"align.__main__", "align.check", "align.merge", "align.pipeline", "align.verify"}
BASE = [
    "align.recipes",
    "align.limits",
    "align.retention_limits",
    "align.templates",
    "align.rows",
    "align.foreign_keys",
    "align.strict",
    "align.config",
]
OWNERS = {
    "deepspeed": {"align.engine"},
    "wandb": {"align.tracking"},
    "evaluate": {"align.evaluation", "align.text_metrics"},
    "sacrebleu": {"align.text_metrics"},
    "rouge_score": {"align.text_metrics"},
}
HEAVY = {"torch", "transformers", "trl", "datasets", "evaluate", "wandb", "deepspeed", "accelerate", "peft"}
STANDARD = {*sys.stdlib_module_names, "__future__"}


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted([*ROOT.glob("align/**/*.py"), *ROOT.glob("reward_models/**/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_typing_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(tree: ast.AST, inside_functions: bool = True) -> set[str]:
    """Dotted names that a module imports when imported or run, its `if __name__ == "__main__"` block apart.

    `from package import name` counts as `package.name` when that is one of our modules.
    """
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if is_main_block(node) or is_typing_block(node):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in MODULES else str(node.module))
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names |= imports(node, inside_functions)
    return names


def ours(name: str) -> set[str]:
    return {imported for imported in imports(MODULES[name]) if imported.split(".")[0] in ("align", "reward_models")}


def test_the_walk_sees_imports():
    tree = ast.parse(
        "import a.b\nfrom c import d\nfrom align import config\ndef f():\n    import g\n"
        "if TYPE_CHECKING:\n    import h\nif __name__ == '__main__':\n    import i\n"
    )
    assert imports(tree) == {"a.b", "c", "align.config", "g"}
    assert imports(tree, inside_functions=False) == {"a.b", "c", "align.config"}
    assert {*STAGES, *ENTRY, *BASE}.union(*OWNERS.values()) <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_upwards(name):
    if name in ENTRY:
        return
    assert not ours(name) & ENTRY
    if name not in STAGES:
        assert not ours(name) & STAGES
    if name in BASE:
        below = BASE[BASE.index(name) + 1 :]
        assert ours(name) <= set(below)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_no_stage_imports_a_stage(name):
    assert not ours(name) & STAGES


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
    allowed = STANDARD | {"torch", "transformers", "reward_models"}
    assert {i for i in imports(MODULES[name]) if i.split(".")[0] not in allowed} == set()


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_hands_its_command_line_to_main(name):
    (block,) = [node for node in MODULES[name].body if is_main_block(node)]
    assert ast.unparse(block).splitlines()[1:] == [
        "    from align.__main__ import run_stage_cli",
        f"    run_stage_cli('{name.removeprefix('align.')}')",
    ]


def test_the_command_starts_without_heavy_libraries():
    code = "import sys, align, align.config, align.recipes, align.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "align" in loaded
    assert not loaded & HEAVY


def test_checkpoints_and_recipes_are_light_too():
    for name in ("align.checkpoint", "align.pipeline", *BASE):
        assert not {i.split(".")[0] for i in imports(MODULES[name], inside_functions=False)} & HEAVY
