"""Optimizers: two steps by arithmetic, torch's own classes, transformers' own choices, and the schedules of learning rates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from align.config.optimizer import OPTIMIZERS
from align.config.schedule import SCHEDULES
from align.config.sft import SFTRecipe
from align.engine.batch_plan import BatchPlan
from align.engine.deepspeed_config import deepspeed_config
from align.engine.distributed import World
from align.engine.optimizer import learning_rates, make_optimizer, optimizer_class
from align.engine.parts import SavedParts
from align.engine.state import OF
from align.engine.torch_engine import TorchEngine
from align.errors import UserError
from align.trainer.arguments import optim_args_text, total_steps
from align.trainer.checkpoint import SafeCheckpoints
from tests.worlds import tiny_llama

GRADIENTS, RATES = (2.0, -1.0), (0.1, 0.05)  # of the two steps
KEYS = {"output_dir": "o", "model_name_or_path": "m"}


def after_two_steps(**keys) -> float:
    """The weight 1.0 of a one-by-one matrix, whose weight decay is 0.5."""
    weight = nn.Parameter(torch.ones(1, 1))
    optimizer = make_optimizer([weight], SFTRecipe(**KEYS, weight_decay=0.5, **keys), 1.0)
    for gradient, rate in zip(GRADIENTS, RATES, strict=True):
        weight.grad = torch.full((1, 1), gradient)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return weight.item()


def test_adamw_by_hand():
    """w <- w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w)"""
    w, m, v = 1.0, 0.0, 0.0
    for step, (g, rate) in enumerate(zip(GRADIENTS, RATES, strict=True), 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w -= rate * (0.5 * w)
        w -= rate * m / (1 - 0.8**step) / (math.sqrt(v / (1 - 0.9**step)) + 0.01)
    for name in ("adamw_torch_fused", "adamw_torch"):
        found = after_two_steps(optim=name, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=0.01)
        assert found == pytest.approx(w, rel=1e-6)


def test_sgd_by_hand():
    """b <- momentum b + g + decay w, the first g + decay w itself; w <- w - lr b"""
    first = 1.0 - 0.1 * (2.0 + 0.5)
    second = first - 0.05 * (-1.0 + 0.5 * first)
    assert after_two_steps(optim="sgd") == pytest.approx(second, rel=1e-6)
    second = first - 0.05 * (0.9 * 2.5 + (-1.0 + 0.5 * first))
    assert after_two_steps(optim="sgd", optim_args={"momentum": 0.9}) == pytest.approx(second, rel=1e-6)


def test_adagrad_by_hand():
    """s <- s + g^2; w <- w - lr / (1 + (t - 1) decay) g / (sqrt(s) + eps), with weight decay in g"""
    g = 2.0 + 0.5
    first, s = 1.0 - 0.1 * g / (g + 0.01), g * g
    g = -1.0 + 0.5 * first
    second = first - 0.05 / 1.2 * g / (math.sqrt(s + g * g) + 0.01)
    assert after_two_steps(optim="adagrad", optim_args={"lr_decay": 0.2, "eps": 0.01}) == pytest.approx(
        second, rel=1e-6
    )


def test_rmsprop_by_hand():
    """v <- a v + (1 - a) g^2; b <- momentum b + g / (sqrt(v) + eps); w <- w - lr b"""
    w, v, b = 1.0, 0.0, 0.0
    for gradient, rate in zip(GRADIENTS, RATES, strict=True):
        g = gradient + 0.5 * w
        v = 0.9 * v + 0.1 * g * g
        b = 0.5 * b + g / (math.sqrt(v) + 0.01)
        w -= rate * b
    found = after_two_steps(optim="rmsprop", optim_args={"alpha": 0.9, "momentum": 0.5, "eps": 0.01})
    assert found == pytest.approx(w, rel=1e-6)


def test_adafactor_by_hand():
    """Of one element: u = g / sqrt(v), v with 1 - t^-0.8 of the old; clipped to RMS 1; w <- w - lr (decay w + u)"""
    v, w = 4.0, 1.0
    w -= 0.1 * (0.5 * w + 1.0)  # u is 1
    share = 1 - 2**-0.8
    v = share * v + (1 - share) * 1.0
    w = w - 0.05 * (0.5 * w - 1.0 / math.sqrt(v))
    assert after_two_steps(optim="adafactor") == pytest.approx(w, rel=1e-6)


def test_adagrad_is_that_of_torch():
    """To the bit; DeepSpeed would replace torch's own class by one without weight decay and schedule."""
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(each.clone()) for each in (torch.ones(3, 4), torch.ones(4))] for _ in range(2))
    settings = {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-6}
    cls, _ = optimizer_class("adagrad", (0.9, 0.999), 1e-8, {})
    assert not issubclass(cls, torch.optim.Adagrad)
    optimizers = cls(ours, **settings), torch.optim.Adagrad(theirs, **settings)
    for _ in range(3):
        for mine, plain in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            plain.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(mine, plain) for mine, plain in zip(ours, theirs, strict=True))


