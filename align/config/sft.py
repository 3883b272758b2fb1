"""Keys of the SFT stage, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from align.config.base import TrainerRecipe, check_trainer_rules
from align.config.data_source import DataSource
from align.config.keys import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    FROM_0_TO_BELOW_1,
    TOKENS,
    VOCABULARY,
    Where,
    key,
    score_reasoning,
)
from align.config.sequence_parallel import check_sequence_parallel_rules, sequence_parallel_size
from align.errors import UserError

OF_RETENTION = ("retention", "forgetting")  # how the names of metrics begin that need `retention`
METRICS = (  # of an evaluation
    "loss", "mean_token_accuracy", "entropy", "train_loss", "gap", "retention_loss", "retention_perplexity",
    "retention_token_accuracy", "forgetting",
)  # fmt: skip
NEW_VOCABULARY = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRecipe(TrainerRecipe):
    """Stage 1, `align sft`: supervised fine-tuning of a language model."""

    model_name_or_path: str | None = key(None, "Model folder or hub id to fine-tune.")
    model_config: dict[str, Any] = key(
        {},
        "Instead of a model: train one from scratch with this transformers config (`model_type`, `hidden_size`, ...).",
    )
    tokenizer_vocab_size: int = key(
        NEW_VOCABULARY, "With `model_config`: size of the byte-level BPE vocabulary trained on the rows.", VOCABULARY
    )
    loss_normalization: Literal["token_mean", "example_mean"] = key(
        "token_mean",
        "Loss of a step: the mean over all trained tokens, or the mean over examples of each example's mean.",
    )
    packing: bool = key(
        False, "Pack complete examples into rows of max_length, without attention between them; `train_batch_size` "
        "then counts packed rows. Longer `text` is split."
    )  # fmt: skip
    padding_free: bool = key(
        False, "Concatenate the rows of a batch instead of padding them; does not change the result."
    )
    sequence_parallel_size: int = sequence_parallel_size()
    neftune_noise_alpha: float | None = key(
        None, "Noise added to embeddings in training, often 5 (arXiv 2310.05914).", ABOVE_0
    )
    label_smoothing_factor: float = key(
        0.0, "Share of each label's probability spread over the vocabulary.", FROM_0_TO_BELOW_1
    )
    completion_only_loss: bool = key(
        True, "Train on responses only (in `messages`: every assistant turn); false trains on prompts too."
    )
    train_on_reasoning: bool = key(
        True,
        "Whether assistant turns keep their reasoning (`reasoning_content`, or all up to `</think>` or the model's own mark); false leaves it out.",
    )
    retention: list[DataSource] = key(
        [],
        "Rows that the model already handles well, in any format of `train_dataset`: the loss on `eval_fraction` of "
        "their prompts (all if it is 0) is measured at each evaluation, which shows what is forgotten.",
    )
    replay_fraction: float = key(
        0.0,
        "Share of the training rows, before packing, that are replayed from `retention`; rows that are measured are "
        "not replayed.",
        FROM_0_TO_BELOW_1,
    )
    max_forgetting: float | None = key(
        None,
        "Maximum increase of the loss on `retention`, in percent of its value before training: the best model is "
        "chosen among the checkpoints within it, and for `early_stopping_patience` only these count as improvements.",
        AT_LEAST_0,
    )
    eval_metrics: list[str] = key(
        [],
        "Metrics of the greedy responses to evaluation prompts: exact_match, accuracy, f1, bleu, rouge, chrf, or any "
        "name that `evaluate.load` accepts; logged as `eval/<name>`.",
    )
    max_eval_generations: int = key(64, "With `eval_metrics`: maximum prompts answered in an evaluation.", AT_LEAST_1)
    response_length: int = key(64, "With `eval_metrics`: maximum tokens of a response.", TOKENS)
    score_reasoning: bool = score_reasoning()


def check_sft_rules(recipe: SFTRecipe, where: Where) -> None:
    """The rules between the keys of the SFT stage.

    Raises:
        UserError: names the first broken rule.
    """
    # Those of tasks and of metrics outside `align` show in the evaluation before the first step.
    known = not recipe.eval_metrics and "/" not in recipe.metric_for_best_model
    check_trainer_rules(recipe, where, METRICS if known else ())
    if (recipe.model_name_or_path is None) == (not recipe.model_config):
        got = "both; empty one with null" if recipe.model_config else "neither"
        raise UserError(
            f"{where('model_name_or_path')}: expected either a model to fine-tune, or `model_config` to train one from "
            f"scratch, got {got}"
        )
    if recipe.model_config and "model_type" not in recipe.model_config:
        raise UserError(
            f"{where('model_config')}: expected a `model_type` such as llama among its keys, got "
            f"{', '.join(recipe.model_config)}"
        )
    if recipe.tokenizer_vocab_size != NEW_VOCABULARY and not recipe.model_config:
        raise UserError(
            f"{where('tokenizer_vocab_size')}: is of the tokenizer that is made for a model from scratch (`model_config`), and "
            f"{recipe.model_name_or_path} has its own; leave it out"
        )
    if recipe.label_smoothing_factor and recipe.loss_normalization == "example_mean":
        raise UserError(
            f"{where('label_smoothing_factor')}: is a mean over tokens; use loss_normalization: token_mean with it, or "
            "set it to 0"
        )
    if recipe.packing and recipe.train_sampling_strategy == "group_by_length":
        raise UserError(
            f"{where('train_sampling_strategy')}: with packing all rows have about the same length; leave "
            "group_by_length out"
        )
    check_sequence_parallel_rules(recipe, where)
    _check_retention(recipe, where)


def _check_retention(recipe: SFTRecipe, where: Where) -> None:
    evaluated = bool(recipe.eval_dataset) or recipe.eval_fraction > 0
    for name in ("replay_fraction", "max_forgetting"):
        if getattr(recipe, name) and not recipe.retention:
            raise UserError(f"{where(name)}: refers to the rows of `retention`, and there are none; set retention too")
    if recipe.metric_for_best_model.removeprefix("eval_").startswith(OF_RETENTION) and not recipe.retention:
        raise UserError(
            f"{where('metric_for_best_model')}: {recipe.metric_for_best_model} is measured on `retention`; set that too"
        )
    if recipe.retention and recipe.model_config:
        raise UserError(
            f"{where('retention')}: a model from scratch (`model_config`) has nothing to forget; leave it out"
        )
    for name in ("retention", "eval_metrics"):
        if getattr(recipe, name) and not evaluated:
            raise UserError(
                f"{where(name)}: is measured at each evaluation, and there is none; set eval_dataset or eval_fraction"
            )
    if recipe.replay_fraction and not recipe.eval_fraction:
        raise UserError(
            f"{where('eval_fraction')}: expected a share above 0 of `retention` to measure, as replay_fraction trains "
            "on the rest, got 0"
        )
    chosen = recipe.load_best_model_at_end or recipe.early_stopping_patience is not None
    if recipe.max_forgetting is not None and not chosen:
        raise UserError(
            f"{where('max_forgetting')}: has no effect without load_best_model_at_end or early_stopping_patience; set "
            "one of them"
        )
    if len(set(recipe.eval_metrics)) < len(recipe.eval_metrics):
        raise UserError(f"{where('eval_metrics')}: expected different metrics, got {', '.join(recipe.eval_metrics)}")
    if recipe.eval_metrics and recipe.method in ("prompt", "prefix"):
        raise UserError(
            f"{where('eval_metrics')}: responses with method: {recipe.method} are not supported; leave it out, the "
            "losses are measured all the same"
        )
