"""A Trainer's checkpoints in safetensors and JSON only, without pickles.

`checkpoint-N/` is a Hugging Face folder of the model at step N, and beside it

    state/                 weights, optimizer and schedule, of each rank a file (`align.engine.state`)
    random/R-of-S.json     the random generators of rank R of S, and what it has summed since the last log
    trainer_state.json     steps, logs, the best checkpoint and the callbacks, as transformers writes it
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, set_seed

from align.compat.transformers import write_unchecked
from align.config.json_file import read_json
from align.engine.deepspeed_config import FLOAT32_SUMS
from align.engine.distributed import World
from align.engine.mixed_precision import accumulate_in_float32
from align.engine.optimizer import optimizer_class
from align.engine.state import counters, load_state, restore_counters, save_state
from align.errors import BadFile, UserError
from align.models.tokenizer import saved_pad_id
from align.runs.checkpoint import find_corruption, synced_sums
from align.runs.files import fingerprint, write_text
from align.runs.records import COUNT, LIST, MAPPING, Record, or_null, read_record
from align.trainer.arguments import parse_optim_args
from align.trainer.unlogged import restore_unlogged, unlogged
from reward_models.heads import hf_model

STATE, RANDOM = "state", "random"
TRAINER_STATE = Record(
    {"global_step": COUNT, "log_history": LIST, "best_global_step": or_null(COUNT), "stateful_callbacks": MAPPING}
)


class SafeCheckpoints(Trainer):
    """A mixin that keeps all state of a Trainer in safetensors and JSON, where transformers pickles it.

    A checkpoint can be resumed from by another number of ranks, or at another ZeRO stage. The random generators (those
    of dropout and NEFTune) go on where they were if there are as many ranks, and start anew from seed, step and rank
    otherwise.
    """

    model: nn.Module
    lr_scheduler: Any

    def own_sums(self, checkpoint: Path) -> dict[str, list[int]]:
        """Size and CRC-32 of each file that this rank has written to a checkpoint, by its path there, once on the disk."""
        rest = synced_sums(checkpoint, apart=(STATE, RANDOM)) if self.args.should_save else {}
        return {**rest, **self._sums}

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Class and arguments of the optimizer, the same as in an engine."""
        betas = (args.adam_beta1, args.adam_beta2)
        cls, arguments = optimizer_class(args.optim.value, betas, args.adam_epsilon, parse_optim_args(args.optim_args))
        return cls, {"lr": args.learning_rate, **arguments}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        # DeepSpeed drops a group without parameters, such as the biases of an adapter; layouts must have the same groups.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def __init__(self, *args: Any, **kwargs: Any):
        model = hf_model(kwargs["model"])
        self.settings = copy.deepcopy(model.config)  # before a Trainer changes it
        self.generation_pad = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
        super().__init__(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._own_settings():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            (folder / "training_args.bin").unlink()  # a pickle; the manifest holds the same
            if isinstance(self.model, PeftModel):
                (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; the stage writes its own

    @contextlib.contextmanager
    def _own_settings(self) -> Iterator[None]:
        """Inside, the model has the configuration that it was loaded with, and the ids of the tokenizer's tokens.

        Trainers switch its cache off and its router's logits on, which is not for those who load what is saved. What its
        generation config says beside those ids is kept, whatever it is.
        """
        model = hf_model(self.model)
        training, own = model.config, copy.deepcopy(self.settings)
        for name in ("bos_token_id", "eos_token_id"):
            if hasattr(training.get_text_config(), name):
                setattr(own.get_text_config(), name, getattr(training.get_text_config(), name))
        tokenizer: Any = self.processing_class
        pad = saved_pad_id(own, tokenizer)
        own.get_text_config().pad_token_id = pad
        model.config = own
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.pad_token_id = pad if pad == tokenizer.pad_token_id else self.generation_pad
            write_unchecked(model.generation_config)
        try:
            yield
        finally:
            model.config = training

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        note = {"schedule": self.lr_scheduler.state_dict()}
        if self.is_deepspeed_enabled:
            note["counters"] = counters(self.model_wrapped)
        sums = save_state(Path(output_dir) / STATE, self.model, self._optimizer(), self.world(), note)
        self._sums = {f"{STATE}/{name}": size_and_sum for name, size_and_sum in sums.items()}

    def _save_rng_state(self, output_dir: str) -> None:
        path = self._generators_file(output_dir)
        write_generators(path, unlogged=unlogged(self))
        self._sums[f"{RANDOM}/{path.name}"] = fingerprint(path)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        progress: tuple[int, int] = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # the intervals of this recipe, not of the checkpoint's
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
            self._check_best(best)
            self.state.best_model_checkpoint = str(best)  # the recorded path is that of another start
        return progress

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # Without the checkpoint, which transformers, or DeepSpeed for it, would unpickle.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        if resume_from_checkpoint is not None:
            self._load_state(resume_from_checkpoint)
        engine: Any = self.model_wrapped
        if self.is_deepspeed_enabled and engine.zero_optimization_stage() < FLOAT32_SUMS:
            accumulate_in_float32(self.model)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing: `_prepare_for_training` loads the weights with the rest of the state."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = self._generators_file(checkpoint)
        if file.is_file():
            read_generators(file)
        else:  # written by another number of ranks
            place = [self.args.seed, self.state.global_step, self.args.process_index]
            set_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        restore_unlogged(self, [file] if file.is_file() else sorted(file.parent.glob("*.json")))

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        self._check_best(Path(best))
        self._load_state(best)

    def _check_best(self, best: Path) -> None:
        """Check that the best checkpoint is as it was written. Every rank must call it.

        Raises:
            UserError: it is not.
        """
        world = self.world()
        wrong = find_corruption(best) if world.is_main else None
        if world.any_rank(wrong is not None):
            raise UserError(
                f"{best}: damaged{f', {wrong}' * bool(wrong)}; it is the best checkpoint so far, which "
                f"`load_best_model_at_end` needs. Put it back, or delete {best.parent} to start over."
            )

    def _load_state(self, checkpoint: str) -> None:
        note = load_state(Path(checkpoint) / STATE, self.model, self._optimizer())
        self.lr_scheduler.load_state_dict(note["schedule"])
        if self.is_deepspeed_enabled:
            restore_counters(self.model_wrapped, note.get("counters"))

    def _optimizer(self) -> Any:
        """Torch's or DeepSpeed's, without accelerate's wrapper."""
        wrapped: Any = self.optimizer
        return wrapped.optimizer

    def world(self) -> World:
        return World(self.args.process_index, self.args.world_size, self.args.device)

    def _generators_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / RANDOM / f"{self.args.process_index}-of-{self.args.world_size}.json"


def check_trainer_state(checkpoint: Path) -> None:
    """Check `trainer_state.json` of a checkpoint, before transformers reads it.

    Raises:
        UserError: it is not one of this step.
    """
    path = checkpoint / "trainer_state.json"
    step = read_record(path, TRAINER_STATE)["global_step"]
    if checkpoint.name != f"checkpoint-{step}":
        raise BadFile(f"{path}: global_step: expected that of {checkpoint.name}, got {step}")


def write_generators(path: Path, **more: Any) -> None:
    """Write the state of this process's random generators: Python's, numpy's and torch's, on its GPU too; and `more`."""
    version, words, gauss = random.getstate()
    algorithm, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [algorithm, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    write_text(path, json.dumps(state | more))


def read_generators(path: Path) -> None:
    """Restore what `write_generators` wrote.

    Raises:
        UserError: the file holds something else.
    """
    state = read_json(path, follow_links=False)
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise BadFile(f"{path}: expected the state of random generators ({type(error).__name__}: {error})") from error
