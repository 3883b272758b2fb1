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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.config.base import StageRecipe
from align.engine.distributed import World
from align.engine.mixed_precision import convert_to_bfloat16, copy_masters, use_float32_attention
from align.engine.optimizer import optimizer_for
from align.engine.sharding import gathered_parameters
from align.models.in_place_gradients import accumulate_in_place
from align.models.save import save_weights
from reward_models.heads import hf_model


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
            use_float32_attention(model)
        self.masters = convert_to_bfloat16(model) if recipe.bf16 else {}
        trained = [self._master(parameter) for _, parameter in self._trained()]
        if trained and world.device.type == "cpu":  # on a GPU such sums would not come out the same twice
            inner = hf_model(model)
            accumulate_in_place(inner.get_input_embeddings(), inner.get_output_embeddings(), self._master)
        self.optimizer = optimizer_for(trained, recipe, learning_rate) if learning_rate is not None else None
        self.module.eval()  # dropout is off anyway; some architectures switch gradient checkpointing by this flag
        if self.optimizer is not None and recipe.gradient_checkpointing:
            self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.module.train()

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[nn.Module]:
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
        copy_masters(self.masters.items())
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
            with gathered_parameters([parameter] if isinstance(parameter, nn.Parameter) else []):
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
            save_weights(self.module, weights, folder)
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
        copy_masters(self.masters.items())
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
