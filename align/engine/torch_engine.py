"""One model on one process, in plain torch."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.config.base import StageRecipe
from align.engine.distributed import World
from align.engine.mixed_precision import convert_to_bfloat16, copy_masters, use_float32_attention
from align.engine.optimizer import make_optimizer, set_learning_rate, trained_parameters
from align.engine.sharding import evaluation_mode, gathered_state_dict, save_from_main
from align.engine.state import load_state, save_state
from align.models.in_place_gradients import accumulate_in_place
from reward_models.heads import hf_model


class TorchEngine:
    """One model on one process. With `bf16` it computes with bfloat16 weights, and trains float32 copies of them.

    Args:
        recipe: gives precision, clipping, gradient checkpointing and the optimizer.
        learning_rate: None freezes the model.

    Attributes:
        masters: bfloat16 weight -> the float32 weight that the optimizer steps; empty in float32.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, recipe: StageRecipe, world: World, learning_rate: float | None
    ):
        movable: Any = model  # the wrapper of `PreTrainedModel.to` hides its signature
        self.module: nn.Module = movable.to(world.device)
        self.world = world
        self.max_grad_norm = recipe.max_grad_norm
        if learning_rate is None:
            self.module.requires_grad_(False)
        if recipe.bf16 and world.device.type == "cpu":
            use_float32_attention(model)
        self.masters = convert_to_bfloat16(model) if recipe.bf16 else {}
        trained = self._trained_masters()
        if trained and world.device.type == "cpu":  # on a GPU the order of such sums, and so the result, would vary
            inner = hf_model(model)
            accumulate_in_place(inner.get_input_embeddings(), inner.get_output_embeddings(), self._master)
        self.optimizer = None
        if learning_rate is not None:
            self.optimizer = make_optimizer(trained, recipe, learning_rate)
        self.module.eval()  # dropout is 0 anyway; some architectures switch gradient checkpointing by this flag
        if self.optimizer is not None and recipe.gradient_checkpointing:
            self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.module.train()

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def unsharded(self) -> contextlib.AbstractContextManager[nn.Module]:
        return evaluation_mode(self.module)

    def begin_step(self, passes: int) -> None:
        pass  # gradients are summed until the step, however many they are

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def step(self, learning_rate: float) -> float:
        assert self.optimizer is not None
        norm = nn.utils.clip_grad_norm_(self._trained_masters(), self.max_grad_norm or float("inf"))
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        copy_masters(self.masters.items())
        return float(norm)

    def discard(self) -> None:
        assert self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        return gathered_state_dict(self.module, self.world, self._master)

    def save_pretrained(self, folder: Path) -> None:
        save_from_main(self.module, self.state_dict(), folder, self.world)

    def save_checkpoint(self, folder: Path) -> dict[str, list[int]]:
        return save_state(folder, self.module, self.optimizer, self.world, masters=self.masters)

    def load_checkpoint(self, folder: Path) -> None:
        load_state(folder, self.module, self.optimizer, masters=self.masters)

    def _trained_masters(self) -> list[nn.Parameter]:
        return [self._master(parameter) for _, parameter in trained_parameters(self.module)]

    def _master(self, parameter: Any) -> Any:
        """The float32 weight behind one that the model computes with; the weight itself where there is no other."""
        return self.masters.get(parameter, parameter)
