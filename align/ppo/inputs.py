"""What is known of the models that a PPO run starts from before any weight is loaded, and whether they fit together."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from align.config.ppo import PPORecipe
from align.config.stages import STAGES
from align.data.reasoning import set_scores_reasoning
from align.errors import UserError
from align.maths.estimators import ESTIMATORS
from align.models.causality import check_causal
from align.models.check_files import check_files
from align.models.load import adapter_base, load_config
from align.models.model_types import is_encoder
from align.models.scalar_head import find_head
from align.models.tokenizer import load_tokenizer
from align.models.value import find_value_head
from align.runs.manifest import (
    check_same_tokenizer,
    check_template_kwargs,
    check_tokenizer,
    read_manifest,
    tokenizer_digest,
)
from reward_models.linear_head import SequenceClassifier, TokenClassifier
from reward_models.stored_head import StoredHead


@dataclass(frozen=True, slots=True)
class PPOInputs:
    """Configurations and tokenizers of the models that a run starts from."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    reward_tokenizer: PreTrainedTokenizerBase | None
    reward_config: PretrainedConfig | None
    same_tokenizer: bool  # the reward model reads the policy's ids as they are
    reward_head: StoredHead | None
    value_path: str  # unused without a value model, as is the next
    value_head: StoredHead | None  # None: a new one

    def describe_heads(self, advantage_estimator: str) -> list[str]:
        """Where the scalar heads of reward and value model come from."""
        lines = [] if self.reward_head is None else [f"reward model: its head is {self.reward_head.name}"]
        if ESTIMATORS[advantage_estimator].value_model:
            head = "a new head" if self.value_head is None else f"the head {self.value_head.name}"
            lines.append(f"value model: starts from {self.value_path} with {head}")
        return lines


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
    mine = tokenizer_digest(tokenizer)
    check_tokenizer(recipe.sft_model_path, tokenizer, "sft_model_path", may_add_template=False)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)

    reward_tokenizer = reward_config = reward_head = value_head = None
    same_tokenizer = False
    if (path := recipe.reward_model_path) is not None:
        reward_config = load_config(path, "reward_model_path", recipe.trust_remote_code)
        manifest = read_manifest(path)
        if manifest is not None and manifest["stage"] not in ("reward", "classify"):
            raise UserError(f"reward_model_path: {path} is the output of the {manifest['stage']} stage, not of reward.")
        reward_head = _find_reward_head(path, reward_config, recipe.trust_remote_code)
        kwargs = {} if is_encoder(reward_config) else recipe.chat_template_kwargs  # an encoder reads plain text
        reward_tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, kwargs)
        check_files(
            SequenceClassifier,
            path,
            "reward_model_path",
            reward_config,
            reward_tokenizer,
            new_head=True,  # the head has been found
            attn_implementation=kernel,
        )
        check_template_kwargs(path, kwargs, "reward_model_path")
        set_scores_reasoning(reward_tokenizer, recipe.score_reasoning)
        theirs = {} if manifest is None else manifest["recipe"]
        if theirs.get("score_reasoning", recipe.score_reasoning) != recipe.score_reasoning:
            raise UserError(
                f"score_reasoning: {path} (reward_model_path) was trained with {str(not recipe.score_reasoning).lower()}, "
                f"and this recipe gives {str(recipe.score_reasoning).lower()}; give the same in both stages."
            )
        theirs = tokenizer_digest(reward_tokenizer)
        same_tokenizer = theirs["vocabulary"] == mine["vocabulary"] and not is_encoder(reward_config)
        if same_tokenizer:
            check_same_tokenizer(theirs, mine, "reward_model_path", path)

    value_path = recipe.value_model_path or (recipe.reward_model_path if same_tokenizer else recipe.sft_model_path)
    assert value_path is not None
    if recipe.value_model_path is not None:
        theirs = tokenizer_digest(load_tokenizer(value_path, recipe.chat_template_path, recipe.trust_remote_code))
        if theirs["vocabulary"] != mine["vocabulary"]:
            raise UserError(f"value_model_path: {value_path} has another vocabulary than {recipe.sft_model_path}.")
    if ESTIMATORS[recipe.advantage_estimator].value_model:
        others = "reward_model_path" if same_tokenizer else "sft_model_path"
        key = "value_model_path" if recipe.value_model_path is not None else others
        value_config = load_config(value_path, key, recipe.trust_remote_code)
        if is_encoder(value_config):
            raise UserError(
                f"{key}: {value_path} is an encoder ({value_config.model_type}), whose value of a token would depend on the tokens "
                "after it; name a decoder."
            )
        if value_path != recipe.sft_model_path:
            check_causal(value_config, key, value_path, recipe.trust_remote_code)
        value_head = find_value_head(value_path, value_config, key, recipe.trust_remote_code)
        check_files(TokenClassifier, value_path, key, value_config, new_head=True, attn_implementation=kernel)
    return PPOInputs(
        config=config,
        tokenizer=tokenizer,
        reward_tokenizer=reward_tokenizer,
        reward_config=reward_config,
        same_tokenizer=same_tokenizer,
        reward_head=reward_head,
        value_path=value_path,
        value_head=value_head,
    )


def _find_reward_head(path: str, config: PretrainedConfig, trust_remote_code: bool) -> StoredHead:
    key = "reward_model_path"
    if (base := adapter_base(path)) is not None:
        raise UserError(
            f"{key}: {path} is an adapter of {base}; merge it by `align merge {path} FOLDER`, and name FOLDER."
        )
    remedy = "Name a reward model: the output of the reward stage."
    head = find_head(path, config, SequenceClassifier, key, remedy, trust_remote_code)
    held = (config.architectures or ["no architecture"])[0]
    if head is None or held.endswith("ForTokenClassification"):
        raise UserError(f"{key}: {path} has no scalar head (it holds a {held}); run the reward stage on it first.")
    return head
