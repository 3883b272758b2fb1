"""Responses from vLLM servers: start one, send the weights of a model, sample, and recognise a server that fails.

The server is `vllm_server.py` beside this file. Rank 0 talks to it for all ranks. Each response has a seed of its own, so that it depends
on neither ranks nor restarts. Weights carry a version: responses of others are refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from align.config.ppo import PPORecipe
from align.data.collate import pad_right
from align.engine.distributed import World
from align.errors import UserError
from align.generation.vllm_server import TOKEN
from align.runs.own_files import delete, own

SERVER = Path(__file__).with_name("vllm_server.py")
SHARED_MEMORY = Path("/dev/shm")  # weights go through memory where there is such a folder
WEIGHTS = "vllm_weights"  # in the output folder, for servers on other machines
POLL = 0.2  # seconds between two looks at a server that starts
END = 20.0  # seconds that a server may take to end
LOG_LINES = 15  # of a failed server's output that are shown


class Saved(Protocol):
    """An engine whose weights can be written as a Hugging Face folder by all ranks together."""

    world: World

    def save_pretrained(self, folder: Path) -> None: ...


class VLLM:
    """The servers of a run. All methods are called by every rank; the servers are rank 0's.

    Args:
        urls: of the servers, which share the prompts.
        weights: gives the path of a new folder, which the servers read, inside a block.
        timeout: seconds that a request may take.
        diagnose: what a server that we started says about its end; empty if it runs.
    """

    def __init__(
        self,
        urls: Sequence[str],
        token: str,
        weights: Callable[[], contextlib.AbstractContextManager[Path]],
        timeout: float,
        diagnose: Callable[[], str],
    ):
        self.urls, self.weights, self.timeout = list(urls), weights, timeout
        self.version = 0
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._diagnose = diagnose

    def check(self, longest: int) -> None:
        """Check that the servers answer, and take sequences of `longest` tokens.

        Raises:
            UserError: one does not.
        """
        for url in self.urls:
            found = self._request(url, None)
            if found["max_model_len"] < longest:
                raise UserError(
                    f"{url}: was started with max_model_len {found['max_model_len']}, and prompts with their responses have up to "
                    f"{longest} tokens; start it with --max_model_len {longest}."
                )

    def send_weights(self, engine: Saved) -> None:
        """Load the weights of `engine`, adapters merged, into the servers.

        Raises:
            UserError: a server failed.
        """
        self.version += 1
        if not engine.world.is_main:
            engine.save_pretrained(Path())  # gathers its share; rank 0 writes
            return
        with self.weights() as folder:
            engine.save_pretrained(folder)
            self._all(lambda url: self._request(f"{url}/weights", self._named(folder=str(folder.absolute()))))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        temperature: float,
        max_tokens: int,
        stop_token_ids: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A response to each of B prompts of token ids, by rank 0.

        Returns:
            ids int64, mask bool and log-probabilities float32 [B, T], in nats, of the distribution that was sampled from.

        Raises:
            UserError: a server failed, or has other weights than were sent.
        """
        share = -(-len(prompts) // len(self.urls))
        parts = [slice(first, first + share) for first in range(0, len(prompts), share)]

        def generate(url: str, part: slice) -> dict[str, Any]:
            asked = {"prompts": [list(ids) for ids in prompts[part]], "seeds": list(seeds[part])}
            settings = {"temperature": temperature, "max_tokens": max_tokens, "stop_token_ids": list(stop_token_ids)}
            return self._request(f"{url}/generate", self._named(**asked, **settings))

        answers = self._all(generate, parts)
        ids = [row for answer in answers for row in answer["ids"]]
        logprobs = [row for answer in answers for row in answer["logprobs"]]
        padded, mask = pad_right(ids, 0)
        numbers = torch.zeros(mask.shape)
        numbers[mask] = torch.tensor([number for row in logprobs for number in row])
        return padded, mask, numbers

    def _named(self, **keys: Any) -> dict[str, Any]:
        return {**keys, "version": self.version}

    def _all(self, action: Callable[..., dict[str, Any]], *shares: Sequence[Any]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(len(self.urls)) as pool:
            return list(pool.map(action, self.urls, *shares))

    def _request(self, url: str, keys: dict[str, Any] | None) -> dict[str, Any]:
        content = None if keys is None else json.dumps(keys).encode()
        request = urllib.request.Request(url, content, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]
            raise UserError(f"{url}: the rollout server answered: {said}") from error
        except TimeoutError as error:
            raise UserError(
                f"{url}: the rollout server did not answer within {self.timeout:g} s (vllm_server_timeout); the same command "
                "continues from the last checkpoint."
            ) from error
        except (OSError, ValueError) as error:
            why = self._diagnose() or str(getattr(error, "reason", error))
            raise UserError(
                f"{url}: the rollout server is gone: {why}. The same command continues from the last checkpoint."
            ) from error
        if keys is not None and answer.get("version") != self.version:
            raise UserError(
                f"{url}: the rollout server has version {answer.get('version')} of the weights, and {self.version} was sent; a "
                "server belongs to one run."
            )
        return answer


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
            token, urls, diagnose = os.environ.get(TOKEN, ""), recipe.vllm_server_base_url, _nothing
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


@contextlib.contextmanager
def started(recipe: PPORecipe, folder: Path, token: str, longest: int) -> Iterator[Started]:
    """A server on this machine inside the block, started by `vllm_python`; it ends with this process in any case.

    Raises:
        UserError: it ends or does not answer within `vllm_server_timeout`.
    """
    python = os.path.expanduser(str(recipe.vllm_python))
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
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {TOKEN: token}
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a signal that ends this run after its step must not end the server before
            )
        except OSError as error:
            raise UserError(f"vllm_python: {python} cannot be started: {error.strerror or error}") from error
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
