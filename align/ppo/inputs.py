"""Configurations and tokenizers of the models that a PPO run starts from, checked before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from align.config.ppo import PPORecipe
from align.config.stages import STAGES
from align.data.reasoning import set_scores_reasoning
from align.errors import UserError
from align.evaluate.reward_model import RewardModel, check_reward_model, check_reward_models
from align.models.causality import check_causal
from align.models.check_files import check_files
from align.models.load import load_config
from align.models.model_types import is_encoder
from align.models.split_sequences import check_splits
from align.models.tokenizer import load_tokenizer
from align.models.value import check_shared, find_value_head, layers_below_head
from align.ppo.shared_rewards import on_policys_weights
from align.runs.manifest import check_tokenizer, read_manifest, tokenizer_digest
from reward_models.bottleneck import base_of, bottleneck_settings
from reward_models.linear_head import TokenClassifier
from reward_models.stored_head import StoredHead


@dataclass(frozen=True, slots=True)
class PPOInputs:
    """Configurations and tokenizers of the models that a run starts from."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rewards: list[RewardModel]  # none, one, or the members of an ensemble
    judge: RewardModel | None
    value_path: str  # unused without a value model, as are the next three
    value_head: StoredHead | None  # None: a new head
    value_method: str
    value_lacks: list[str]  # layers between backbone and head in `value_path`, which the value model does not have

    @property
    def on_policy(self) -> dict[str, RewardModel]:
        """Reward models that score on the policy's weights, by key."""
        models = [*self.rewards, *([self.judge] if self.judge is not None else [])]
        return {model.key: model for model in models if model.adapter is not None}

    def describe_heads(self, value_model: bool) -> list[str]:
        """Lines that name the scalar heads of the reward and value models."""
        several = len(self.rewards) > 1
        named = {f"reward model{f' {n}' * several}": model for n, model in enumerate(self.rewards, start=1)}
        named |= {"judge": self.judge} if self.judge is not None else {}
        reread = "; its tokenizer is another than the policy's, so it reads responses rendered and tokenized anew"
        lines = [
            f"{name}: its head is {model.head.name}{'' if model.same_tokenizer else reread}{_whose_weights(model)}"
            for name, model in named.items()
        ]
        if value_model:
            head = "a new head" if self.value_head is None else f"the head {self.value_head.name}"
            if self.value_lacks:
                head += f", since the model's own reads layers that a value model lacks: {', '.join(self.value_lacks)}"
            part = {
                "lora": "; adapters and the head train",
                "shared": ", on the policy's frozen weights; adapters and the head train",
            }
            lines.append(f"value model: starts from {self.value_path} with {head}{part.get(self.value_method, '')}")
        return lines


def _whose_weights(model: RewardModel) -> str:
    if model.adapter is not None:
        return "; its adapter and head score on the policy's frozen weights"
    return f"; it has weights of its own, although it has an adapter, since {model.apart}" if model.apart else ""


def check_ppo_inputs(recipe: PPORecipe) -> PPOInputs:
    """Read configurations, tokenizers and manifests, and check that they fit together.

    Raises:
        UserError: a stage is missing or unfinished, a head is missing, or tokenizers or templates disagree.
    """
    config = load_config(recipe.sft_model_path, "sft_model_path", recipe.trust_remote_code)
    if is_encoder(config):
        raise UserError(
            f"sft_model_path: {recipe.sft_model_path} is an encoder, which cannot generate; name a decoder."
        )
    sft = read_manifest(recipe.sft_model_path)
    if sft is not None and not STAGES[sft["stage"]].generates:
        raise UserError(
            f"sft_model_path: {recipe.sft_model_path} is the output of the {sft['stage']} stage, which cannot generate; name "
            "that of the sft stage."
        )
    tokenizer = load_tokenizer(
        recipe.sft_model_path, recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs
    )
    kernel = recipe.attn_implementation
    check_files(
        AutoModelForCausalLM,
        recipe.sft_model_path,
        "sft_model_path",
        config,
        tokenizer,
        attn_implementation=kernel,
        trained_by=recipe,
    )
    check_causal(config, "sft_model_path", recipe.sft_model_path, recipe.trust_remote_code)
    if (size := recipe.sequence_parallel_size) > 1:
        check_splits(config, size, recipe.trust_remote_code)
    mine = tokenizer_digest(tokenizer)
    check_tokenizer(recipe.sft_model_path, tokenizer, "sft_model_path", may_add_template=False)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)

    judge = value_head = None
    value_lacks: list[str] = []
    rewards = check_reward_models(recipe, recipe.score_reasoning, tokenizer)
    if (judge_path := recipe.judge_reward_model_path) is not None:
        judge = check_reward_model(judge_path, "judge_reward_model_path", recipe, recipe.score_reasoning, tokenizer)
        [judge] = on_policys_weights(recipe, config, [judge])
    rewards = on_policys_weights(recipe, config, rewards)
    same_tokenizer = bool(rewards) and rewards[0].same_tokenizer
    shared = recipe.value_method == "shared"
    starts_as_reward = same_tokenizer and not shared
    sft_path = base_of(recipe.sft_model_path) if shared else recipe.sft_model_path
    value_path = recipe.value_model_path or (rewards[0].path if starts_as_reward else sft_path)
    if recipe.value_model_path is not None:
        theirs = tokenizer_digest(load_tokenizer(value_path, recipe.chat_template_path, recipe.trust_remote_code))
        if theirs["vocabulary"] != mine["vocabulary"]:
            raise UserError(f"value_model_path: {value_path} has another vocabulary than {recipe.sft_model_path}.")
    if recipe.estimator.value_model and shared:
        check_shared(recipe.sft_model_path, config, "sft_model_path", recipe.trust_remote_code)
    elif recipe.estimator.value_model:
        others = "reward_model_path" if starts_as_reward else "sft_model_path"
        key = "value_model_path" if recipe.value_model_path is not None else others
        if bottleneck_settings(value_path) is not None:
            raise UserError(
                f"{key}: {value_path} is a bottleneck adapter, from which no value model can start; name a plain model by "
                f"value_model_path, such as its base {base_of(value_path)}, or choose an advantage_estimator without a value model."
            )
        value_config = load_config(value_path, key, recipe.trust_remote_code)
        if is_encoder(value_config):
            raise UserError(
                f"{key}: {value_path} is an encoder ({value_config.model_type}), whose value of a token would depend on the tokens "
                "after it; name a decoder."
            )
        if value_path != recipe.sft_model_path:
            check_causal(value_config, key, value_path, recipe.trust_remote_code)
            if size > 1:
                check_splits(value_config, size, recipe.trust_remote_code)
        value_lacks = layers_below_head(value_path, value_config, recipe.trust_remote_code)
        value_head = find_value_head(value_path, value_config, key, recipe.trust_remote_code)
        check_files(
            TokenClassifier,
            value_path,
            key,
            value_config,
            new_head=True,
            num_labels=1,
            attn_implementation=kernel,
            trained_by=replace(recipe, method="lora") if recipe.value_method == "lora" else None,
        )
    return PPOInputs(
        config=config,
        tokenizer=tokenizer,
        rewards=rewards,
        judge=judge,
        value_path=value_path,
        value_head=value_head,
        value_method=recipe.value_method,
        value_lacks=value_lacks,
    )
