"""Inputs of the reward stage, checked before weights are loaded: configurations, tokenizers, true rewards."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from align.config.reward import RewardRecipe
from align.data.reasoning import set_scores_reasoning
from align.engine.user_functions import user_function
from align.errors import UserError
from align.models.check_files import check_files
from align.models.encoder_decoder import check_classifier_exists
from align.models.load import load_config
from align.models.model_types import is_encoder, is_encoder_decoder
from align.models.scalar_head import find_reward_head
from align.models.split_sequences import check_splits
from align.models.tokenizer import load_tokenizer, set_right_padding
from align.runs.manifest import check_tokenizer
from reward_models.combine import RewardSum
from reward_models.linear_head import SequenceClassifier
from reward_models.stored_head import StoredHead


@dataclass(frozen=True, slots=True)
class SFTInputs:
    """The model whose responses get mean score 0."""

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RewardInputs:
    """The starting point of the reward stage.

    Attributes:
        config, tokenizer: of the backbone. The tokenizer pads on the right, not with end-of-text.
        sft: None where no model can respond to prompts; the rows' chosen responses then get mean score 0.
        true_reward: sum of the `eval_reward_funcs`; None without any.
        head: the one in the model's files that is kept; None: a new one.
    """

    config: PretrainedConfig
    is_encoder: bool
    tokenizer: PreTrainedTokenizerBase
    sft: SFTInputs | None
    true_reward: RewardSum | None
    head: StoredHead | None

    def describe_head(self) -> str:
        """A line on the origin of the scalar head."""
        if self.head is None:
            return "new"
        # A bias is the same for every score, and scores are normalized at the end.
        left = ", without its bias" * (self.head.bias is not None and not self.head.native)
        return f"{self.head.name}, kept from the model's files{left}"


def check_reward_inputs(recipe: RewardRecipe) -> RewardInputs:
    """Load configurations and tokenizers, and check them against each other and the models' manifests.

    Raises:
        UserError: a model is missing, unfinished, of the wrong kind or with a head of the wrong size, or a tokenizer is not the one it was trained with.
    """
    path, key = recipe.model_name_or_path, "model_name_or_path"
    config = load_config(path, key, recipe.trust_remote_code, encoder_decoder=True)
    check_classifier_exists(config, key, path)
    if recipe.sequence_parallel_size > 1:
        if is_encoder(config) or is_encoder_decoder(config):
            raise UserError(
                f"sequence_parallel_size: {path} is no decoder ({config.model_type}), and the sequences of others cannot be split; "
                "leave it out."
            )
        check_splits(config, recipe.sequence_parallel_size, recipe.trust_remote_code)
    head = find_reward_head(path, config, recipe.new_head, recipe.trust_remote_code)
    kwargs = {} if is_encoder(config) else recipe.chat_template_kwargs  # an encoder reads plain text
    tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code, kwargs)
    check_tokenizer(path, tokenizer, key, may_add_template=False)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)
    check_files(
        SequenceClassifier,
        path,
        key,
        config,
        tokenizer,
        new_head=True,
        num_labels=1,
        attn_implementation=recipe.attn_implementation,
        trained_by=recipe,
    )
    architecture = (config.architectures or [""])[0].replace("LMHeadModel", "")
    is_language_model = not (is_encoder(config) or is_encoder_decoder(config)) and not architecture.endswith(
        ("Classification", "Model")
    )
    sft_model_path = recipe.sft_model_path or (path if is_language_model else None)
    sft = None
    if sft_model_path is not None:
        sft_config = load_config(sft_model_path, "sft_model_path", recipe.trust_remote_code)
        if is_encoder(sft_config):
            raise UserError(
                f"sft_model_path: {sft_model_path} is an encoder, which cannot generate; name the SFT model."
            )
        sft_tokenizer = load_tokenizer(
            sft_model_path, recipe.chat_template_path, recipe.trust_remote_code, recipe.chat_template_kwargs
        )
        check_tokenizer(sft_model_path, sft_tokenizer, "sft_model_path", may_add_template=False)
        set_scores_reasoning(sft_tokenizer, recipe.score_reasoning)
        check_files(
            AutoModelForCausalLM,
            sft_model_path,
            "sft_model_path",
            sft_config,
            sft_tokenizer,
            attn_implementation=recipe.attn_implementation,
        )
        sft = SFTInputs(sft_model_path, sft_config, sft_tokenizer)
    true_rewards = [user_function(f, "eval_reward_funcs", recipe.reward_timeout) for f in recipe.eval_reward_funcs]
    set_right_padding(tokenizer)
    return RewardInputs(
        config,
        is_encoder(config),
        tokenizer,
        sft,
        RewardSum(true_rewards) if true_rewards else None,
        head,
    )
