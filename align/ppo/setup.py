"""What PPO starts from: inputs that fit together, then the four models as engines and the sources of score."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.config.load import resolve_function
from align.config.ppo import PPORecipe
from align.data.encode import encode_pair
from align.data.rows import Turns, as_response
from align.engine.batch_plan import BatchPlan
from align.engine.build import AdapterOff, frozen_engine, train_engine
from align.engine.distributed import World
from align.engine.sharding import gathered_parameters, sharded_load
from align.engine.torch_engine import Engine
from align.errors import UserError
from align.models.load import is_encoder, load_config, load_policy
from align.models.tokenizer import load_tokenizer
from align.models.trainable import add_adapter
from align.models.value import load_value_model, value_head_key_mapping
from align.runs.manifest import _agree, read_manifest, tokenizer_digest
from reward_models.combine import RewardSum
from reward_models.functions import FunctionReward
from reward_models.heads import keep_head_float32, load_reward_model, score_head
from reward_models.trained import ModelReward


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known before any weight is loaded."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    reward_tokenizer: PreTrainedTokenizerBase | None
    reward_config: PretrainedConfig | None
    same_tokenizer: bool  # the reward model reads the policy's ids as they are
    value_path: str  # unused without a value model, as is the next
    value_renaming: dict[str, str] | None


@dataclass(frozen=True, slots=True)
class Models:
    """The engines and the scores' sources. Only `gae` has a value model."""

    policy: Engine
    value: Engine | None
    reference: Engine
    rewards: RewardSum

    @property
    def reward_names(self) -> list[str]:
        """Names of the sources, in the order of `Rollout.source_scores`."""
        return [source.name for source in self.rewards.sources]

    def discard(self) -> None:
        """Forget the gradients since the last step."""
        self.policy.discard()
        if self.value is not None:
            self.value.discard()

    def truncated(self, world: World) -> float:
        """Responses that a reward model with another tokenizer could not read whole, so far, over all ranks."""
        count = sum(source.truncated for source in self.rewards.sources if isinstance(source, ModelReward))
        return float(world.sum(torch.tensor(float(count), device=world.device)))


def check_inputs(recipe: PPORecipe) -> Inputs:
    """Read configurations, tokenizers and manifests, and see that they fit.

    Raises:
        UserError: a stage is missing or unfinished, a head is missing, or tokenizers or templates disagree.
    """
    config = load_config(recipe.sft_model_path, recipe, "sft_model_path")
    if is_encoder(config):
        raise UserError(
            f"sft_model_path: {recipe.sft_model_path} is an encoder, which cannot generate; name a decoder."
        )
    sft = read_manifest(recipe.sft_model_path)
    if sft is not None and sft["stage"] in ("reward", "classify"):
        raise UserError(
            f"sft_model_path: {recipe.sft_model_path} is the output of the {sft['stage']} stage, which cannot generate; name "
            "that of the sft stage."
        )
    tokenizer = load_tokenizer(recipe.sft_model_path, recipe)
    mine = tokenizer_digest(tokenizer)
    if sft is not None:
        _agree(sft["tokenizer"], mine, "sft_model_path", recipe.sft_model_path)

    reward_tokenizer = reward_config = None
    same_tokenizer = False
    if (path := recipe.reward_model_path) is not None:
        reward_config = load_config(path, recipe, "reward_model_path")
        manifest = read_manifest(path)
        if manifest is not None and manifest["stage"] not in ("reward", "classify"):
            raise UserError(f"reward_model_path: {path} is the output of the {manifest['stage']} stage, not of reward.")
        head = (reward_config.architectures or ["no architecture"])[0]
        if not head.endswith("ForSequenceClassification") or reward_config.num_labels != 1:
            raise UserError(
                f"reward_model_path: {path} has no scalar head (it holds a {head}); run the reward stage on it first."
            )
        reward_tokenizer = load_tokenizer(path, recipe)
        theirs = tokenizer_digest(reward_tokenizer)
        same_tokenizer = theirs["vocabulary"] == mine["vocabulary"] and not is_encoder(reward_config)
        if same_tokenizer:
            _agree(theirs, mine, "reward_model_path", path)

    value_path = recipe.value_model_path or (recipe.reward_model_path if same_tokenizer else recipe.sft_model_path)
    assert value_path is not None
    if recipe.value_model_path is not None:
        theirs = tokenizer_digest(load_tokenizer(value_path, recipe))
        if theirs["vocabulary"] != mine["vocabulary"]:
            raise UserError(f"value_model_path: {value_path} has another vocabulary than {recipe.sft_model_path}.")
    return Inputs(
        config=config,
        tokenizer=tokenizer,
        reward_tokenizer=reward_tokenizer,
        reward_config=reward_config,
        same_tokenizer=same_tokenizer,
        value_path=value_path,
        value_renaming=value_head_key_mapping(load_config(value_path, recipe, "value_model_path"))
        if recipe.advantage_estimator == "gae"
        else None,
    )


