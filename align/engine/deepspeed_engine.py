"""One model over all ranks by DeepSpeed ZeRO."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.config.base import StageRecipe
from align.engine.deepspeed_config import deepspeed_config, zero_stage
from align.engine.distributed import World
from align.engine.mixed_precision import use_float32_attention
from align.engine.optimizer import optimizer_for
from align.engine.sharding import gathered_parameters
from align.engine.torch_engine import Engine
from align.errors import UserError
from align.models.save import skeleton
from reward_models.heads import hf_model


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
            use_float32_attention(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adamw = optimizer_for(trained, recipe, learning_rate) if learning_rate is not None else None
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=self.adamw, config=config)
        self.module = self.engine.module
        self.engine.train(learning_rate is not None and recipe.gradient_checkpointing)

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[nn.Module]:
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
                with gathered_parameters([parameter]):
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
