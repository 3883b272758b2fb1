"""Run by test_emulated.py in a process of its own: stages on the emulated device, and what they asked of it."""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from align.config.load import load_recipe
from align.data.collate import pad_left
from align.engine.distributed import World
from align.engine.sharding import load_device
from align.engine.timer import Clock
from align.generation.captured import Captured, Step
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.sampling import uniforms
from align.models.in_place_gradients import add_in_pieces
from align.models.load import load_policy
from tests.emulated.device import COUNTS, emulated_device
from tests.emulated.graph import EmulatedGraph
from tests.worlds import letter_tokenizer, tiny_llama

LAYERS = (2, 4)  # the difference of two models is what layers cost


def measure(recipes: dict[str, str], found: str) -> None:
    """Write what was counted and computed to the JSON file `found`, and tensors beside it."""
    results: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    with emulated_device() as device:
        results["mixed"] = refusal(device)
        results["loaded"] = loaded(device, next(iter(recipes.values())))
        results["decoding"] = {str(layers): decoding(device, layers, samples) for layers in LAYERS}
        results["refilled"] = refilled(device, samples)
        results["captured"] = captured(device, samples)
        results["bfloat16_sum"] = bfloat16_sum(device)
        results |= {stage: whole_run(stage, recipe, device) for stage, recipe in recipes.items()}
    torch.save(samples, Path(found).with_suffix(".pt"))
    Path(found).write_text(json.dumps(results))


def refusal(device: torch.device) -> str:
    try:
        torch.ones(3, device=device) + torch.ones(3)
    except RuntimeError as error:
        return str(error)
    return ""


def loaded(device: torch.device, recipe: str) -> dict[str, int]:
    """Weights on each device of a policy that has just been loaded, in bytes."""
    path = str(load_recipe("ppo", recipe).sft_model_path)
    weights = [*load_policy(path, device=load_device(World(0, 1, device))).parameters()]
    found = {str(each.device): 0 for each in weights}
    for each in weights:
        found[str(each.device)] += each.numel() * each.element_size()
    return found


def rollout(
    layers: int,
    device: torch.device,
    batch_size: int = 12,
    called: Callable[..., Any] = lambda *_: None,
    capture: Callable[[Step], Step] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Responses of up to 33 tokens to 12 prompts of several lengths, some of which end early."""
    model, tokenizer = tiny_llama(spread=0.3, layers=layers).to(device), letter_tokenizer()
    ids, mask = (each.to(device) for each in pad_left([[1, 5 + i, 6, 7][: 2 + i % 3] for i in range(12)], 0))
    noise = uniforms(5, "test", range(12), 33).to(device)
    model.register_forward_hook(called)
    COUNTS.clear()
    return generate(model, ids, mask, noise, 1.0, Ending(tokenizer), batch_size=batch_size, capture=capture)


def refilled(device: torch.device, samples: dict[str, Any]) -> dict[str, int]:
    """Counts of a rollout by a batch of a third of its rows; its responses go to `samples`."""
    passes: list[Any] = []
    responses = rollout(2, device, 4, lambda *_: passes.append(1))
    counts = COUNTS.taken()
    samples["refilled"] = [each.cpu() for each in responses]
    return {"passes": len(passes), **counts}


def captured(device: torch.device, samples: dict[str, Any]) -> dict[str, Any]:
    """Counts of a rollout outside captured steps, of the captures, and of replays."""
    Captured.works = True  # no comparison with a step that is not captured
    counts = {name: Counter[str](operations=0, synchronizations=0, calls=0) for name in ("captures", "replays")}

    def counted(name: str, call: Callable[[], Any]) -> Any:
        before = COUNTS.taken()
        result = call()
        counts[name].update({what: value - before[what] for what, value in COUNTS.taken().items()}, calls=1)
        return result

    def capture(step: Step) -> Step:
        graph = counted("captures", lambda: EmulatedGraph(step))
        return lambda: counted("replays", graph)

    responses = rollout(2, device, capture=capture)
    everything = COUNTS.taken()
    samples["captured"] = [each.cpu() for each in responses]
    outside = {what: value - sum(each[what] for each in counts.values()) for what, value in everything.items()}
    return {"outside": outside, **counts}


def decoding(device: torch.device, layers: int, samples: dict[str, Any]) -> dict[str, float]:
    """Counts of a rollout for each step; its responses go to `samples`."""
    responses = rollout(layers, device)
    counts = COUNTS.taken()
    samples[str(layers)] = [each.cpu() for each in responses]
    steps = responses[0].shape[1]
    return {"steps": steps, **{name: value / steps for name, value in counts.items()}}


def bfloat16_sum(device: torch.device) -> dict[str, int]:
    """Counts of adding a bfloat16 gradient to a float32 one."""
    total, part = torch.zeros(1024, 1024, device=device), torch.ones(1024, 1024, dtype=torch.bfloat16, device=device)
    COUNTS.clear()
    add_in_pieces(total, part)
    return COUNTS.taken()


def whole_run(stage: str, recipe: str, device: torch.device) -> dict[str, Any]:
    """Counts of a stage by phase, and of its waits by place."""
    clock = Clock(device)
    COUNTS.clear(lambda: clock.running[-1] if clock.running else "")
    module = importlib.import_module(f"align.{stage}.train")
    for state in (PartialState, AcceleratorState):  # of the stage before
        state._reset_state()
    with (
        mock.patch.object(module, "connect", return_value=World(0, 1, device, clock)),
        mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": str(device)}),
    ):
        module.run(load_recipe(stage, recipe))
    return {"all": COUNTS.taken(), "phases": COUNTS.phases, "places": COUNTS.waits.most_common(40)}
