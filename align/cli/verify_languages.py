"""Languages small enough to enumerate every response, and so to compute the exact optimum of what PPO maximizes.

J(pi) = E_pi[score] - beta KL(pi || ref) is greatest at pi*(y) = ref(y) exp(score(y) / beta) / Z, where it is
beta log Z, and every other policy misses that by beta KL(pi || pi*) (arXiv 1909.08593). A probability here is that
of a whole response to a prompt, end-of-text included, in nats and float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.models.forward import response_logprobs

END = "<end>"  # opens a prompt and closes a response, as in GPT-2: without an opening, "a" and "aa" look alike

# The reward functions: written beside the recipes as a file, as a user's would be.
REWARDS = '''"""Scores of responses as token ids: a is 0, b is 1, ...; the id after the last letter's is end-of-text."""

import functools
import random


def letters(prompts, completion_ids, **columns):
    """A point for each a, half a point off for each b; 0.3 for an end, one off without it."""
    return [ids.count(0) - 0.5 * ids.count(1) + (0.3 if ids[-1] == 3 else -1.0) for ids in completion_ids]


def echo(prompts, completion_ids, **columns):
    """Two points for each time the prompt's last letter comes, half a point off for each letter that comes twice in
    a row; 0.5 for an end, 0.5 off without it."""
    scores = []
    for prompt, ids in zip(prompts, completion_ids):
        twice = sum(former == latter for former, latter in zip(ids, ids[1:]))
        end = 0.5 if ids[-1] == 10 else -0.5
        scores.append(2.0 * ids.count("abcdefghij".index(prompt[-1])) - 0.5 * twice + end)
    return scores


@functools.cache
def normal(*key):
    """A number of the standard normal distribution, the same for the same key."""
    return random.Random(str(key)).gauss(0, 1)


def arbitrary(prompts, completion_ids, **columns):
    """The sum of arbitrary numbers: 0.3 times one for each token at its place, and for each two in a row, and 0.22 times
    one for the whole response, which no part of it tells."""
    scores = []
    for prompt, ids in zip(prompts, completion_ids):
        parts = sum(normal(prompt, place, token) for place, token in enumerate(ids))
        pairs = sum(normal(prompt, former, latter, "pair") for former, latter in zip(ids, ids[1:]))
        scores.append(0.3 * (parts + pairs) + 0.22 * normal(prompt, *ids, "whole"))
    return scores
