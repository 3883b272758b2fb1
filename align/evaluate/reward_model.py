"""Check the reward models that a recipe names, before weights are loaded, and load them as sources of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.config.base import StageRecipe
from align.config.ensemble import MEMBER, ensemble_members, models_by_place
from align.config.recipe import Recipe
from align.data.encode import encode_pair
from align.data.reasoning import set_scores_reasoning
from align.data.rows import Tools, Turns, as_response
from align.engine.build import frozen_engine
from align.engine.distributed import World
from align.engine.sharding import load_device, sharded_load
from align.errors import UserError
from align.models.check_files import check_files
from align.models.check_weights import check_finite
from align.models.context_length import max_positions
from align.models.encoder_decoder import check_classifier_exists
from align.models.load import adapter_base, load_config
from align.models.model_types import is_encoder, is_encoder_decoder
from align.models.scalar_head import find_head
from align.models.tokenizer import load_tokenizer
from align.runs.manifest import check_same_tokenizer, check_template_kwargs, read_manifest, tokenizer_digest
from reward_models.bottleneck import bottleneck_settings
from reward_models.ensemble import RewardEnsemble
from reward_models.linear_head import SequenceClassifier
from reward_models.load import load_reward_model
from reward_models.responses import RewardSource
from reward_models.stored_head import StoredHead
from reward_models.trained import ModelReward


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model that fits the policy, not yet loaded."""

    path: str
    key: str  # of the recipe
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    same_tokenizer: bool  # it reads the policy's ids as they are
    head: StoredHead
    adapter: str | None = None  # folder of that with which it scores on the policy's frozen weights
    apart: str | None = None  # why it has weights of its own although it has an adapter


def check_reward_models(
    recipe: Any, score_reasoning: bool, tokenizer: PreTrainedTokenizerBase | None
) -> list[RewardModel]:
    """`check_reward_model` of each that `reward_model_path` lists, members of folders included.

    Raises:
        UserError: as for `check_reward_model`; or members of an ensemble's folder are missing, or others were added.
    """
    for path in recipe.reward_model_path:
        ensemble = read_manifest(path)
        there = [Path(each).name for each in ensemble_members(path)]
        if ensemble is not None and there != [Path(path).name]:
            trained = [f"{MEMBER}{number}" for number in range(1, ensemble["recipe"].get("ensemble_size", 1) + 1)]
            if there != trained:
                raise UserError(
                    f"reward_model_path: {path} holds {', '.join(there)}, and {', '.join(trained)} were trained there; restore "
                    "what is missing, or list the folders of the members that you mean."
                )
    return [
        check_reward_model(path, place, recipe, score_reasoning, tokenizer)
        for place, path in models_by_place("reward_model_path", recipe.reward_model_path).items()
    ]


def check_reward_model(
    path: str,
    key: str,
    recipe: Recipe,
    score_reasoning: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> RewardModel:
    """Read a reward model's configuration, tokenizer and manifest, and check that they fit the recipe and the policy.

    Args:
        key: of the recipe, which names the model.
        tokenizer: the policy's; None where there is no policy whose ids it could read.

    Raises:
        UserError: it is no finished reward model, or tokenizers, templates or `score_reasoning` disagree.
    """
    config = load_config(path, key, recipe.trust_remote_code, encoder_decoder=True)
    check_classifier_exists(config, key, path)
    manifest = read_manifest(path)
    if manifest is not None and manifest["stage"] not in ("reward", "classify"):
        raise UserError(f"{key}: {path} is the output of the {manifest['stage']} stage, not of reward.")
    head = _find_head(path, key, config, recipe.trust_remote_code)
    kwargs = {} if is_encoder(config) else recipe.chat_template_kwargs  # an encoder reads plain text
    own = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, kwargs)
    check_files(
        SequenceClassifier,
        path,
        key,
        config,
        own,
        new_head=True,  # the head has been found
        attn_implementation=recipe.attn_implementation,
    )
    check_template_kwargs(path, kwargs, key)
    set_scores_reasoning(own, score_reasoning)
    trained_with = {} if manifest is None else manifest["recipe"]
    if trained_with.get("score_reasoning", score_reasoning) != score_reasoning:
        raise UserError(
            f"score_reasoning: {path} ({key}) was trained with {str(not score_reasoning).lower()}, and this recipe gives "
            f"{str(score_reasoning).lower()}; give the same in both stages."
        )
    if tokenizer is None:
        return RewardModel(path, key, config, own, False, head)
    theirs, mine = tokenizer_digest(own), tokenizer_digest(tokenizer)
    # An encoder-decoder is read at a token that ends the row, which a response that was cut off has not.
    rereads = is_encoder(config) or is_encoder_decoder(config)
    same = theirs["vocabulary"] == mine["vocabulary"] and not rereads
    if same:
        check_same_tokenizer(theirs, mine, key, path)
    return RewardModel(path, key, config, own, same, head)


