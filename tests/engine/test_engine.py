"""Engines: plain torch against a loop written here, sharding measured, checkpoints, shared memory."""

from __future__ import annotations

import json
import mmap
import os
import shutil

import pytest
import torch
import yaml
from torch import nn
from transformers import LlamaForSequenceClassification

from align.config.ppo import PPORecipe
from align.engine.build import frozen_engine, train_engine
from align.engine.distributed import World, remove_stale_shared_memory
from align.engine.engine import AdapterOff, Engine, NoUpdateEngine
from align.engine.mixed_precision import accumulate_in_float32
from align.errors import UserError
from align.models.forward import response_logprobs
from align.models.trainable import add_adapter
from tests import ranks
from tests.engine.shards_worker import hold_models
from tests.engine.sums_worker import norms_at_each_stage
from tests.worlds import deepspeed_file, letter_tokenizer, save_tiny_policy, tiny_llama, write_jsonl

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def recipe(**changes) -> PPORecipe:
    return PPORecipe(
        **{"output_dir": "out", "sft_model_path": "sft", "max_grad_norm": 0.5, "weight_decay": 0.1, **changes}
    )


def batch():
    torch.manual_seed(1)
    return torch.randint(3, 29, (4, 10)), torch.ones(4, 10, dtype=torch.bool)


def losses(model):
    ids, mask = batch()
    for part in (slice(0, 1), slice(1, 4)):
        yield -response_logprobs(model, ids[part], mask[part], 5, 1.0).sum() / 20


class TestOneProcess:
    def test_a_step_is_that_of_plain_torch(self):
        engine = train_engine(tiny_llama(), recipe(), ALONE, 1e-2, accumulation=2)
        plain = tiny_llama()
        decayed = [p for p in plain.parameters() if p.dim() > 1]
        others = [p for p in plain.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                      lr=1e-2, eps=1e-5)  # fmt: skip
        for rate in (1e-2, 5e-3):
            for loss in losses(engine):
                engine.backward(loss)
            norm = engine.step(rate)
            optimizer.zero_grad()
            sum(losses(plain)).backward()
            expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            assert norm == pytest.approx(float(expected), rel=1e-5)
            assert norm > 0.5, "the test wants clipping to bite"
        for ours, theirs in zip(engine.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)

    def test_a_checkpoint_continues_to_the_bit(self, tmp_path):
        def steps(engine, count):
            for _ in range(count):
                for loss in losses(engine):
                    engine.backward(loss)
                engine.step(1e-2)

        straight = train_engine(tiny_llama(), recipe(), ALONE, 1e-2, 2)
        steps(straight, 2)
        straight.save_checkpoint(tmp_path)
        steps(straight, 2)
        resumed = train_engine(tiny_llama(seed=9), recipe(), ALONE, 1e-2, 2)
        resumed.load_checkpoint(tmp_path)
        steps(resumed, 2)
        for ours, theirs in zip(straight.module.parameters(), resumed.module.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}

    def test_a_frozen_engine_has_no_gradients(self):
        engine = frozen_engine(tiny_llama(), recipe(), ALONE)
        assert not any(parameter.requires_grad for parameter in engine.module.parameters())
        ids, mask = batch()
        assert not response_logprobs(engine, ids, mask, 5, 1.0).requires_grad

    def test_gradient_checkpointing_does_not_change_the_gradient(self):
        gradients = []
        for checkpointing in (False, True):
            engine = train_engine(tiny_llama(), recipe(gradient_checkpointing=checkpointing), ALONE, 1e-2, 2)
            for loss in losses(engine):
                engine.backward(loss)
            gradients.append([parameter.grad for parameter in engine.module.parameters()])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


