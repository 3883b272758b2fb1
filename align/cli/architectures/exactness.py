"""Log-probabilities, scores and values of model folders, as the stages compute them, against plain transformers.

The reference is transformers' own forward pass of each row alone, without padding and without a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align.cli.architectures.cases import random_prompts
from align.cli.architectures.sft_loss import sft_losses
from align.compat.transformers import has_sequence_classifier
from align.data.collate import pad_left, pad_right
from align.data.end_tokens import end_ids, set_model_ends
from align.errors import UserError
from align.generation.ending import Ending
from align.generation.generate import generate
from align.generation.sampling import uniforms
from align.models.context_length import max_positions
from align.models.forward import label_loss, response_logprobs, response_loss, response_values
from align.models.load import load_policy
from align.models.packing import example_rows, packing_gap
from align.ppo.ppo_run import Models
from reward_models.heads import score_sequences
from reward_models.load import load_reward_model
from reward_models.responses import Responses

PROMPTS = (5, 11, 2, 8)  # tokens of each
RESPONSE = 16
TEMPERATURE = 0.7
PACKED = (200, 9, 1, 12)  # tokens of the packed examples
MIN_POSITIONS = 16


@dataclass(frozen=True, slots=True)
class Rows:
    """Prompts with sampled responses of different lengths, in ids.

    Attributes:
        logprobs: of each response's tokens, as sampling gave them, nats at TEMPERATURE.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    logprobs: list[Tensor]

    @property
    def whole(self) -> list[list[int]]:
        return [prompt + response for prompt, response in zip(self.prompts, self.responses, strict=True)]

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [B, S] and mask [B, S] as in a rollout, padded on both sides; the mask of the responses [B, T]."""
        left, left_mask = pad_left(self.prompts, 0)
        right, right_mask = pad_right(self.responses, 0)
        return torch.cat([left, right], dim=1), torch.cat([left_mask, right_mask], dim=1), right_mask


def response_room(config: PretrainedConfig, most: int = RESPONSE) -> int:
    """Tokens of a response, at most `most`, for which the model has positions after the longest of PROMPTS.

    Raises:
        UserError: it has too few positions.
    """
    positions = max_positions(config)
    if positions is not None and positions < MIN_POSITIONS:
        raise UserError(f"the model reads {positions} tokens; examining it takes at least {MIN_POSITIONS}.")
    return min(most, (positions or most + max(PROMPTS)) - max(PROMPTS))


def packed_lengths(config: PretrainedConfig) -> tuple[int, ...]:
    """Tokens of the packed examples; all together no more than the model reads, as GPT-Neo's mask ends there."""
    positions = max_positions(config) or sum(PACKED)
    return PACKED if positions >= sum(PACKED) else (positions - 8, 5, 1, 2)


