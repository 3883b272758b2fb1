"""Responses from vLLM servers: send them the weights of a model, sample, and recognise a server that fails.

The server is `vllm_server.py` beside this file. Rank 0 talks to it for all ranks. Each response has a seed of its own, so that it depends
on neither ranks nor restarts. Weights carry a version: responses of others are refused.
"""

from __future__ import annotations

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from align.data.collate import pad_right
from align.engine.distributed import World
from align.errors import UserError

Sampled = tuple[Tensor, Tensor, Tensor]  # see `VLLM.sample`


@dataclass(slots=True)
class Asked:
    """The responses to B prompts of all ranks, which rank 0 receives from the servers.

    Attributes:
        shape: B and the most tokens of a response.
        future: what rank 0 waits for; None on other ranks.
        rows: ids, mask and log-probabilities of that shape, once received; ids are 0 outside the mask.
    """

    world: World
    shape: tuple[int, int]
    future: Future[Sampled] | None = None
    rows: Sampled | None = None

    def receive(self) -> Sampled:
        """The rows, on every rank; all ranks call it together.

        Raises:
            UserError: on rank 0, see `VLLM.sample`.
        """
        if self.rows is None:
            device = self.world.device
            ids = torch.zeros(self.shape, dtype=torch.int64, device=device)
            mask = torch.zeros(self.shape, dtype=torch.bool, device=device)
            logprobs = torch.zeros(self.shape, device=device)
            if self.future is not None:
                found = self.future.result()
                for tensor, piece in zip((ids, mask, logprobs), found, strict=True):
                    tensor[:, : piece.shape[1]] = piece.to(device)
            self.rows = self.world.broadcast(ids), self.world.broadcast(mask), self.world.broadcast(logprobs)
        return self.rows


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
        self._background = ThreadPoolExecutor(1)
        self._sampling: Future[Sampled] | None = None
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
        """Load the weights of `engine`, adapters merged, into the servers, after what `start` began.

        Raises:
            UserError: a server failed.
        """
        if self._sampling is not None:
            wait([self._sampling])
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
    ) -> Sampled:
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

    def start(self, *arguments: Any) -> Future[Sampled]:
        """Begin to `sample` while rank 0 goes on; the result has its tensors, or its error."""
        self._sampling = self._background.submit(self.sample, *arguments)
        return self._sampling

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
