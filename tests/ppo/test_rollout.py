"""The record of a rollout: what is cut, padded and gathered follows from what a field is declared to have entries for."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from align.config.load import load_recipe
from align.config.ppo import PPORecipe
from align.engine.distributed import World
from align.maths import advantages as estimators
from align.maths.estimators import ESTIMATORS, Estimator
from align.ppo.ppo_run import PPORun, Progress
from align.ppo.rollout import PROMPT_TOKEN, RESPONSE_TOKEN, ROW, Rollout, gather_rollout, per
from align.ppo.self_checks import check_endings
from align.ppo.step import estimate_advantages
from tests.ppo.runs import ppo_run, rollout_of
from tests.ppo.test_train import make_recipe
from tests.worlds import letter_ids

PAD = 9


@dataclass(slots=True)
class Extended(Rollout):
    """A rollout with a new field of each kind."""

    speakers: Tensor = per(PROMPT_TOKEN)
    surprise: Tensor = per(RESPONSE_TOKEN)
    topics: Tensor = per(ROW)


def rollout(prompts: list[int], responses: list[int], cls: type[Rollout] = Rollout, **more: Any) -> Any:
    """Rows with so many prompt and response tokens; every number tells its row (tens) and token (ones)."""
    rows, width, length = len(prompts), max(prompts), max(responses)
    number = torch.arange(rows)[:, None] * 10.0
    prompt = torch.stack([torch.arange(width) >= width - n for n in prompts])
    mask = torch.stack([torch.arange(length) < n for n in responses])
    per_token = number + torch.arange(length)
    return cls(
        prompt_ids=(number + torch.arange(width)).long(), prompt_mask=prompt, response_ids=per_token.long(), mask=mask,
        ended=mask[:, 0], sampled_logprobs=per_token, old_logprobs=per_token, ref_logprobs=per_token, values=per_token,
        scores=number[:, 0], token_scores=per_token, source_scores=number.expand(-1, 2), repetition=number[:, 0], **more,
    )  # fmt: skip


def extended() -> Extended:
    number = torch.arange(3)[:, None] * 10.0
    return rollout(
        [4, 1, 2], [1, 5, 3], Extended, speakers=number + torch.arange(4), surprise=number + torch.arange(5),
        topics=torch.arange(12).view(3, 2, 2),
    )  # fmt: skip


def test_rows_are_cut_to_what_they_need_in_new_fields_too():
    picked = extended().rows(torch.tensor([2, 1]))
    assert isinstance(picked, Extended)
    assert picked.prompt_ids.tolist() == [[22, 23], [12, 13]]
    assert picked.speakers.tolist() == [[22.0, 23.0], [12.0, 13.0]]
    assert picked.mask.shape == picked.surprise.shape == (2, 5)
    assert extended().rows(torch.tensor([2])).surprise.tolist() == [[20.0, 21.0, 22.0]]
    assert picked.topics.tolist() == [[[8, 9], [10, 11]], [[4, 5], [6, 7]]]
    assert picked.source_scores.tolist() == [[20.0, 20.0], [10.0, 10.0]]


@pytest.mark.parametrize("name", [field.name for field in fields(Extended)])
def test_a_field_of_another_shape_is_refused(name):
    """Each field once one column too wide, and once a row short."""
    good = extended()
    tensor = getattr(good, name)
    with pytest.raises(ValueError, match="expected an entry for each"):
        replace(good, **{name: tensor[:2]})
    if Extended.axes()[name] != ROW:
        with pytest.raises(ValueError, match="expected an entry for each"):
            replace(good, **{name: torch.cat([tensor, tensor[:, :1]], dim=1)})


class OtherRank(World):
    """Rank 0 of two, whose other rank has a rollout of another width."""

    def max(self, tensor: Tensor) -> Tensor:
        return torch.maximum(tensor, torch.tensor([6, 7]))

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor])


def test_gathered_rows_are_padded_to_the_widest_rank_in_new_fields_too():
    both = gather_rollout(extended(), OtherRank(0, 2, torch.device("cpu")), PAD)
    assert both.prompt_ids[0].tolist() == [PAD, PAD, 0, 1, 2, 3]
    assert both.response_ids[4].tolist() == [10, 11, 12, 13, 14, PAD, PAD]
    assert both.speakers[1].tolist() == [0.0, 0.0, 10.0, 11.0, 12.0, 13.0]
    assert both.surprise[2].tolist() == [20.0, 21.0, 22.0, 23.0, 24.0, 0.0, 0.0]
    assert both.topics.shape == (6, 2, 2)
    assert both.prompt_mask.sum().item() == 2 * 7
    assert both.mask.sum().item() == 2 * 9


class TestANewEstimator:
    """One function in `align.maths.advantages` and one line in `align.maths.estimators`."""

    def test_recipes_take_the_names_of_the_table(self):
        assert get_args(get_type_hints(PPORecipe)["advantage_estimator"]) == tuple(ESTIMATORS)

    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_each_line_has_a_function(self, name):
        assert callable(getattr(estimators, name))

    def test_the_step_takes_it_from_there(self, monkeypatch):
        monkeypatch.setitem(ESTIMATORS, "halves", Estimator())
        monkeypatch.setattr(estimators, "halves", lambda rewards, mask, k, gamma: rewards * k * gamma, raising=False)
        recipe = PPORecipe(
            output_dir="out", sft_model_path="sft", advantage_estimator="halves", num_generations=3, gamma=0.5
        )
        run = PPORun(recipe, *[None] * 6, learning_rates=[], progress=Progress(0.0))
        advantages, returns = estimate_advantages(run, rollout([1], [2]), torch.tensor([[2.0, 4.0]]))
        assert advantages.tolist() == [[3.0, 6.0]]
        assert returns.tolist() == [[0.0, 0.0]]


def test_every_end_token_and_stop_string_ends_a_response(tmp_path):
    """The letter a is one of the model's end tokens, so that no text has it, and the reward, which counts it, is 0."""
    path = make_recipe(tmp_path, stop_strings=["n"], missing_eos_penalty=0.25)
    config = tmp_path / "policy" / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [3, 2]}))
    run = ppo_run(load_recipe("ppo", path))
    rollout, (n,) = rollout_of(run), letter_ids("n")
    lasts = []
    for ids, real, ended in zip(rollout.response_ids, rollout.mask, rollout.ended, strict=True):
        *before, last = ids[real].tolist()
        assert not {2, 3, n} & {*before}
        assert ended == (last in (2, 3, n))
        assert ended or len(before) == 7
        lasts.append(last)
    assert {3, n} < {*lasts}, "both kinds of ends are seen, and responses without one"
    assert rollout.scores.tolist() == (-0.25 * (~rollout.ended).float()).tolist()
    seen = check_endings(run, rollout).found
    assert seen.startswith(f"EOS rate {sum(rollout.ended.tolist()) / 16:.3g} (")
    assert f"{lasts.count(3)} ended with a (3)" in seen
    assert f"{lasts.count(n)} with a stop string" in seen
