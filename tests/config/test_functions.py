"""`module:function` of a recipe: which module it names, and what its import may not do."""

from __future__ import annotations

import sys

import pytest

from align.config import functions
from align.config.functions import resolve_function
from align.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(functions, "_recipe_folders", [])
    functions.make_importable(tmp_path, [])
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["queue", "yaml", "math", "jinja2"])
def test_a_file_with_the_name_of_an_installed_module(folder, name):
    (folder / f"{name}.py").write_text("def reward(**kwargs): ...\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=f"^reward_funcs: {name} is also the name of a module that Python finds before .*{name}.py"
    ):
        resolve_function(f"{name}:reward", "reward_funcs")
    assert callable(resolve_function("json:dumps", "reward_funcs"))  # another name is not meant


def test_modules_beside_the_recipe(folder):
    (folder / "own_rewards.py").write_text("def reward(**kwargs): ...\n", encoding="utf-8")
    (folder / "own_package").mkdir()
    (folder / "own_package" / "__init__.py").touch()
    (folder / "own_package" / "rewards.py").write_text("def reward(**kwargs): ...\n", encoding="utf-8")
    for spec in ("own_rewards:reward", "own_package.rewards:reward"):
        assert callable(resolve_function(spec, "reward_funcs"))


@pytest.mark.parametrize("ends", ["raise SystemExit(0)", "raise GeneratorExit", "import sys; sys.exit('bye')", "1 / 0"])
def test_an_import_that_ends_the_program(folder, ends):
    (folder / "own_ending.py").write_text(ends, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"^grader: importing 'own_ending' failed: (SystemExit|GeneratorExit|ZeroDivisionError)"
    ):
        resolve_function("own_ending:grade", "grader")
