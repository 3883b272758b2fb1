"""Processes and engines: the only file that imports deepspeed.

`connect` joins the process group when the `deepspeed` launcher started us, and gives a `World` of one
otherwise. `train_engine` and `frozen_engine` wrap a model for this world: plain torch for one process without
a DeepSpeed file, DeepSpeed for everything else. Both kinds speak the same few words, so that a stage is
written once.

The loss given to `Engine.backward` is this rank's share of one global sum: shares are added over microbatches
and ranks, never averaged, so how the work is cut up does not change the gradient.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.clock import Clock
from align.config import StageRecipe, UserError
from align.gradients import sum_in_place
from align.models import skeleton, write_model
from align.optimizer import optimizer_for
from align.precision import round_off, train_in_bfloat16, widen_attention
from align.processor import prepare_processor
from align.world import World, remove_stale_shared_memory
from align.zero import deepspeed_config, uses_deepspeed, zero_stage
from reward_models.heads import hf_model


def connect(recipe: StageRecipe) -> World:
    """Join the process group of the `deepspeed` launcher, if it started this process; clear what dead runs left behind."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    prepare_processor()
    if int(os.environ.get("RANK", "0")) == 0:
        remove_stale_shared_memory()
    if size > 1 or uses_deepspeed(recipe):
        import deepspeed

        # DeepSpeed's own CPU collective saves nothing at our sizes, needs a compiler at the first start and
        # leaves 69 MB a process in shared memory; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():
            if "MASTER_ADDR" not in os.environ:  # one process without the launcher
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    return World(rank=int(os.environ.get("RANK", "0")), size=size, device=device, clock=Clock(device))


