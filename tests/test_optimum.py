"""The real PPO stage against the exact optimum of a language small enough to write out.

The KL-regularised objective J(pi) = E[score] - beta KL(pi || ref) has the optimum J* = beta log E_ref exp(score / beta).
Every response of up to three tokens to every prompt is enumerated, under the real models' own probabilities.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from align.models import response_logprobs
from align.ppo import run
from align.recipes import load_recipe
from tests.worlds import letter_tokenizer, tiny_llama, write_jsonl

EOS, VOCABULARY, LENGTH = 2, 6, 3
PROMPTS = ["a", "b"]

RULE = '''
def points(prompts, completions, completion_ids, **columns):
    """A point for each a (b after the prompt b), half a point off for each c, and one off for not ending."""
    wanted = {"a": 3, "b": 4}
    return [
        ids.count(wanted[prompt]) - 0.5 * ids.count(5) + (0.3 if ids[-1] == 2 else -1.0)
        for prompt, ids in zip(prompts, completion_ids)
    ]
'''


def responses() -> list[tuple[int, ...]]:
    """Every response: up to and including end-of-text, or of full length without it."""
    others = [token for token in range(VOCABULARY) if token != EOS]
    ended = [(*body, EOS) for n in range(LENGTH) for body in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=LENGTH))


def logprobs(model, prompt: str) -> torch.Tensor:
    """log pi(response | prompt) of every response, [number of responses] float64."""
    rows = responses()
    prompt_ids = letter_tokenizer()(prompt)["input_ids"]
    ids = torch.tensor([[*prompt_ids, *row, *[0] * (LENGTH - len(row))] for row in rows])
    real = torch.tensor([[True] * len(row) + [False] * (LENGTH - len(row)) for row in rows])
    mask = torch.cat([torch.ones(len(rows), len(prompt_ids), dtype=torch.bool), real], dim=1)
    with torch.no_grad():
        return response_logprobs(model, ids, mask, LENGTH, 1.0).double().masked_fill(~real, 0.0).sum(1)


def objective(policy, reference, score: torch.Tensor, prompt: str, beta: float) -> tuple[float, float, float, float]:
    """J(pi), J(ref), J* and KL(pi || pi*) on one prompt, exactly."""
    log_p, log_q = logprobs(policy, prompt), logprobs(reference, prompt)
    log_best = (log_q + score / beta).log_softmax(0)
    j = (log_p.exp() * (score - beta * (log_p - log_q))).sum()
    best = beta * (log_q + score / beta).logsumexp(0)
    return float(j), float((log_q.exp() * score).sum()), float(best), float((log_p.exp() * (log_p - log_best)).sum())


def scores(folder: Path, prompt: str) -> torch.Tensor:
    namespace: dict = {}
    exec((folder / "rule_for_test.py").read_text(), namespace)
    rows = [list(row) for row in responses()]
    return torch.tensor(namespace["points"]([prompt] * len(rows), None, rows), dtype=torch.float64)


@pytest.mark.parametrize("beta", [1.0])
def test_ppo_reaches_the_optimum(tmp_path, beta):
    reference = tiny_llama(seed=4, hidden_size=32, layers=2, vocab_size=VOCABULARY, spread=0.15)
    reference.save_pretrained(tmp_path / "policy")
    letter_tokenizer().save_pretrained(tmp_path / "policy")
    (tmp_path / "rule_for_test.py").write_text(RULE)
    keys = {
        "stage": "ppo",
        "output_dir": str(tmp_path / "out"),
        "sft_model_path": str(tmp_path / "policy"),
        "reward_funcs": ["rule_for_test:points"],
        "train_dataset": write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS]),
        "eval_fraction": 0,
        "total_episodes": 60 * 256,
        "rollout_batch_size": 256,
        "minibatch_size": 64,
        "num_ppo_epochs": 4,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 256,
        "response_length": LENGTH,
        "learning_rate": 1e-2,
        "value_learning_rate": 2e-2,
        "kl_coef": beta,
        "logging_steps": 10,
    }
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(keys))
    assert sum(logprobs(reference, "a").exp()) == pytest.approx(1.0, abs=1e-5), "the enumeration is complete"
    run(load_recipe("ppo", str(tmp_path / "ppo.yaml")))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for prompt in PROMPTS:
        score = scores(tmp_path, prompt)
        reached, start, best, divergence = objective(policy, reference, score, prompt, beta)
        print(prompt, reached, start, best, divergence)
        assert reached - best == pytest.approx(-beta * divergence, abs=1e-6)  # the identity behind the test
        assert (reached - start) / (best - start) >= 0.95
        assert divergence < 0.02