def _find_head(path: str, key: str, config: PretrainedConfig, trust_remote_code: bool) -> StoredHead:
    if (base := adapter_base(path)) is not None and bottleneck_settings(path) is None:
        raise UserError(
            f"{key}: {path} is an adapter of {base}; merge it by `align merge {path} FOLDER`, and name FOLDER."
        )
    remedy = "Name a reward model: the output of the reward stage."
    head = find_head(path, config, SequenceClassifier, key, remedy, trust_remote_code)
    held = (config.architectures or ["no architecture"])[0]
    if head is None or held.endswith("ForTokenClassification"):
        raise UserError(f"{key}: {path} has no scalar head (it holds a {held}); run the reward stage on it first.")
    return head


def load_reward(
    name: str, given: RewardModel, recipe: StageRecipe, world: World, model: PeftModel | None = None
) -> ModelReward:
    """Load the weights, as a source of scores called `name`, frozen and in the precision of frozen weights.

    Args:
        model: one on weights that another engine holds, from `reward_model_on`.

    Raises:
        UserError: they cannot be used.
    """
    if model is None:
        with sharded_load(recipe, "reward"):
            model = _load(given, recipe, world)
    return _source(name, given, frozen_engine(model, recipe, world, "reward").module, recipe)


def load_whole_reward(name: str, given: RewardModel, recipe: Recipe, world: World) -> ModelReward:
    """`load_reward` for a stage that has no DeepSpeed files: every process holds the whole model.

    Raises:
        UserError: the weights cannot be used.
    """
    return _source(name, given, _load(given, recipe, world).to(world.device).eval(), recipe)


def model_sources(
    name: str, given: Sequence[RewardModel], load: Callable[[str, RewardModel], ModelReward], method: str, coef: float
) -> list[RewardSource]:
    """No source, one reward model called `name`, or an ensemble of that name whose members have numbers from 1.

    Args:
        load: loads a member, by its name.
        method, coef: `reward_ensemble` and `reward_variance_coef`.

    Raises:
        UserError: weights cannot be used.
    """
    if len(given) < 2:
        return [load(name, model) for model in given]
    members = [load(f"{name}_{number}", model) for number, model in enumerate(given, start=1)]
    return [RewardEnsemble(name, members, method, coef)]


def _load(given: RewardModel, recipe: Recipe, world: World) -> Any:
    try:
        model = load_reward_model(
            given.path,
            dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            device=load_device(world),
        )
    except ValueError as error:
        raise UserError(f"{given.key}: {error}") from error
    check_finite(model, given.path)
    return model


def _source(name: str, given: RewardModel, model: Any, recipe: Recipe) -> ModelReward:
    return ModelReward(
        name=name,
        model=model,
        encode=partial(
            encode_for_reward, given.tokenizer, is_encoder(given.config), ends_once=is_encoder_decoder(given.config)
        ),
        reads_ids=given.same_tokenizer,
        batch_size=recipe.per_device_eval_batch_size,
        max_length=max_positions(given.config),
    )


def encode_for_reward(
    tokenizer: PreTrainedTokenizerBase,
    encoder: bool,
    prompt: Turns,
    text: str,
    tools: Tools = None,
    *,
    ends_once: bool = False,
) -> list[int]:
    """Ids of a prompt and a decoded response for a reward model with another tokenizer, as its stage encodes them.

    Args:
        ends_once: leave out all end-of-text tokens but the last, at which an encoder-decoder is read.
    """
    ids = encode_pair(tokenizer, prompt, as_response(prompt, text), encoder, tools)
    end = tokenizer.eos_token_id
    return [token for place, token in enumerate(ids) if token != end or place == len(ids) - 1] if ends_once else ids