class TestProtocol:
    def test_what_is_an_engine(self):
        policy = train_engine(add_adapter(tiny_llama(), recipe(method="lora")), recipe(), ALONE, 1e-2, 1)
        for engine in (
            policy,
            AdapterOff(policy),
            NoUpdateEngine(policy),
            frozen_engine(tiny_llama(), recipe(), ALONE),
        ):
            assert isinstance(engine, Engine)
        for model in (policy.module, tiny_llama(), nn.Linear(2, 2)):
            assert not isinstance(model, Engine)

    def test_the_adapter_is_off_in_the_view_alone(self):
        plain = tiny_llama()
        policy = train_engine(add_adapter(tiny_llama(), recipe(method="lora")), recipe(), ALONE, 1e-2, 1)
        for loss in losses(policy):
            policy.backward(loss)
        policy.step(1e-2)
        ids, _ = batch()
        expected, reference, trained = (model(input_ids=ids).logits for model in (plain, AdapterOff(policy), policy))
        torch.testing.assert_close(reference, expected)
        assert not reference.requires_grad
        assert float((trained - expected).detach().abs().max()) > 1e-3
        with AdapterOff(policy).unsharded() as model:
            torch.testing.assert_close(model(input_ids=ids).logits, expected)

    def test_nothing_moves_without_updates(self):
        engine = train_engine(tiny_llama(), recipe(), ALONE, 1e-2, 1)
        still = NoUpdateEngine(engine)
        before = engine.state_dict()
        for loss in losses(still):
            still.backward(loss)
        assert still.step(1.0) == 0.0
        assert all(torch.equal(weight, before[name]) for name, weight in still.state_dict().items())
        assert all(parameter.grad is None for parameter in engine.module.parameters())


class TestBfloat16:
    def engine(self, **changes):
        return train_engine(tiny_llama(), recipe(bf16=True, **changes), ALONE, 1e-2, 2)

    def test_it_computes_with_bfloat16_weights_and_trains_float32_ones(self):
        engine = self.engine()
        assert {parameter.dtype for parameter in engine.module.parameters()} == {torch.bfloat16}
        assert engine.module.model.rotary_emb.inv_freq.dtype == torch.float32
        before = {name: p.detach() for name, p in tiny_llama().named_parameters()}
        for _ in range(20):  # too small for bfloat16, whose steps are 1/256 of a weight
            for loss in losses(engine):
                engine.backward(loss)
            engine.step(1e-5)
        after = engine.state_dict()
        for name, weight in before.items():
            assert after[name].dtype == torch.float32
            moved = (after[name] - weight).abs().max()
            assert 1e-4 < float(moved) < 1e-3, name
        for name, weight in engine.module.named_parameters():
            assert torch.equal(weight, after[name].bfloat16())

    def test_gradients_are_summed_in_float32(self):
        engine = self.engine()
        bias = engine.module.lm_head.weight
        for _ in range(300):  # equal parts: in bfloat16 their sum would stop at 256
            engine.backward(engine.module.lm_head.weight.float().sum())
        assert bias.grad is None
        assert torch.equal(engine.masters[bias].grad, torch.full(bias.shape, 300.0))
        engine.discard()
        assert engine.masters[bias].grad is None

    def test_sums_that_stay_in_grad_are_of_float32_too(self):
        module = nn.Linear(2, 2, bias=False).bfloat16()
        weight, unused = module.weight, nn.Parameter(torch.ones(2).bfloat16())
        module.register_parameter("unused", unused)
        accumulate_in_float32(module)
        for step in range(3):  # each begins anew
            unused.sum().backward()  # in the first microbatch alone
            for _ in range(300):
                module.weight.sum().backward()
            assert torch.equal(weight.grad, torch.full((2, 2), 300.0).bfloat16())
            assert torch.equal(unused.grad, torch.ones(2).bfloat16())
            module.zero_grad(set_to_none=step == 0)

    def test_a_gradient_is_that_of_float32_but_for_rounding(self):
        exact, rounded = train_engine(tiny_llama(), recipe(), ALONE, 1e-2, 2), self.engine()
        for engine in (exact, rounded):
            for loss in losses(engine):
                engine.backward(loss)
        for ours, theirs in zip(rounded.masters.values(), exact.module.parameters(), strict=True):
            assert nn.functional.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0) > 0.999

    def test_attention_is_that_of_bfloat16_in_float32(self):
        ids, mask = batch()
        mask[0, :3] = False
        engine = self.engine()
        assert engine.module.config._attn_implementation == "sdpa_in_float32"
        plain = tiny_llama().bfloat16()
        for given in ({"attention_mask": mask.long()}, {}):
            theirs, ours = (model(input_ids=ids, **given).logits.float()[mask] for model in (plain, engine))
            torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)

    def test_a_checkpoint_continues_to_the_bit(self, tmp_path):
        def steps(engine):
            for _ in range(2):
                for loss in losses(engine):
                    engine.backward(loss)
                engine.step(1e-2)

        straight = self.engine()
        steps(straight)
        straight.save_checkpoint(tmp_path)
        steps(straight)
        resumed = train_engine(tiny_llama(seed=9), recipe(bf16=True), ALONE, 1e-2, 2)
        resumed.load_checkpoint(tmp_path)
        steps(resumed)
        theirs = resumed.state_dict()
        for name, weight in straight.state_dict().items():
            assert torch.equal(weight, theirs[name])