def sample_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Responses of `model`. The third token of the first one is taken for EOS, so that some row ends early for sure."""
    prompts = random_prompts(min(len(tokenizer), _vocabulary(model)), PROMPTS)
    ids, mask = pad_left(prompts, 0)
    noise = uniforms(0, "architectures", range(len(prompts)), response_room(model.config))
    free, _, _ = generate(model, ids, mask, noise, TEMPERATURE, Ending(tokenizer))
    early = copy.copy(tokenizer)
    set_model_ends(early, [*end_ids(tokenizer), int(free[0, :3][-1])])
    found, real, logprobs = generate(model, ids, mask, noise, TEMPERATURE, Ending(early))
    responses = [row[kept].tolist() for row, kept in zip(found, real, strict=True)]
    return Rows(prompts, responses, [row[kept] for row, kept in zip(logprobs, real, strict=True)])


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


@torch.no_grad()
def measure_policy(folder: str, tokenizer: PreTrainedTokenizerBase, packs: bool) -> tuple[Rows, dict[str, float], int]:
    """Rows sampled from the language model in `folder`, and the largest gaps of its log-probabilities, in nats.

    Returns:
        the rows; `sampling` with a cache, of rows that end early; `training`, the forward passes of PPO, with and without a
        gradient; `padded`, all tokens of right-padded rows, as in PPO-ptx; `loss`, the mean that SFT's trainer computes;
        `packed`, all tokens, if the model `packs`. And the model's number of parameters.
    """
    model = load_policy(folder).eval()
    rows = sample_rows(model, tokenizer)
    ids, mask, real = rows.batch()
    length = real.shape[1]
    gaps = {}
    scored = {"sampling": torch.cat(rows.logprobs)}
    model.train()  # as in training; nothing is dropped out
    scored["training"] = response_logprobs(model, ids, mask, length, TEMPERATURE)[real]
    with torch.enable_grad():
        _, scored["gradient"], _ = response_loss(model, ids, mask, length, TEMPERATURE, lambda lp, _, __: -lp.sum())
        padded, inside = pad_right(rows.whole, 0)
        _, labelled = label_loss(model, padded, padded.masked_fill(~inside, -100), 1.0)
    batch = model(input_ids=padded, attention_mask=inside.long(), use_cache=False).logits.float().log_softmax(dim=-1)
    if packs:
        gaps["packed"] = packing_gap(model, example_rows(packed_lengths(model.config), _vocabulary(model)))
    parameters = sum(weight.numel() for weight in model.parameters())
    trained = sft_losses(model, tokenizer, rows.prompts, rows.responses, packs)
    del model

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = [plain(input_ids=torch.tensor([row])).logits[0].float() for row in rows.whole]
    expected = torch.cat(
        [
            _chosen(each / TEMPERATURE, row)[-len(response) :]
            for each, row, response in zip(logits, rows.whole, rows.responses, strict=True)
        ]
    )
    alone = torch.cat([_chosen(each, row) for each, row in zip(logits, rows.whole, strict=True)])
    for name, found in scored.items():
        name = "training" if name == "gradient" else name
        gaps[name] = max(gaps.get(name, 0.0), _gap(found, expected))
    masked = torch.cat([_chosen(each, row) for each, row in zip(batch, rows.whole, strict=True)])
    gaps["padded"] = max(_gap(labelled, alone), _gap(masked, alone))
    responses = [
        _chosen(each, row)[-len(response) :]
        for each, row, response in zip(logits, rows.whole, rows.responses, strict=True)
    ]
    mean = -float(torch.cat(responses).mean())
    gaps["loss"] = max(abs(loss - mean) for loss in trained)
    return rows, gaps, parameters


def _chosen(logits: Tensor, row: Sequence[int]) -> Tensor:
    """Log-probabilities of a row's tokens but the first, [S - 1], from its logits [S or more, V]."""
    return logits[: len(row) - 1].log_softmax(dim=-1).gather(1, torch.tensor(row[1:])[:, None]).squeeze(1)


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().max())


@torch.no_grad()
def measure_scores(models: Models, reward_folder: str, rows: Rows) -> dict[str, float]:
    """Largest gaps of a PPO run's reward and value model, in units of the score.

    Args:
        models: of a run whose value model starts from the reward model in `reward_folder`.

    Returns:
        `scores` of padded rows; `values` before the last token of each row, which are the scores of what is before it,
        where the value model starts with the reward model's head.
    """
    score = plain_score(reward_folder)
    texts = [""] * len(rows.prompts)
    batch = Responses([*texts], texts, [*texts], prompt_ids=rows.prompts, response_ids=rows.responses)
    gaps = {"scores": _gap(models.rewards.sources[0].score(batch), torch.tensor([score(row) for row in rows.whole]))}
    if models.value is not None and models.values_are_scores:
        ids, mask, real = rows.batch()
        values = response_values(models.value.module, ids, mask, real.shape[1])
        last = values[torch.arange(len(ids)), real.sum(dim=1) - 1]
        gaps["values"] = _gap(last, torch.tensor([score(row[:-1]) for row in rows.whole]))
    return gaps


def plain_score(folder: str) -> Callable[[list[int]], float]:
    """The score of one row of ids, by transformers' own class where it has one for this architecture."""
    if has_sequence_classifier(AutoConfig.from_pretrained(folder)):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        mean = model.config.score_mean
        return lambda row: float(model(input_ids=torch.tensor([row])).logits[0, 0]) - mean
    model = load_reward_model(folder)
    return lambda row: float(score_sequences(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)))
