"""Run stages in processes of their own, alone or as the ranks of a launch, without importing the libraries each time.

Importing torch, transformers, TRL and DeepSpeed takes seven seconds of CPU time, and the `deepspeed` launcher adds two
processes of its own that do so. The processes here are forks of one that has imported these libraries and then `align`, and
get the environment that the launcher sets. Those of another folder than this one forget our modules first, and import that
folder's. Python's hash seed is the one thing that ranks share here and not under the launcher, so that one test of each stage
goes through the launcher: the quickstart at ZeRO 3 (sft, reward, ppo), and those that call `launch` or `launched`.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import pty
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATHS = [path for path in sys.path if path not in ("", str(ROOT))]  # without the folders of recipes that a test adds
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Ranks:
    """Processes that were started together. Each writes its output to `{name}{rank}.out` and `.err`."""

    def __init__(self, processes: Sequence[BaseProcess], log: Path) -> None:
        self.processes = processes
        self._log = log

    @property
    def stdout(self) -> str:
        """Of all ranks so far, one after another."""
        return self._written("out")

    @property
    def stderr(self) -> str:
        return self._written("err")

    def _written(self, kind: str) -> str:
        paths = [_output(self._log, rank, kind) for rank in range(len(self.processes))]
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def running(self) -> bool:
        """Whether every rank is."""
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = 300) -> list[int | None]:
        """Exit codes of ranks that end by themselves; those still there after `seconds` are killed, and have None."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self._kill()
        return codes

    def wait_as_launcher(self, seconds: float) -> int:
        """The first exit code that is not 0, upon which the other ranks are killed, or 0."""
        deadline = time.monotonic() + seconds
        while left := [process.sentinel for process in self.processes if process.exitcode is None]:
            wait(left, max(0.0, deadline - time.monotonic()))
            failed = [process.exitcode for process in self.processes if process.exitcode]
            if failed or time.monotonic() > deadline:
                self._kill()
                assert failed, f"not done after {seconds} seconds:\n{self.stdout[-1000:]}{self.stderr[-3000:]}"
                return int(failed[0] or 0)
        return 0

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to all ranks, none of which has ended or goes on to end well."""
        for process in self.processes:
            assert process.pid is not None
            assert process.is_alive(), f"it ended before it could be stopped:\n{self.stderr[-3000:]}"
            os.kill(process.pid, how)
        for process in self.processes:
            process.join()
            assert process.exitcode != 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds, while all ranks are running."""
        while not condition():
            assert self.running(), f"it ended before it could be stopped:\n{self.stderr[-3000:]}"
            time.sleep(0.002)

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def start(
    function: Callable[..., Any], *args: Any, ranks: int = 1, log: Path, root: Path = ROOT, cwd: Path | None = None,
    env: Mapping[str, str] = {}, without: Sequence[str] = (),
) -> Ranks:  # fmt: skip
    """Call `function(*args)` in each of `ranks` forked processes; what it returns is the exit code (None is 0).

    Args:
        log: start of the path of the files that their output goes to.
        root: the folder whose `align`, `reward_models` and `tests` they import; `function` too is looked up there.
        env: more environment variables.
        without: names of variables of ours that they do not get.
    """
    given = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER_VARIABLES, *without)}
    places = [{}] if ranks == 1 else [_launched(rank, ranks, port) for port in [free_port()] for rank in range(ranks)]
    call = pickle.dumps((function, args))
    paths, sys.path = sys.path, [str(root), *PATHS]
    try:
        processes = []
        for rank, place in enumerate(places):
            arguments = (str(root), call, {**given, **place, **env}, str(cwd or Path.cwd()), str(log), rank)
            processes.append(server().Process(target=_rank, args=arguments))
            processes[-1].start()  # with `sys.path` as it is now
    finally:
        sys.path = paths
    return Ranks(processes, log)


def start_stage(stage: str, recipe: str | Path, *overrides: str, ranks: int = 1, **settings: Any) -> Ranks:
    """`python -m align.STAGE RECIPE OVERRIDES`, which goes on in the background, alone or as ranks of a launch."""
    settings.setdefault("log", Path(recipe).with_name("rank"))
    return start(_stage, stage, [str(Path(recipe).absolute()), *overrides], ranks=ranks, **settings)


