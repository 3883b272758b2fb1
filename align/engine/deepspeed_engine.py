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
from align.engine.cpu import return_freed_memory
from align.engine.deepspeed_config import FLOAT32_SUMS, deepspeed_config, deepspeed_file, zero_stage
from align.engine.distributed import World
from align.engine.mixed_precision import accumulate_in_float32, use_float32_attention
from align.engine.optimizer import make_optimizer, set_learning_rate
from align.engine.sharding import evaluation_mode, gathered_parameters, gathered_state_dict, save_from_main
from align.engine.state import counters, load_state, restore_counters, save_state
from align.models.save import meta_copy
from reward_models.heads import hf_model


class DeepSpeedEngine:
    """One model over all ranks by DeepSpeed ZeRO. Under stage 3 each of N ranks holds 1/N of it, also when frozen.

    Args:
        recipe: gives precision, gradient checkpointing, the optimizer and the DeepSpeed file of `role`.
        learning_rate: None freezes the model.
        role: "policy", "value", "reference" or "reward".
        accumulation: microbatches per optimizer step, if `begin_step` does not say otherwise; above 1 if any step has more.
    """

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
        self.stage = zero_stage(recipe, role)
        self.accumulation = accumulation
        self.passes_left = accumulation  # calls of `backward` before the next step
        self.pending = False  # whether there are gradients since the last step
        config = deepspeed_config(
            deepspeed_file(recipe, role),
            processes=world.size,
            accumulation=accumulation,
            max_grad_norm=recipe.max_grad_norm,
            bf16=recipe.bf16,
            hidden_size=getattr(hf_model(model).config.get_text_config(), "hidden_size", 0),
        )
        if learning_rate is None:
            model.requires_grad_(False)
            if self.stage < 3:  # nothing to shard: gradients and optimizer states do not exist
                config["zero_optimization"] = {"stage": 0}
        elif recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if recipe.bf16 and world.device.type == "cpu":
            use_float32_attention(model)
        self.inner_optimizer = None
        if learning_rate is not None:
            if recipe.bf16 and self.stage < FLOAT32_SUMS and accumulation > 1:
                accumulate_in_float32(model)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.inner_optimizer = make_optimizer(trained, recipe, learning_rate)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=self.inner_optimizer, config=config
        )
        self.module = self.engine.module
        self.engine.train(learning_rate is not None and recipe.gradient_checkpointing)
        return_freed_memory()

    def __call__(self, **inputs: Any) -> Any:
        return self.engine(**inputs)

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[nn.Module]:
        if self.stage < 3:
            with evaluation_mode(self.module) as module:
                yield module
            return
        copy = self._unsharded_copy()
        yield copy
        del copy

    def _unsharded_copy(self) -> nn.Module:
        """An unsharded copy for one rollout: ranks then generate at their own pace, and freeing it frees the memory."""
        copy: nn.Module = (
            meta_copy(self.module).to(next(self.module.parameters()).dtype).to_empty(device=self.world.device)
        )
        hf_model(copy).tie_weights()  # `to_empty` unties them
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

    def begin_step(self, passes: int) -> None:
        self.passes_left = passes

    def backward(self, loss: Tensor) -> None:
        self.passes_left -= 1
        self.engine.set_gradient_accumulation_boundary(self.passes_left == 0)  # where DeepSpeed sums over ranks
        # DeepSpeed divides by the accumulation steps and averages over ranks; our shares are to be added.
        self.engine.backward(loss * (self.world.size * self.accumulation))
        self.pending = True
        if self.passes_left:
            self.engine.step()  # before the last microbatch it only counts
        else:
            self.passes_left = self.accumulation

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.optimizer, learning_rate)
        gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients) if gradients else None  # ZeRO 0 in float32, which reports none
        self.engine.step()
        self.pending = False
        return float(norm if norm is not None else self.engine.get_global_grad_norm())

    def discard(self) -> None:
        # DeepSpeed keeps gradients in buffers of its own, which only a step clears: take one that changes no weight.
        if not self.pending:  # the policy while only the value model trains; a step would be counted as a microbatch
            return
        inner: Any = self.inner_optimizer
        step = inner.step
        inner.step = lambda *_, **__: None
        try:
            self.engine.step()
        finally:
            inner.step = step
        self.pending = False

    def state_dict(self) -> dict[str, Tensor]:
        return gathered_state_dict(self.module, self.world)

    def save_pretrained(self, folder: Path) -> None:
        save_from_main(self.module, self.state_dict(), folder, self.world)

    def save_checkpoint(self, folder: Path) -> dict[str, list[int]]:
        return save_state(folder, self.module, self.optimizer, self.world, counters(self.engine))

    def load_checkpoint(self, folder: Path) -> None:
        restore_counters(self.engine, load_state(folder, self.module, self.optimizer))