'''


@dataclass(frozen=True, slots=True)
class Language:
    """Prompts, and all responses of at most `length` tokens over some letters; token `len(letters)` is end-of-text."""

    name: str
    letters: str
    length: int
    prompts: tuple[str, ...]
    reward: str  # a function in REWARDS
    spread: float  # standard deviation of the reference's random weights
    table: bool = False  # whether the reference's head is set so that its logits are those of `sine_table`
    heads: int = 4  # of the reference's attention
    key_value_heads: int = 2
    seed: int = 0  # of the reference's random weights

    def responses(self) -> list[tuple[int, ...]]:
        """Every response: ended by end-of-text, or of full length without it."""
        letters = range(len(self.letters))
        ended = [(*body, len(letters)) for n in range(self.length) for body in itertools.product(letters, repeat=n)]
        return ended + list(itertools.product(letters, repeat=self.length))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per letter; END is beginning, end and padding at once."""
        vocabulary = {token: index for index, token in enumerate([*self.letters, END])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END} $A", special_tokens=[(END, vocabulary[END])]
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)

    def reference(self) -> LlamaForCausalLM:
        """A small transformer with random weights, the same at every call; with `table`, its head is solved for."""
        end = len(self.letters)
        config = LlamaConfig(
            vocab_size=end + 1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=32,
            initializer_range=self.spread,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(config)
            model.eval()
        if self.table:
            self._solve_head(model)
        return model

    @torch.no_grad()
    def _solve_head(self, model: LlamaForCausalLM) -> None:
        """Set the head so that the logits after the i-th prefix of a response are those of the table, to rounding."""
        (prompt,) = self.tokenizer()(list(self.prompts))["input_ids"]
        letters = range(len(self.letters))
        prefixes = [body for n in range(self.length) for body in itertools.product(letters, repeat=n)]
        states = [model.model(torch.tensor([[*prompt, *body]])).last_hidden_state[0, -1] for body in prefixes]
        solved = torch.linalg.lstsq(torch.stack(states).double(), sine_table(len(prefixes), len(letters) + 1))
        model.lm_head.weight.copy_(solved.solution.T)

    @torch.no_grad()
    def logprobs(self, model: Callable[..., Any], temperature: float = 1.0) -> Tensor:
        """log pi(response | prompt), [prompts, responses] float64."""
        rows = self.responses()
        real = torch.tensor([[True] * len(row) + [False] * (self.length - len(row)) for row in rows])
        padded = torch.tensor([[*row, *[0] * (self.length - len(row))] for row in rows])
        found = []
        for prompt in self.tokenizer()(list(self.prompts))["input_ids"]:
            ids = torch.cat([torch.tensor(prompt).expand(len(rows), -1), padded], dim=1)
            mask = torch.cat([torch.ones(len(rows), len(prompt), dtype=torch.bool), real], dim=1)
            tokens = response_logprobs(model, ids, mask, self.length, temperature).double()
            found.append(tokens.masked_fill(~real, 0.0).sum(dim=1))
        return torch.stack(found)

    def scores(self, reward: Callable[..., list[float]]) -> Tensor:
        """The score of every response, [prompts, responses] float64."""
        rows = [list(row) for row in self.responses()]
        found = [reward(prompts=[prompt] * len(rows), completion_ids=rows) for prompt in self.prompts]
        return torch.tensor(found, dtype=torch.float64)


def sine_table(prefixes: int, tokens: int) -> Tensor:
    """Logits sin(1 + 4 i + a) of token a after prefix i, [prefixes, tokens] float64."""
    return torch.tensor(
        [[math.sin(1 + 4 * i + a) for a in range(tokens)] for i in range(prefixes)], dtype=torch.float64
    )


@dataclass(frozen=True, slots=True)
class ExactResult:
    """The exact J and KL of a policy, its reference and the optimum: means over prompts, KL in nats per response."""

    reference: float  # J(ref) = E_ref[score]
    reached: float  # J(pi)
    optimum: float  # J*
    divergence: float  # KL(pi || pi*)
    kl: float  # KL(pi || ref)
    optimal_kl: float  # KL(pi* || ref)

    @property
    def normalised(self) -> float:
        """0 at the reference, 1 at the optimum."""
        return (self.reached - self.reference) / (self.optimum - self.reference)


def optimal_logprobs(log_q: Tensor, score: Tensor, beta: float) -> Tensor:
    """log pi* of every response, [prompts, responses] float64."""
    return (log_q + score / beta).log_softmax(dim=1)


def exact_result(log_p: Tensor, log_q: Tensor, score: Tensor, beta: float) -> ExactResult:
    """J and KL of a policy `log_p` against the reference `log_q`, all [prompts, responses] float64."""

    def mean(log_weight: Tensor, value: Tensor) -> float:
        return float((log_weight.exp() * value).sum(dim=1).mean())

    log_best = optimal_logprobs(log_q, score, beta)
    return ExactResult(
        reference=mean(log_q, score),
        reached=mean(log_p, score) - beta * mean(log_p, log_p - log_q),
        optimum=float(beta * (log_q + score / beta).logsumexp(dim=1).mean()),
        divergence=mean(log_p, log_p - log_best),
        kl=mean(log_p, log_p - log_q),
        optimal_kl=mean(log_best, log_best - log_q),
    )


SMALL = Language("small", "abc", 3, prompts=("a",), reward="letters", spread=0.2, table=True)
LARGE = Language("large", "abcdefghij", 3, prompts=("a", "b", "cd"), reward="echo", spread=0.08)
# vLLM's kernels for CPUs take no smaller heads than 32. With them, weights as of SMALL have states from which a head is solved for
# only by large numbers, with which PPO misses the optimum on some seeds; these have others.
SMALL_BY_VLLM = replace(SMALL, heads=2, spread=0.3, seed=1)
LARGE_BY_VLLM = replace(LARGE, heads=2, key_value_heads=1)
DENSE = Language("dense", "abcdefghijk", 3, prompts=("a", "b", "cd", "efg"), reward="arbitrary", spread=0.08)
