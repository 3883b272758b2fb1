"""Rollouts from a server: by vLLM itself where there is an environment with it, and by our own decoding behind the same protocol.

`ALIGN_TEST_VLLM_PYTHON` names the Python of an environment with vLLM, in which the slow tests run the real server.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from http.server import HTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from align.config.load import load_recipe
from align.data.collate import pad_left
from align.engine.engine import AdapterOff
from align.engine.sharding import gathered_state_dict, save_from_main
from align.errors import UserError
from align.generation import vllm_server
from align.generation.ending import Ending, after_end
from align.generation.generate import generate
from align.generation.responses import unpadded
from align.generation.vllm import VLLM
from align.maths.kl import adapted_kl_coef
from align.models.forward import response_logprobs
from align.ppo import step
from align.ppo import train as train_module
from align.ppo.ahead import Ahead
from align.ppo.metrics import response_kl
from align.ppo.rollout_server import rollout_server
from align.ppo.self_check_limits import BFLOAT16, FLOAT32, check_sampler_gap
from align.ppo.train import run
from tests.ppo.runs import ALONE, ppo_run
from tests.ppo.test_train import make_recipe, metrics
from tests.ppo.test_trajectory_balance import numbered
from tests.ranks import run_stage, stop_after_checkpoint, torchrun_on_two_nodes
from tests.worlds import claimed, letter_tokenizer, save_tiny_policy, tiny_llama

TOKENIZER = letter_tokenizer()
LOADING = (
    threading.Lock()
)  # transformers patches its models while it loads one, and servers here are threads of one process
PYTHON = os.environ.get("ALIGN_TEST_VLLM_PYTHON")


class OwnDecoding(vllm_server.Sampler):
    """Samples with this package's decoding loop: its responses are those of a run without a server."""

    def __init__(self, folder: Path | str, max_model_len: int = 256):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.version, self.asked = 0, 0
        self.description = {"model": str(folder), "dtype": "float32", "max_model_len": max_model_len}

    def load_weights(self, folder, version):
        with LOADING:
            self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.version = version
        return {"version": version}

    def generate(self, prompts, seeds, temperature, max_tokens, stop_token_ids, version):
        if version != self.version:
            raise vllm_server.Refused(f"this server has version {self.version}, and version {version} was asked for")
        self.asked += len(prompts)
        assert stop_token_ids == [TOKENIZER.eos_token_id]
        noise = torch.stack([torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        ids, mask, logprobs = generate(self.model, *pad_left(prompts, 0), noise, temperature, Ending(TOKENIZER))
        numbers = [row[real].tolist() for row, real in zip(logprobs, mask, strict=True)]
        return {"version": version, "ids": unpadded(ids, mask), "logprobs": numbers}


@pytest.fixture
def serve(monkeypatch):
    """Start servers on this machine that sample with the given sampler."""
    monkeypatch.setenv(vllm_server.TOKEN, "secret")
    started = []

    def start(sampler) -> str:
        handler = type("Handler", (vllm_server.Handler,), {"sampler": sampler, "token": "secret"})
        started.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_address[1]}"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def client(url: str, token: str = "secret", timeout: float = 5.0) -> VLLM:
    return VLLM([url], token, Path, timeout, str)


def train(folder: Path, **changes) -> list[dict]:
    folder.mkdir()
    recipe = load_recipe("ppo", make_recipe(folder, total_episodes=32, eval_steps=2, **changes))
    run(recipe)
    return metrics(folder / "out")


def same_curve(one: list[dict], other: list[dict]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        names = [name for name in theirs if name.partition("/")[0] in ("objective", "response", "eval", "value")]
        assert len(names) > 3
        for name in names:
            assert mine[name] == pytest.approx(theirs[name], abs=2e-4), name


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_by_servers_is_the_run_without(tmp_path, serve, method):
    keys = {"method": method} if method == "full" else {"method": method, "learning_rate": 0.01}
    alone = train(tmp_path / "alone", **keys)
    save_tiny_policy(tmp_path / "start", seed=9)  # other weights: the run must send its own
    samplers = [OwnDecoding(tmp_path / "start"), OwnDecoding(tmp_path / "start")]
    served = train(
        tmp_path / "served", rollout_engine="vllm", vllm_server_base_url=[serve(each) for each in samplers], **keys
    )
    same_curve(served, alone)
    assert alone[-1]["eval/kl"] > 0.05  # the weights have moved by then
    asked = [each.asked for each in samplers]
    assert asked[0] - asked[1] == 2  # they share the prompts; of 5 held out, at two evaluations, the first has 3
    last = [line for line in served if "policy/sampler_gap_mean" in line][-1]
    assert last["policy/sampler_gap_mean"] < 1e-5
    assert "policy/importance_ess" not in last  # rounding alone is not weighted
    assert not (tmp_path / "served" / "out" / "vllm_weights").exists()


def test_advantages_are_weighted_by_what_the_engines_differ_in(tmp_path, serve):
    """The policy computes in bfloat16, the server in float32."""
    url = serve(OwnDecoding(make_recipe(tmp_path) and tmp_path / "policy"))
    keys = {"bf16": True, "rollout_engine": "vllm", "vllm_server_base_url": [url], "vllm_importance_sampling_cap": 1.01}
    recipe = claimed(load_recipe("ppo", make_recipe(tmp_path, **keys)))
    weighted = ppo_run(recipe)
    with rollout_server(recipe, ALONE, 20) as vllm:
        weighted.sampler = replace(weighted.sampler, vllm=vllm)
        seen = []
        with mock.patch.object(step, "optimize", lambda run, *rest: seen.append(rest) or {}):
            measured = step.step(weighted, 0)
    rollout, advantages, *_ = seen[0]
    ratios = (rollout.old_logprobs - rollout.sampled_logprobs).exp()
    assert (rollout.mask & (ratios > 1.01)).any()
    scores = rollout.scores  # one update: not normalized, with a Python reward
    plain, _ = step.estimate_advantages(weighted, rollout, step.compute_rewards(weighted, rollout, scores))
    assert advantages.numpy() == pytest.approx((plain * ratios.clamp(max=1.01)).numpy(), rel=1e-5, abs=1e-6)
    assert measured["policy/importance_cut"] == pytest.approx(float((ratios > 1.01)[rollout.mask].float().mean()))


def test_one_step_off_policy(tmp_path, serve):
    """The responses of an update are of the policy before the last one, and weighted by what it changed."""
    keys = {"rollout_engine": "vllm", "vllm_importance_sampling_cap": 1.05, "one_step_off_policy": True}
    url = serve(OwnDecoding(make_recipe(tmp_path) and tmp_path / "policy"))
    recipe = claimed(load_recipe("ppo", make_recipe(tmp_path, vllm_server_base_url=[url], **keys)))
    stepped = ppo_run(recipe)
    seen, optimize = [], step.optimize
    with rollout_server(recipe, ALONE, 20) as vllm:
        stepped.sampler = replace(stepped.sampler, vllm=vllm)
        stepped.ahead = Ahead(stepped.sampler, ALONE)
        with mock.patch.object(step, "optimize", lambda run, *rest: seen.append(rest) or optimize(run, *rest)):
            measured = [step.step(stepped, update) for update in range(3)]
    (first, *_), (second, advantages, *_), (third, *_) = seen
    assert largest_gap(first.sampled_logprobs, first) < 2e-5
    assert "policy/importance_cut" not in measured[0]
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    ids, real = second.sequences()
    before = response_logprobs(start, ids, real, second.mask.shape[1], recipe.temperature).detach()
    assert largest_gap(second.sampled_logprobs, second, before) < 2e-5
    assert min(largest_gap(each.sampled_logprobs, each) for each in (second, third)) > 1e-2
    ratios = (second.old_logprobs - before).exp()
    plain, _ = step.estimate_advantages(stepped, second, step.compute_rewards(stepped, second, second.scores))
    assert (ratios > 1.05)[second.mask].any()
    assert advantages.numpy() == pytest.approx((plain * ratios.clamp(max=1.05)).numpy(), rel=1e-4, abs=1e-5)
    assert stepped.ahead.asked is not None  # for the fourth update
    assert len(second.mask) == 16
    kl = float(((second.old_logprobs - second.ref_logprobs) * ratios * second.mask).sum(1).mean())
    assert measured[1]["objective/kl"] == pytest.approx(kl, rel=1e-3)
    assert kl > 0 > float(((second.old_logprobs - second.ref_logprobs) * second.mask).sum(1).mean())
    stepped.recipe, stepped.progress.kl_coef = replace(recipe, kl_target=5.0), 0.2
    step.adapt_kl_coef(stepped, second)
    assert stepped.progress.kl_coef == pytest.approx(adapted_kl_coef(0.2, kl, 5.0, 16, recipe.kl_horizon), rel=1e-6)


def test_the_kl_of_responses_of_an_earlier_policy_is_that_of_the_policy():
    """One token of three, each as often among four responses as the reference, which sampled them, has it."""
    policy, reference = torch.tensor([0.25, 0.25, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    token = torch.tensor([[0], [0], [1], [2]])
    rollout = replace(
        numbered(0, 4, 2, 1),
        old_logprobs=policy[token].log(),
        ref_logprobs=reference[token].log(),
        sampled_logprobs=reference[token].log(),
    )
    exact = float((policy * (policy / reference).log()).sum())
    assert float(response_kl(rollout, off_policy=True).mean()) == pytest.approx(exact, rel=1e-6)
    assert float(response_kl(rollout).mean()) < 0


def largest_gap(logprobs, rollout, others=None) -> float:
    gap = (logprobs - (rollout.old_logprobs if others is None else others)).abs()
    return float(gap[rollout.mask].max())


def test_weights_wait_for_what_is_being_sampled(serve):
    def generate(version, **_):
        time.sleep(0.3)
        return {"version": version, "ids": [[3]], "logprobs": [[0.0]]}

    server = SimpleNamespace(generate=generate, load_weights=lambda folder, version: {"version": version})
    vllm = VLLM([serve(server)], "secret", lambda: nullcontext(Path()), 5.0, str)
    engine = SimpleNamespace(world=ALONE, save_pretrained=lambda folder: None)
    vllm.send_weights(engine)
    begun = vllm.start([[3]], [1], 1.0, 4, [2])
    time.sleep(0.1)  # it has asked
    vllm.send_weights(engine)
    assert begun.result()[0].tolist() == [[3]]  # of the version that it was asked for


def test_responses_ahead_are_in_the_checkpoint(tmp_path, serve):
    url = serve(OwnDecoding(make_recipe(tmp_path) and tmp_path / "policy"))
    keys = {"rollout_engine": "vllm", "vllm_server_base_url": [url], "one_step_off_policy": True}
    recipe, out = make_recipe(tmp_path, total_episodes=64, eval_steps=3, **keys), tmp_path / "out"
    run(load_recipe("ppo", recipe))
    whole = (out / "model.safetensors").read_bytes()
    out.rename(tmp_path / "whole")
    save = train_module.save_if_due
    with (
        mock.patch.object(train_module, "save_if_due", lambda run, done: save(run, done) or 1 / (done != 2)),
        pytest.raises(ZeroDivisionError),
    ):
        run(load_recipe("ppo", recipe))
    assert (out / "checkpoint-2/ahead").exists()
    run(load_recipe("ppo", recipe))
    assert (out / "model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_two_ranks_by_a_server_are_one_process_without(tmp_path, serve):
    alone = train(tmp_path / "alone")
    (tmp_path / "two").mkdir()
    save_tiny_policy(tmp_path / "start", seed=9)
    recipe = make_recipe(
        tmp_path / "two", total_episodes=32, eval_steps=2, rollout_engine="vllm",
        vllm_server_base_url=[serve(OwnDecoding(tmp_path / "start"))],
    )  # fmt: skip
    done = run_stage("ppo", recipe, ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    same_curve(metrics(tmp_path / "two" / "out"), alone)


@pytest.mark.parametrize("reference", [False, True])
def test_the_weights_that_servers_get_beside_an_adapter(tmp_path, reference):
    base = tiny_llama()
    adapted = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    engine = SimpleNamespace(module=adapted, world=ALONE, state_dict=lambda: gathered_state_dict(adapted, ALONE))
    if reference:
        AdapterOff(engine).save_pretrained(tmp_path)
    else:
        save_from_main(adapted, engine.state_dict(), tmp_path, ALONE)
    ids = torch.tensor([[3, 4, 5, 6]])
    with adapted.disable_adapter() if reference else nullcontext():
        expected = adapted(ids).logits
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits.detach().numpy() == pytest.approx(
        expected.detach().numpy(), abs=1e-5
    )
    with adapted.disable_adapter():
        assert (adapted(ids).logits - expected).abs().max() > 1e-3 or reference


class TestErrors:
    def test_another_token(self, tmp_path, serve):
        save_tiny_policy(tmp_path)
        with pytest.raises(UserError, match="the token is not that of this server"):
            client(serve(OwnDecoding(tmp_path)), token="other").check(10)

    def test_a_server_for_shorter_sequences(self, tmp_path, serve):
        save_tiny_policy(tmp_path)
        with pytest.raises(UserError, match=r"start it with --max_model_len 11\."):
            client(serve(OwnDecoding(tmp_path, max_model_len=10))).check(11)

    def test_old_weights(self, tmp_path, serve):
        save_tiny_policy(tmp_path)
        vllm = client(serve(OwnDecoding(tmp_path)))
        vllm.version = 3
        with pytest.raises(UserError, match="this server has version 0, and version 3 was asked for"):
            vllm.sample([[3]], [1], 1.0, 4, [2])

    def test_a_server_that_hangs(self, serve):
        done = threading.Event()
        url = serve(SimpleNamespace(describe=lambda: done.wait(10) and {}))
        with pytest.raises(UserError, match=r"did not answer within 0\.2 s \(vllm_server_timeout\)"):
            client(url, timeout=0.2).check(1)
        done.set()

    def test_a_server_that_is_not_there(self):
        with pytest.raises(
            UserError, match=r"the rollout server is gone: .*refused.* continues from the last checkpoint"
        ):
            client("http://127.0.0.1:9").check(1)

    def test_other_log_probabilities(self):
        check_sampler_gap(9e-5, FLOAT32)
        with pytest.raises(UserError, match="samples from other weights"):
            check_sampler_gap(2e-4, FLOAT32)
        with pytest.raises(UserError, match="samples from other weights"):
            check_sampler_gap(float("nan"), BFLOAT16)

    @pytest.mark.parametrize(
        ("python", "message"),
        [
            ("/no/such/python", "/no/such/python cannot be started: No such file"),
            (sys.executable, "has no vLLM; make an environment with it"),
        ],
    )
    def test_a_python_that_cannot_serve(self, tmp_path, python, message):
        recipe = load_recipe("ppo", make_recipe(tmp_path, rollout_engine="vllm", vllm_python=python))
        with pytest.raises(UserError, match=message), rollout_server(recipe, ALONE, 20):
            pass


def test_what_follows_a_stop_string_is_cut():
    ids = torch.tensor([[3, 4, 5, 2, 0], [4, 3, 4, 3, 4], [5, 5, 5, 5, 5]])  # "abc</s>", "babab", "ccccc"
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    after = after_end(ids, mask, Ending(TOKENIZER, ["ab"]))
    assert after.tolist() == [[False, False, True, True, False], [False, False, False, True, True], [False] * 5]


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="ALIGN_TEST_VLLM_PYTHON names no Python with vLLM")
class TestRealServer:
    def start(self, folder: Path, tied: bool, **changes) -> str:
        model = tiny_llama(hidden_size=128)  # heads of 32, which vLLM computes on a CPU
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(folder / "policy")
        TOKENIZER.save_pretrained(folder / "policy")
        return make_recipe(folder, rollout_engine="vllm", vllm_python=PYTHON, **changes)

    def test_a_run_and_its_resumption(self, tmp_path):
        recipe, out = self.start(tmp_path, tied=True), tmp_path / "out"
        run(load_recipe("ppo", recipe))
        gaps = [line["policy/sampler_gap"] for line in metrics(out) if "policy/sampler_gap" in line]
        assert len(gaps) == 6
        assert max(gaps) < 1e-4
        whole = (out / "model.safetensors").read_bytes()
        out.rename(tmp_path / "whole")
        stop_after_checkpoint("ppo", recipe, out)
        assert run_stage("ppo", recipe, ranks=1).returncode == 0
        assert (out / "model.safetensors").read_bytes() == whole

    def test_two_nodes_are_two_ranks_of_one(self, tmp_path):
        recipe, out = (
            self.start(tmp_path, tied=True, total_episodes=32, eval_steps=2, one_step_off_policy=True),
            tmp_path / "out",
        )
        torchrun_on_two_nodes("align.ppo", recipe, cwd=tmp_path)
        nodes = (out / "model.safetensors").read_bytes()
        out.rename(tmp_path / "nodes")
        assert run_stage("ppo", recipe, ranks=2).returncode == 0
        assert (out / "model.safetensors").read_bytes() == nodes

    def test_two_processes_share_a_model(self, tmp_path):
        run(load_recipe("ppo", self.start(tmp_path, tied=True, total_episodes=32, vllm_tensor_parallel_size=2)))
        gaps = [line["policy/sampler_gap"] for line in metrics(tmp_path / "out") if "policy/sampler_gap" in line]
        assert 0 < max(gaps) < 1e-4

    def test_a_head_of_its_own(self, tmp_path):
        run(load_recipe("ppo", self.start(tmp_path, tied=False, total_episodes=32)))
        gaps = [line["policy/sampler_gap"] for line in metrics(tmp_path / "out") if "policy/sampler_gap" in line]
        assert 0 < max(gaps) < 1e-4