def test_each_rank_holds_half_of_each_of_the_four_models_under_zero_3(tmp_path):
    save_tiny_policy(tmp_path / "policy")
    policy = tiny_llama(spread=0.3)
    with torch.no_grad():
        policy.lm_head.weight[2] *= 2.5  # so that responses end at every length
    policy.save_pretrained(tmp_path / "policy")
    LlamaForSequenceClassification(
        tiny_llama().config.__class__(**{**tiny_llama().config.to_dict(), "num_labels": 1})
    ).save_pretrained(tmp_path / "reward")
    letter_tokenizer().save_pretrained(tmp_path / "reward")
    shutil.copytree(tmp_path / "reward", tmp_path / "other")
    keys = {
        "stage": "ppo",
        "output_dir": str(tmp_path / "out"),
        "sft_model_path": str(tmp_path / "policy"),
        "reward_model_path": [str(tmp_path / "reward"), str(tmp_path / "other")],
        "train_dataset": write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}]),
        "deepspeed": deepspeed_file(tmp_path / "ds.json", 3),
    }
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(keys))
    done = ranks.run(hold_models, str(tmp_path / "ppo.yaml"), log=tmp_path / "rank")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        held = json.loads((tmp_path / "out" / f"rank{rank}.json").read_text())
        assert set(held) == {"policy", "value", "reference", "reward_model_1", "reward_model_2"}
        for name, count in held.items():
            assert count["resident"] == 0, name
            assert count["shard"] == pytest.approx(count["whole"] / 2, rel=0.02), name
        ours = held["policy"]
        assert ours["copy"] == ours["whole"]
        assert ours["tokens differ"] == [0, 0, 0]  # of the model on disk, the whole copy, the shards themselves
        assert ours["gap"] < 1e-5
        assert len(set(ours["lengths"])) > 1, "the test wants ragged responses"


def test_shared_memory_of_dead_processes_is_removed(tmp_path):
    dead, alive = tmp_path / "deepspeed_allreduce_buffer_0_dead", tmp_path / "deepspeed_allreduce_buffer_0_alive"
    other = tmp_path / "somebody_elses"
    for path in (dead, alive, other):
        path.write_bytes(b"x" * 4096)
    with open(alive, "r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_stale_shared_memory(tmp_path) == [dead]
    assert sorted(os.listdir(tmp_path)) == [alive.name, other.name]


def test_more_processes_than_rows():
    crowd = World(rank=0, size=8, device=torch.device("cpu"))
    crowd.check_rows(8)
    with pytest.raises(UserError, match=r"train_dataset: 7 usable rows for 8 processes.*at most 7"):
        crowd.check_rows(7)


@pytest.mark.slow
def test_deepspeed_sums_bfloat16_gradients_in_float32(tmp_path):
    done = ranks.run(norms_at_each_stage, tmp_path, ranks=2, log=tmp_path / "rank")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for stage, (once, summed) in found.items():
        assert summed == pytest.approx(once, rel=1e-3), stage  # 5.1 for 7.1 before
