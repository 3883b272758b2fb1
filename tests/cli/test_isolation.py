"""Files in the current folder do not take the place of Python's modules, or of installed ones, in the processes of a stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import align
from align.cli import processes

ROOT = Path(__file__).parents[2]


def modules(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(f"raise SystemError('{name} of the current folder')\n", encoding="utf-8")
    (folder / "wandb").mkdir()


def test_what_align_run_starts(tmp_path, monkeypatch, capfd):
    """Even of a name that Python imports before any line of this package; the launcher is started in the same way."""
    modules(tmp_path, "queue", "random", "torch", "typing", "contextlib", "align")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.path.relpath(ROOT, tmp_path))  # a relative one counts from here
    assert processes.run_process([sys.executable, "-m", "align", "sft", "gone.yaml"], {}) == 2
    assert capfd.readouterr().err == "error: gone.yaml: no such recipe\n"
    assert {path.name for path in processes.EMPTY.iterdir()} <= {"__init__.py", "__pycache__"}


def test_a_module_that_is_run_by_hand(tmp_path):
    modules(tmp_path, "queue", "random", "torch", "yaml", "rich")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in (["-m", "align", "sft", "gone.yaml"], ["-m", "align.ppo", "gone.yaml"]):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (2, "error: gone.yaml: no such recipe\n")


def test_a_package_that_only_the_current_folder_holds_is_found_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is processes.PathFinder])
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != ROOT and "editable" not in path]
    monkeypatch.setattr(sys, "path", [path for path in elsewhere if not (Path(path) / "align").is_dir()])
    assert processes.python_path() == str(ROOT)
    monkeypatch.setattr(align, "CURRENT_FOLDER", str(ROOT))
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    assert processes.python_path() == str(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])  # installed by a path of its own
    assert processes.python_path() == ""
    monkeypatch.setenv("PYTHONPATH", "lib")
    monkeypatch.chdir(tmp_path)
    assert processes.python_path() == str(tmp_path / "lib")