ARGUMENTS = {
    "sgd": {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
    "rmsprop": {"alpha": 0.9, "momentum": 0.5, "eps": 1e-6, "centered": True},
    "adagrad": {"lr_decay": 0.1, "eps": 1e-6},
}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "8bit" not in name])
def test_a_trainer_has_the_class_that_transformers_gives_it(name, tmp_path):
    arguments = ARGUMENTS.get(name, {})
    assert arguments.keys() == OPTIMIZERS[name].arguments.keys()
    args = TrainingArguments(
        str(tmp_path),
        optim=name,
        optim_args=optim_args_text(arguments),
        learning_rate=0.3,
        adam_beta1=0.5,
        use_cpu=True,
    )
    ours, theirs = (cls.get_optimizer_cls_and_kwargs(args) for cls in (SafeCheckpoints, Trainer))
    assert ours[1] == theirs[1]
    assert ours[0].__name__ == theirs[0].__name__
    assert ours[0] is theirs[0] or name == "adagrad"
    recipe = SFTRecipe(**KEYS, optim=name, optim_args=arguments)
    assert type(make_optimizer([nn.Parameter(torch.ones(2))], recipe, 0.1)) is ours[0]


def test_the_8_bit_optimizer(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    args = TrainingArguments(str(tmp_path), optim="adamw_8bit", optim_args="", adam_beta1=0.5, use_cpu=True)
    ours, theirs = (cls.get_optimizer_cls_and_kwargs(args) for cls in (SafeCheckpoints, Trainer))
    assert ours == theirs
    assert ours[0] is bitsandbytes.optim.AdamW


def test_a_checkpoint_of_the_8_bit_optimizer_continues_to_the_bit(tmp_path):
    """Its states are bytes, scales of blocks and tables of quantiles."""
    pytest.importorskip("bitsandbytes")

    def steps(engine: TorchEngine, numbers: range) -> None:
        for number in numbers:
            ids = torch.randint(3, 29, (1, 8), generator=torch.Generator().manual_seed(number))
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step(1e-2)

    recipe = SFTRecipe(**KEYS, optim="adamw_8bit")
    world = World(rank=0, size=1, device=torch.device("cpu"))
    ours, theirs = (TorchEngine(tiny_llama(hidden_size=128), recipe, world, 1e-2) for _ in range(2))
    steps(ours, range(2))
    ours.save_checkpoint(tmp_path)
    kinds = {name.split(OF)[0] for name in SavedParts(tmp_path).shapes if OF in name}
    assert kinds >= {"absmax1", "absmax2", "qmap1", "qmap2"}
    steps(ours, range(2, 4))
    theirs.load_checkpoint(tmp_path)
    steps(theirs, range(2, 4))
    pairs = zip(ours.module.parameters(), theirs.module.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


class TestSchedules:
    def test_the_ends_of_schedules(self):
        def rates(name: str, **arguments: float) -> list[float]:
            return learning_rates(2.0, name, 0, 4, arguments)

        assert rates("polynomial", lr_end=0.4, power=2) == pytest.approx(
            [0.4 + 1.6 * (1 - u / 4) ** 2 for u in range(4)]
        )
        floor = [0.5 + 1.5 * (1 + math.cos(math.pi * u / 4)) / 2 for u in range(4)]
        assert rates("cosine_with_min_lr", min_lr=0.5) == pytest.approx(floor)
        assert rates("cosine_with_min_lr", min_lr_rate=0.25) == pytest.approx(floor)
        assert rates("cosine", num_cycles=1.0) == pytest.approx([2.0, 1.0, 0.0, 1.0])
        assert rates("cosine_with_restarts", num_cycles=2.0) == pytest.approx([2.0, 1.0, 2.0, 1.0])
        assert rates("inverse_sqrt", timescale=1.0) == pytest.approx([2 / math.sqrt(1 + u) for u in range(4)])
        decay = rates("warmup_stable_decay", num_decay_steps=2.0, decay_type="linear", min_lr_ratio=0.5)
        assert decay == pytest.approx([2.0, 2.0, 2.0, 1.5])

    def test_a_decay_that_is_longer_than_the_run(self):
        keys = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 4.0}}
        plan = BatchPlan(batch_size=4, micro_batch_size=4, accumulation=1, world_size=1)
        assert total_steps(SFTRecipe(**KEYS, **keys), 16, plan) == 4
        with pytest.raises(UserError, match="num_decay_steps: expected at most 3, all steps of the run, got 4"):
            total_steps(SFTRecipe(**KEYS, **keys), 12, plan)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_a_trainer_and_ppo_have_the_same(self, name):
        arguments = {"cosine_with_min_lr": {"min_lr": 0.2}, "cosine_warmup_with_min_lr": {"min_lr": 0.2}}.get(name, {})
        arguments = {"num_decay_steps": 2.0} if name == "warmup_stable_decay" else arguments
        rates = learning_rates(2.0, name, 2, 6, arguments)
        args = TrainingArguments(
            "o", lr_scheduler_type=name, lr_scheduler_kwargs=arguments, warmup_steps=2, use_cpu=True
        )
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
        trainer = Trainer(nn.Linear(1, 1), args, optimizers=(optimizer, None))
        schedule = trainer.create_scheduler(6)
        for rate in rates:
            assert schedule.get_last_lr() == [rate]
            optimizer.step()
            schedule.step()


def test_buckets_are_of_the_models_size():
    """Of the files in recipes/deepspeed; DeepSpeed's default would be 5e8 elements, whatever the model."""
    path = str(Path(__file__).parents[2] / "recipes" / "deepspeed" / "zero2.json")
    sizes = {"processes": 2, "accumulation": 1, "max_grad_norm": 1.0, "bf16": False}
    assert deepspeed_config(path, **sizes, hidden_size=16)["zero_optimization"]["reduce_bucket_size"] == 256
    assert "reduce_bucket_size" not in deepspeed_config(path, **sizes)["zero_optimization"]
    zero = deepspeed_config(path.replace("zero2", "zero3"), **sizes, hidden_size=16)["zero_optimization"]
    assert (zero["stage3_prefetch_bucket_size"], zero["stage3_param_persistence_threshold"]) == (230, 160)
