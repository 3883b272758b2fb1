"""The functions that recipes name as `module:function`, whose modules may be files beside a recipe."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from align.errors import UserError, nearest

_recipe_folders: list[str] = []  # those that recipes have added to `sys.path` so far, the newest first


def make_importable(folder: Path, modules: Iterable[str]) -> None:
    """Let `module:function` name a file in a recipe's folder, which is searched before those of earlier recipes.

    Modules imported from an earlier recipe's folder are dropped from `sys.modules` if this folder has a file of their name,
    so that each recipe of a program gets its own functions.
    """
    if str(folder) in _recipe_folders or str(folder) not in sys.path:
        _recipe_folders[:] = [str(folder), *(path for path in _recipe_folders if path != str(folder))]
        searched = [str(folder), *(path for path in _recipe_folders[1:] if path in sys.path)]
        sys.path[:] = [*(path for path in sys.path if path not in _recipe_folders), *searched]
    for name in modules:
        file = getattr(sys.modules.get(name), "__file__", None)
        here = (folder / f"{name}.py").is_file() or (folder / name).is_dir()
        if file and here and str(Path(file).resolve().parent) in (str(folder), *_recipe_folders):
            for imported in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
                del sys.modules[imported]
            importlib.invalidate_caches()


def resolve_function(spec: str, key: str) -> Callable[..., Any]:
    """The function that `module:function` names; the module is installed or is a file beside the recipe.

    Raises:
        UserError: begins with `key`; no such module, an error inside it, no such function.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UserError(f"{key}: expected `module:function`, got {spec!r}")
    _check_not_hidden(module_name.partition(".")[0], key)
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's module raises, `sys.exit` too, is theirs to fix
        if isinstance(error, ModuleNotFoundError) and error.name and module_name.startswith(error.name):
            raise UserError(f"{key}: no module {module_name!r}; put {module_name}.py beside the recipe.") from error
        raise UserError(f"{key}: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [name for name, value in vars(module).items() if callable(value)]
        problem = "no function" if function is None else "not a function:"
        raise UserError(f"{key}: {problem} {function_name!r} in {module.__file__}{nearest(function_name, callables)}")
    return function  # type: ignore[no-any-return]  # callable() has just checked it


def _check_not_hidden(name: str, key: str) -> None:
    """Refuse a module beside the newest recipe that Python would not import, because it finds another one of this name."""
    files = [
        file
        for folder in _recipe_folders[:1]
        for file in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py"))
    ]
    beside = [file for file in files if file.is_file()]
    if not beside:
        return
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that was made by hand
        return
    found = Path(spec.origin) if spec is not None and spec.origin else None
    if found is not None and not any(found.exists() and found.samefile(file) for file in beside):
        raise UserError(
            f"{key}: {name} is also the name of a module that Python finds before {beside[0]}: {found}. Rename the file "
            "beside the recipe."
        )