def load_models(recipe: PPORecipe, inputs: Inputs, plan: BatchPlan, world: World) -> Models:
    """Load the policy, value, reference and reward models, each as an engine of its own."""
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32  # of frozen weights
    with sharded_load(recipe, "policy"):
        loaded = load_policy(recipe.sft_model_path, recipe)
    adapted = add_adapter(loaded, recipe) if recipe.method != "full" else loaded
    policy = train_engine(adapted, recipe, world, recipe.learning_rate, plan.policy_passes)
    if recipe.method != "full":
        reference: Engine = AdapterOff(policy)
    else:
        with sharded_load(recipe, "reference"):
            frozen = load_policy(recipe.sft_model_path, recipe, dtype)
        reference = frozen_engine(frozen, recipe, world, "reference")
    value = None
    if recipe.advantage_estimator == "gae":
        with sharded_load(recipe, "value"):
            model, missing = load_value_model(inputs.value_path, recipe, inputs.value_renaming)
        _start_value_head(model, missing)
        keep_head_float32(model)
        rate = recipe.value_learning_rate or recipe.learning_rate
        value = train_engine(model, recipe, world, rate, plan.accumulation, "value")
    sources = RewardSum(_sources(recipe, inputs, world, dtype), recipe.reward_weights or None)
    return Models(policy, value, reference, sources)


def _start_value_head(value: PreTrainedModel, missing: set[str]) -> None:
    """Make the value at the last token the reward model's score (arXiv 2009.01325 appendix G.1), zero point included.

    A head that is new, on a language model, starts at 0, so that every value is 0 (arXiv 1909.08593).
    """
    _, head = score_head(value)
    with gathered_parameters(list(head.parameters()), modify=True), torch.no_grad():
        if "bias" in missing:
            head.bias.zero_()
        if "weight" in missing:
            head.weight.zero_()
        else:
            head.bias.sub_(getattr(value.config, "score_mean", 0.0))
    value.config.score_mean = 0.0  # it is in the bias now


def _sources(recipe: PPORecipe, inputs: Inputs, world: World, dtype: torch.dtype) -> list[ModelReward | FunctionReward]:
    sources: list[ModelReward | FunctionReward] = []
    if recipe.reward_model_path is not None:
        assert inputs.reward_tokenizer is not None
        assert inputs.reward_config is not None
        with sharded_load(recipe, "reward"):
            try:
                model = load_reward_model(
                    recipe.reward_model_path,
                    dtype=dtype,
                    attn_implementation=recipe.attn_implementation,
                    trust_remote_code=recipe.trust_remote_code,
                )
            except ValueError as error:
                raise UserError(f"reward_model_path: {error}") from error
        engine = frozen_engine(model, recipe, world, "reward")
        rendered = partial(render, inputs.reward_tokenizer, is_encoder(inputs.reward_config))
        sources.append(
            ModelReward(
                name="reward_model",
                model=engine.module,
                encode=None if inputs.same_tokenizer else rendered,
                batch_size=recipe.per_device_eval_batch_size,
                max_length=getattr(inputs.reward_config, "max_position_embeddings", None) or 10**9,
            )
        )
    return sources + functions(recipe.reward_funcs, "reward_funcs")


def render(tokenizer: PreTrainedTokenizerBase, encoder: bool, prompt: Turns, text: str) -> list[int]:
    """Ids of a decoded response and its prompt for a reward model with a tokenizer of its own, as its stage trained on them."""
    return encode_pair(tokenizer, prompt, as_response(prompt, text), encoder)


def functions(names: list[str], key: str) -> list[FunctionReward]:
    """Reward functions named in the recipe."""
    return [FunctionReward(name=name, function=resolve_function(name, key)) for name in names]