def run(
    function: Callable[..., Any], *args: Any, ranks: int = 2, timeout: float = 300, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """`start`, and wait. The output is that of all ranks, one after another; the code the first that is not 0."""
    return _finished(start(function, *args, ranks=ranks, **settings), timeout)


def run_stage(
    stage: str, recipe: str | Path, *overrides: str, ranks: int = 2, timeout: float = 300, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """A stage as the `deepspeed` launcher runs it, or alone with one rank."""
    return _finished(start_stage(stage, recipe, *overrides, ranks=ranks, **settings), timeout)


def _finished(started: Ranks, timeout: float) -> subprocess.CompletedProcess[str]:
    code = started.wait_as_launcher(timeout)
    return subprocess.CompletedProcess([], code, started.stdout, started.stderr)


def python(*words: str) -> None:
    """What `python WORDS` does, for `start` and `run`: a module after `-m`, or a script."""
    sys.argv = [word for word in words if word != "-m"]
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def execute(code: str, *arguments: str) -> None:
    """What `python -c CODE ARGUMENTS` does, for `start` and `run`."""
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def execute_on_terminal(shown: str, code: str, *arguments: str) -> int:
    """`execute` in a fork with stdin and stderr on a terminal of 120 columns, whose text goes to the file `shown`; its exit code."""
    stdout = os.dup(1)
    child, terminal = pty.fork()
    if not child:
        os.dup2(stdout, 1)
        os.environ.update(TERM="xterm", COLUMNS="120")
        try:
            execute(code, *arguments)
        except BaseException as error:
            traceback.print_exc()
            os._exit(1 if not isinstance(error, SystemExit) else int(error.code or 0))
        sys.stdout.flush()
        os._exit(0)
    with open(shown, "wb") as file, contextlib.suppress(OSError):  # Linux's word for the end of a terminal
        while piece := os.read(terminal, 65536):
            file.write(piece)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stop_after_checkpoint(
    stage: str, recipe: str | Path, output: Path, how: signal.Signals = signal.SIGKILL, **settings: Any
) -> None:
    """Start a stage alone, and send it a signal as soon as it has written its next checkpoint."""
    from align.runs.checkpoint import complete_checkpoints

    seen = complete_checkpoints(output)
    started = start_stage(stage, recipe, **settings)
    started.wait_for(lambda: complete_checkpoints(output) != seen)
    started.stop(how)


def run_recipes(folder: str | Path, ranks: int, overrides: Sequence[str] = (), **settings: Any) -> None:
    """`align run FOLDER --num_gpus RANKS`, each stage as forked ranks."""
    from align.cli.steps import read_steps

    for step in read_steps(str(folder), ranks, overrides):
        log = Path(step.recipe.output_dir).absolute()
        log.parent.mkdir(parents=True, exist_ok=True)
        done = run_stage(step.stage, step.path, *step.overrides, ranks=step.processes, log=log, **settings)
        assert done.returncode == 0, done.stderr[-3000:]


def launch(
    *command: str, ranks: int = 2, module: bool = True, cwd: Path | None = None, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run a module (or a script) under the real `deepspeed` launcher on CPU."""
    return subprocess.run(
        **launched(*command, ranks=ranks, module=module),
        capture_output=True, text=True, cwd=cwd, timeout=timeout, check=False,
    )  # fmt: skip


def launched(*command: str, ranks: int = 2, module: bool = True) -> dict[str, Any]:
    """`args` and `env`, for subprocess, of a module (or a script) under the real `deepspeed` launcher on CPU."""
    launcher = Path(sys.executable).with_name("deepspeed")
    words = [sys.executable, str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    words += ["--module"] if module else []
    return {"args": [*words, *command], "env": {**os.environ, "PYTHONPATH": str(ROOT)}}


def torchrun_on_two_nodes(module: str, *command: str, cwd: Path) -> None:
    """Run a module under two launchers that find each other, as on two nodes of one process each; both must succeed."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    words += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--node_rank"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(
            [*words, str(node), "-m", module, *command], cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True
        )
        for node in (0, 1)
    ]
    errors = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors


# In place of ssh and of pdsh: both run what they are given on this machine, pdsh once for each of the nodes.
SSH = """#!/bin/sh
echo 127.0.0.1
"""
PDSH = """#!/bin/sh
while [ "$1" != -w ]; do shift; done
nodes=$(echo "$2" | tr , ' '); shift 2
index=0
for node in $nodes; do
    sh -c "$(echo "$*" | sed "s/%n/$index/g")" &
    index=$((index + 1)); processes="$processes $!"
done
code=0
for process in $processes; do wait $process || code=$?; done
exit $code
"""


def two_nodes(folder: Path) -> tuple[Path, dict[str, str]]:
    """A hostfile of two nodes with a GPU each, which are this machine, and the environment in which launchers reach them."""
    (folder / "hosts").write_text("# two nodes\nnode1 slots=1\n\nnode2 slots=1\n")
    for name, script in (("ssh", SSH), ("pdsh", PDSH)):
        (folder / "bin" / name).parent.mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    return folder / "hosts", {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@functools.cache
def server() -> ForkServerContext:
    """A context whose processes are forks of one that has imported the libraries, and `align`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["libraries"])  # in a folder of its own, without the tests
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent / "preload")
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path
    return context


def _launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    return dict(zip(LAUNCHER_VARIABLES, map(str, (rank, rank, ranks, "127.0.0.1", port)), strict=True))


def _output(log: Path, rank: int, kind: str) -> Path:
    return log.with_name(f"{log.name}{rank}.{kind}")


def _rank(root: str, call: bytes, environment: dict[str, str], cwd: str, log: str, rank: int) -> None:
    """One forked process, which calls the pickled function in `call` with the arguments there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born ignoring it
    for descriptor, kind in ((1, "out"), (2, "err")):
        file = os.open(_output(Path(log), rank, kind), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if Path(str(sys.modules["align"].__file__)).parents[1] != Path(root):
        for name in [name for name in sys.modules if name.partition(".")[0] in ("align", "reward_models", "tests")]:
            del sys.modules[name]
    import numpy
    import torch

    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(os.getpid())  # generators differ between processes, as if each had been started anew
    function, args = pickle.loads(call)
    sys.exit(function(*args))


def _stage(stage: str, words: list[str]) -> None:
    """`python -m align.STAGE`, as started by the launcher where there are ranks."""
    from align.runs.launch import run_stage_cli

    rank = [f"--local_rank={os.environ['LOCAL_RANK']}"] if "LOCAL_RANK" in os.environ else []
    run_stage_cli(stage, [*rank, *words])