def disconnect() -> None:
    """Leave the process group, after all ranks are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def sharded_load(recipe: StageRecipe, role: str = "policy") -> Iterator[None]:
    """Under ZeRO-3, `from_pretrained` inside this block shards each weight as it is read, so no rank holds a whole model."""
    if zero_stage(recipe, role) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    alive = HfDeepSpeedConfig(deepspeed_config(recipe, role, int(os.environ.get("WORLD_SIZE", "1")), 1))
    try:
        yield
    finally:
        del alive  # transformers shards whatever is loaded for as long as this object lives


@contextlib.contextmanager
def full_parameters(parameters: list[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Make sharded parameters whole inside the block; with `modify`, rank 0's values are kept at its end."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None):
        yield


class Engine:
    """One model on one process, in plain torch; with `bf16` its weights are bfloat16 and those that train float32, too."""

    def __init__(
        self, model: PreTrainedModel | PeftModel, recipe: StageRecipe, world: World, learning_rate: float | None
    ):
        self.module = model.to(world.device)
        self.world = world
        self.max_grad_norm = recipe.max_grad_norm
        if learning_rate is None:
            self.module.requires_grad_(False)
        if recipe.bf16 and world.device.type == "cpu":
            widen_attention(model)
        self.masters = train_in_bfloat16(model) if recipe.bf16 else {}
        trained = [self._master(parameter) for _, parameter in self._trained()]
        if trained and world.device.type == "cpu":  # on a GPU such sums would not come out the same twice
            inner = hf_model(model)
            sum_in_place(inner.get_input_embeddings(), inner.get_output_embeddings(), self._master)
        self.optimizer = optimizer_for(trained, recipe, learning_rate) if learning_rate is not None else None
        self.module.eval()  # dropout is off anyway; some architectures switch gradient checkpointing by this flag
        if self.optimizer is not None and recipe.gradient_checkpointing:
            self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.module.train()

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The model with all its weights on this rank, for generation without a word to the other ranks."""
        training = self.module.training
        self.module.eval()
        yield self.module
        self.module.train(training)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the global loss."""
        torch.autograd.backward(loss)

    def step(self, learning_rate: float) -> float:
        """One optimiser step at this learning rate, after the last microbatch. Returns the gradient norm before clipping."""
        assert self.optimizer is not None
        trained = [self._master(parameter) for _, parameter in self._trained()]
        norm = nn.utils.clip_grad_norm_(trained, self.max_grad_norm or float("inf"))
        self._set_learning_rate(learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        round_off(self.masters.items())
        return float(norm)

    def discard(self) -> None:
        """Forget the gradients of all microbatches since the last step, instead of stepping."""
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)

    def _set_learning_rate(self, learning_rate: float) -> None:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, whole, on the CPU: on rank 0; elsewhere an empty dict. Every rank must call it."""
        named = list(self.module.named_parameters()) + [
            (name, buffer) for name, buffer in self.module.named_buffers() if name in self._persistent_buffers()
        ]
        weights = {}
        for name, parameter in named:  # one by one, so that no rank ever holds a second whole model
            with full_parameters([parameter] if isinstance(parameter, nn.Parameter) else []):
                if self.world.is_main:
                    weights[name] = self._master(parameter).detach().cpu().clone()
        return weights

    def _persistent_buffers(self) -> set[str]:
        return {
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in self.module.named_modules()
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        }

    def save_pretrained(self, folder: Path) -> None:
        """Write a Hugging Face folder (safetensors) from rank 0, adapters merged. Every rank must call it."""
        weights = self.state_dict()
        if self.world.is_main:
            write_model(self.module, weights, folder)
        self.world.barrier()

    def save_checkpoint(self, folder: Path) -> None:
        """Write weights and optimiser state for an exact resume: safetensors only."""
        assert self.optimizer is not None
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: self._master(p).detach().contiguous() for name, p in self._trained()}
        save_file(weights, folder / "weights.safetensors")
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
        save_file(tensors, folder / "optimizer.safetensors")

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _master(self, parameter: Any) -> Any:
        """The float32 weight behind one that the model computes with; itself where there is no other."""
        return self.masters.get(parameter, parameter)

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from `save_checkpoint`, to the bit."""
        assert self.optimizer is not None
        weights = load_file(folder / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in self._trained():
                self._master(parameter).copy_(weights[name])
        round_off(self.masters.items())
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


class DeepSpeedEngine(Engine):
    """One model over all ranks by DeepSpeed ZeRO. Under stage 3 a rank holds 1/N of it, also when frozen."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        recipe: StageRecipe,
        world: World,
        learning_rate: float | None,
        role: str,
        accumulation: int = 1,
    ):
        import deepspeed

        self.world = world
        self.masters = {}  # DeepSpeed has its own
        self.stage = zero_stage(recipe, role)
        self.accumulation = accumulation
        self.pending = False  # gradients since the last step
        config = deepspeed_config(recipe, role, world.size, accumulation)
        if learning_rate is None:
            model.requires_grad_(False)
            if self.stage < 3:  # nothing to shard: gradients and optimiser states do not exist
                config["zero_optimization"] = {"stage": 0}
        elif recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.bf16 and world.device.type == "cpu":
            widen_attention(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adamw = optimizer_for(trained, recipe, learning_rate) if learning_rate is not None else None
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=self.adamw, config=config)
        self.module = self.engine.module
        self.engine.train(learning_rate is not None and recipe.gradient_checkpointing)

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        if self.stage < 3:
            training = self.module.training
            self.module.eval()
            yield self.module
            self.module.train(training)
            return
        copy = self._whole_copy()
        yield copy
        del copy

    def _whole_copy(self) -> nn.Module:
        """An unsharded copy for one rollout: ranks then generate at their own pace, and freeing it frees the memory."""
        copy: nn.Module = (
            skeleton(self.module).to(next(self.module.parameters()).dtype).to_empty(device=self.world.device)
        )
        hf_model(copy).tie_weights()  # memory made anew is not shared
        targets = dict(copy.named_parameters())
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                with full_parameters([parameter]):
                    targets[name].copy_(parameter)
            buffers = dict(copy.named_buffers())
            for name, buffer in self.module.named_buffers():
                buffers[name].data = buffer.to(self.world.device).clone()
        copy.requires_grad_(False)
        copy.eval()
        return copy

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the accumulation steps and averages over ranks; our shares are to be added.
        self.engine.backward(loss * (self.world.size * self.accumulation))
        self.pending = True
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # before the last microbatch it only counts

    def step(self, learning_rate: float) -> float:
        self._set_learning_rate(learning_rate)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if gradients else None  # ZeRO 0 in float32, which reports none
        self.engine.step()
        self.pending = False
        return float(norm if norm is not None else self.engine.get_global_grad_norm())

    def discard(self) -> None:
        # DeepSpeed has buffers of its own for gradients, which a step alone empties: a step that moves nothing.
        if not self.pending:  # the policy while only the value model trains; a step would be counted as a microbatch
            return
        assert self.adamw is not None
        step = self.adamw.step
        self.adamw.step = lambda *_, **__: None  # type: ignore[method-assign]
        try:
            self.engine.step()
        finally:
            self.adamw.step = step  # type: ignore[method-assign]
        self.pending = False

    def save_checkpoint(self, folder: Path) -> None:
        self.engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=self._has_adapter()
        )

    def load_checkpoint(self, folder: Path) -> None:
        loaded, _ = self.engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=not self._has_adapter()
        )
        if loaded is None:
            raise UserError(f"{folder}: DeepSpeed cannot read this checkpoint; delete it to use the one before it.")

    def _has_adapter(self) -> bool:
        return isinstance(self.module, PeftModel)


class AdapterOff(Engine):
    """The frozen model that a LoRA policy started from: the policy with its adapter off. It takes no memory."""

    def __init__(self, policy: Engine):
        self.policy = policy
        self.module = policy.module
        self.world = policy.world

    def __call__(self, **inputs: Any) -> Any:
        with torch.no_grad(), self.module.disable_adapter():
            return self.policy(**inputs)

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module]:
        with self.policy.whole() as model, model.disable_adapter():  # type: ignore[operator]
            yield model


def train_engine(
    model: PreTrainedModel | PeftModel,
    recipe: StageRecipe,
    world: World,
    learning_rate: float,
    accumulation: int,
    role: str = "policy",
) -> Engine:
    """An engine that trains `model`, taking `accumulation` microbatches per step."""
    if dist.is_initialized():
        return DeepSpeedEngine(model, recipe, world, learning_rate, role, accumulation)
    return Engine(model, recipe, world, learning_rate)


def frozen_engine(model: PreTrainedModel, recipe: StageRecipe, world: World, role: str = "policy") -> Engine:
    """An engine that only runs `model` forward; under ZeRO-3 it is sharded all the same."""
    if dist.is_initialized():
        return DeepSpeedEngine(model, recipe, world, None, role)
    return Engine(model, recipe, world, None)
