"""What a recipe may say: one frozen, strict dataclass per stage, each key with its meaning and default.

Keys carry the names of `transformers.TrainingArguments`, TRL's configs and TRL 1.12's `PPOConfig` where
one exists. Sizes that change the result (`train_batch_size`, `rollout_batch_size`, `minibatch_size`) are
global, so that a recipe gives the same result on one process and on eight; what only has to fit in memory
is per device, and gradient accumulation is derived (`align.recipes.BatchPlan`).

Reading YAML, overrides and their errors live in `align.recipes`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(Exception):
    """A mistake that the user can mend. Its message names the file, row, key or option, what was expected, and what to do."""


def key(default: Any, meaning: str) -> Any:
    """A recipe key: its default, and the sentence that `--help` prints."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


def required(meaning: str) -> Any:
    """A recipe key without a default."""
    return field(metadata={"help": meaning, "required": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """One source of rows. In a recipe: a path or hub id alone, a mapping of these keys, or a list of such."""

    path: str | None = key(None, "A JSONL, JSON, Parquet or CSV file (may be gzipped; globs allowed), or a hub id.")
    generator: str | None = key(
        None, "`module:function` that yields rows, instead of a path; the module may lie beside the recipe."
    )
    generator_kwargs: dict[str, Any] = key({}, "Keyword arguments for the generator.")
    name: str | None = key(None, "Hub data set configuration.")
    split: str = key("train", "Hub data set split.")
    columns: dict[str, str] = key(
        {},
        "Column names: ours (prompt, completion, chosen, rejected, messages, text, text_pair, label) to the source's.",
    )
    task: str | None = key(
        None,
        "Name under which its rows are counted and evaluated; that of the file (of its folder when that is only a "
        "split's), hub data set or generator by default.",
    )
    templates: list[dict[str, str]] = key(
        [],
        "Jinja templates over the source's columns that make its rows: {prompt, completion} for plain text (the completion "
        "begins with the space or line break between them), {user, assistant} or {system, user, assistant} for "
        "messages; of several, each row draws one by seed.",
    )
    label_column: str = key("label", "With `templates`: the column that holds the label, which they read as `label`.")
    labels: dict[Any, str] = key(
        {},
        "With `templates`: what each class id or string of that column reads as, such as {0: negative, 1: positive}.",
    )
    weight: float = key(1.0, "Times each row is used per epoch; 0.5 takes a seeded half.")
    max_rows: int | None = key(
        None, "Use only this many rows (a seeded sample); `mixture_temperature` counts no more than these."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecipe:
    """Keys that all stages share."""

    output_dir: str = required("Folder for the trained model, `stage.json`, `metrics.jsonl` and checkpoints.")
    stage: Literal["sft", "reward", "ppo", "classify", "mlm"] | None = key(
        None, "Which stage this recipe is for; `align run` and `align check` need it."
    )
    seed: int = key(42, "Seed of data order, splits, initialisation and sampling.")

    train_dataset: list[DataSource] = key(
        [], "Training rows: path, hub id, mapping with `path`/`generator`, or a list of these."
    )
    mixture_temperature: float = key(
        1.0,
        "T of the mixture of training sources: each gets a share proportional to weight x rows^(1/T) of as many rows "
        "as 1 gives; 1 is by size, more is more even (arXiv 1910.10683).",
    )
    eval_dataset: list[DataSource] = key(
        [], "Evaluation rows; without it, a seeded share of the training prompts is held out."
    )
    eval_fraction: float = key(0.05, "Share of the prompts held out when there is no `eval_dataset`.")
    max_eval_rows: int | None = key(None, "Evaluate on at most this many rows.")
    on_bad_row: Literal["error", "skip"] = key(
        "error", "What to do with rows that cannot be used: refuse the data, or skip and count."
    )
    chat_template_path: str | None = key(None, "Jinja file with the chat template, for tokenizers that have none.")

    learning_rate: float = key(2e-5, "Peak learning rate of AdamW.")
    weight_decay: float = key(0.0, "AdamW weight decay.")
    adam_beta1: float = key(0.9, "AdamW beta 1.")
    adam_beta2: float = key(0.999, "AdamW beta 2.")
    adam_epsilon: float = key(1e-8, "AdamW epsilon.")
    max_grad_norm: float = key(1.0, "Gradients are clipped to this global norm; 0 switches clipping off.")
    lr_scheduler_type: str = key(
        "linear", "Schedule name as in transformers: linear, cosine, constant, constant_with_warmup, ..."
    )
    warmup_steps: float = key(0, "Warm-up in optimiser steps; a number below 1 is a share of all steps.")
    per_device_train_batch_size: int = key(
        8, "Most sequences in one forward-backward pass per device; only memory depends on it."
    )
    per_device_eval_batch_size: int = key(16, "Most sequences in one forward pass without gradients per device.")

    bf16: bool = key(False, "Train in bfloat16 mixed precision with float32 master weights.")
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass to save memory.")
    attn_implementation: str | None = key(
        None, "Attention kernel, as in `from_pretrained`: sdpa, flash_attention_2, eager."
    )
    method: Literal["full", "freeze", "head", "lora", "dora", "qlora", "ia3", "prompt", "prefix"] = key(
        "full", "What is trained: all weights, some layers, the head, or an adapter, which is saved as such and merged."
    )
    freeze_layers: int = key(0, "With `method: freeze`: the embedding and so many first layers stay as they are.")
    trainable_pattern: str | None = key(
        None, "With `method: freeze`: train the parameters alone whose names this regular expression finds."
    )
    lora_r: int = key(16, "Rank of LoRA, DoRA and QLoRA.")
    lora_alpha: int = key(32, "LoRA alpha.")
    lora_target_modules: list[str] = key([], "Modules with adapters; all linear layers by default.")
    num_virtual_tokens: int = key(20, "Tokens that `method: prompt` or `prefix` learns and puts before each row.")
    deepspeed: str | None = key(None, 'DeepSpeed JSON file (see recipes/deepspeed); sizes may be "auto".')
    trust_remote_code: bool = key(False, "Allow code from the model's repository to run.")

    logging_steps: int = key(10, "Log training metrics every so many steps.")
    eval_steps: int | None = key(None, "Evaluate every so many steps (PPO: updates), and always at the end.")
    save_steps: int | None = key(None, "Save a resumable checkpoint every so many steps (PPO: updates).")
    save_total_limit: int = key(2, "Checkpoints kept; older ones are deleted.")
    report_to: Literal["none", "wandb"] = key(
        "none", "Also log to Weights & Biases; `metrics.jsonl` is always written."
    )
    project: str = key("align", "Weights & Biases project.")
    run_name: str | None = key(None, "Weights & Biases run name; the output folder's name by default.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerRecipe(StageRecipe):
    """Keys of the stages that a Trainer runs, TRL's or transformers'."""

    train_batch_size: int = key(32, "Rows per optimiser step over all devices; accumulation is derived.")
    num_train_epochs: float = key(1.0, "Passes over the training rows.")
    max_steps: int = key(-1, "Optimiser steps; overrides `num_train_epochs` when positive.")
    max_length: int = key(1024, "Most tokens of prompt plus response; longer rows are bad rows.")
    load_best_model_at_end: bool = key(
        False,
        "Save the checkpoint with the best `metric_for_best_model` instead of the last; one is saved every eval_steps.",
    )
    metric_for_best_model: str = key(
        "eval_loss",
        "Evaluation metric that says which model is best: one whose name ends in loss, perplexity, gap or forgetting is to "
        "be low, others high.",
    )
    early_stopping_patience: int | None = key(
        None, "Stop after so many evaluations in a row that did not better `metric_for_best_model`."
    )
    train_sampling_strategy: Literal["random", "group_by_length"] = key(
        "random", "Order of rows: random, or random among rows of like length, which pads less."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTRecipe(TrainerRecipe):
    """Stage 1, `align sft`: supervised fine-tuning of a language model."""

    model_name_or_path: str | None = key(None, "Model folder or hub id to fine-tune.")
    model_config: dict[str, Any] = key(
        {},
        "Instead of a model: train one from scratch with this transformers config (`model_type`, `hidden_size`, ...).",
    )
    tokenizer_vocab_size: int = key(
        512, "With `model_config`: size of the byte-level BPE vocabulary trained on the rows."
    )
    loss_normalization: Literal["token_mean", "example_mean"] = key(
        "token_mean", "Mean of the loss over all trained tokens of a step, or over examples of each one's own mean."
    )
    packing: bool = key(
        False, "Fill rows of max_length with whole examples, which do not see one another; `train_batch_size` then counts "
        "such rows. `text` that is longer is cut into pieces."
    )  # fmt: skip
    padding_free: bool = key(False, "Lay the rows of a batch end to end instead of padding them; changes no number.")
    neftune_noise_alpha: float | None = key(None, "Noise added to embeddings in training, often 5 (arXiv 2310.05914).")
    label_smoothing_factor: float = key(0.0, "Share of each label's probability spread over the vocabulary.")
    completion_only_loss: bool = key(
        True, "Train on responses only (in `messages`: every assistant turn); false trains on prompts too."
    )
    retention: list[DataSource] = key(
        [],
        "Rows of what the model could do before, in any form of `train_dataset`: `eval_fraction` of their prompts (all, when "
        "it is 0) are measured with each evaluation, which tells what is forgotten.",
    )
    replay_fraction: float = key(
        0.0,
        "Share of the training rows, before packing, that are replayed from `retention`, of whose rows none that is measured.",
    )
    max_forgetting: float | None = key(
        None,
        "Most percent by which the loss on `retention` may rise against the start: the best model is chosen among the "
        "checkpoints that keep to it, and for `early_stopping_patience` one that does not is no better.",
    )
    eval_metrics: list[str] = key(
        [],
        "Metrics of the greedy responses to evaluation prompts: exact_match, accuracy, f1, bleu, rouge, chrf, or what "
        "`evaluate.load` takes; logged as `eval/<name>`.",
    )
    max_eval_generations: int = key(64, "With `eval_metrics`: most prompts answered in an evaluation.")
    response_length: int = key(64, "With `eval_metrics`: most tokens of a response.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRecipe(TrainerRecipe):
    """Stage 2, `align reward`: a scalar reward model from preference pairs."""

    model_name_or_path: str = required(
        "SFT model, another decoder, or an encoder (BERT-like) to put the scalar head on."
    )
    sft_model_path: str | None = key(
        None, "Model whose completions get mean score zero; `model_name_or_path` when that is an SFT stage's output."
    )
    learning_rate: float = key(1e-5, "Peak learning rate of AdamW.")
    center_rewards_coefficient: float | None = key(
        None, "Weight of the squared sum of the two scores, which keeps them near zero (TRL's key)."
    )
    normalize_prompts: int = key(256, "Prompts on which SFT completions are sampled to set the zero of the score.")
    response_length: int = key(64, "Most tokens of those completions.")
    eval_reward_funcs: list[str] = key(
        [], "`module:function` known true rewards; their accuracy on the evaluation pairs is the ceiling."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PPORecipe(StageRecipe):
    """Stage 3, `align ppo`: PPO against the reward, with a KL penalty against the SFT reference."""

    sft_model_path: str = required("SFT model: the policy starts from it and the frozen reference stays it.")
    reward_model_path: str | None = key(None, "Reward model of stage 2 (or any sequence classifier with one label).")
    reward_funcs: list[str] = key(
        [], "`module:function` rewards with TRL's signature; the module may lie beside the recipe."
    )
    reward_weights: list[float] = key(
        [], "Weights of the reward model (first, if any) and of `reward_funcs`; 1 each by default."
    )
    value_model_path: str | None = key(
        None, "Start of the value model; the reward model when its tokenizer is the policy's, else the SFT model."
    )
    eval_reward_funcs: list[str] = key(
        [], "`module:function` rewards that are only measured, on evaluation prompts: a known truth, a gold model."
    )

    total_episodes: int = key(10_000, "Responses sampled in the whole run.")
    rollout_batch_size: int = key(64, "Responses per update over all devices.")
    num_generations: int = key(
        1, "Responses to each prompt; an update takes rollout_batch_size / num_generations prompts."
    )
    minibatch_size: int = key(64, "Responses per optimiser step over all devices.")
    num_ppo_epochs: int = key(4, "Passes over each rollout batch.")
    max_prompt_length: int = key(512, "Most tokens of a prompt; longer prompts are bad rows.")
    response_length: int = key(53, "Most tokens of a response.")
    temperature: float = key(1.0, "Sampling temperature; every log-probability is taken at it too.")
    missing_eos_penalty: float | None = key(None, "Subtracted from the score of a response that does not end.")
    missing_eos_score: float | None = key(None, "Replaces the score of a response that does not end.")

    learning_rate: float = key(3e-6, "Peak learning rate of the policy.")
    value_learning_rate: float | None = key(None, "Peak learning rate of the value model; the policy's by default.")
    adam_epsilon: float = key(1e-5, "AdamW epsilon.")
    advantage_estimator: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus"] = key(
        "gae", "How rewards become advantages; only `gae` has a value model. rloo, grpo and dr_grpo compare the responses "
        "to one prompt and need num_generations of 2 or more."
    )  # fmt: skip
    kl_coef: float = key(0.05, "Weight of the KL penalty per token, in units of score per nat.")
    kl_estimator: Literal["k1", "k2", "k3"] = key(
        "k1", "Estimator of the penalty: k1 in the reward, k2 or k3 in the loss."
    )
    use_kl_loss: bool = key(False, "Penalise in the loss instead of in the reward; needs kl_estimator k2 or k3.")
    kl_target: float | None = key(
        None, "Adapt kl_coef so that the KL comes to this many nats per response (arXiv 1909.08593)."
    )
    kl_horizon: int = key(10_000, "With `kl_target`: episodes in which kl_coef changes by at most a fifth.")
    max_approx_kl: float | None = key(
        None, "End an update at the minibatch whose policy/approx_kl is above this, before its optimiser step."
    )
    cliprange: float = key(0.2, "Clip range of the probability ratio.")
    dual_clip: float | None = key(None, "Bound above 1 on the ratio where the advantage is negative, often 3.")
    cliprange_value: float = key(0.2, "Clip range of the value around its value at rollout.")
    gamma: float = key(1.0, "Discount.")
    lam: float = key(0.95, "Lambda of generalised advantage estimation.")
    normalize_scores: bool = key(
        False, "Subtract the running mean of all scores and divide by their running deviation."
    )
    score_clip: float | None = key(None, "Clip scores, after normalisation, to this either side of 0.")
    whiten_rewards: bool = key(False, "Scale rewards to unit variance before advantages.")
    entropy_coef: float = key(0.0, "Weight of the entropy bonus, mean over tokens, in nats.")
    value_warmup_updates: int = key(0, "First updates in which only the value model trains.")
    ema_decay: float | None = key(
        None, "Keep an exponential moving average of the policy with this decay per update, saved in `ema/`."
    )
    ptx_dataset: list[DataSource] = key(
        [],
        "Text or demonstrations whose likelihood is trained in the same optimiser steps (PPO-ptx, arXiv 2203.02155).",
    )
    ptx_coef: float = key(1.0, "Weight of their negative log-likelihood, mean over tokens, beside the PPO objective.")
    ptx_batch_size: int = key(64, "Rows of `ptx_dataset` per optimiser step over all devices.")
    value_deepspeed: str | None = key(None, "DeepSpeed JSON file of the value model, instead of `deepspeed`.")
    reference_deepspeed: str | None = key(None, "DeepSpeed JSON file of the reference model, instead of `deepspeed`.")
    reward_deepspeed: str | None = key(None, "DeepSpeed JSON file of the reward model, instead of `deepspeed`.")
    ds3_gather_for_generation: bool = key(
        True, "Under ZeRO-3 copy the gathered policy once per rollout; false when it does not fit."
    )
    max_kl: float | None = key(
        None,
        "The best checkpoint has the highest evaluation score among those with at most this KL (nats per response).",
    )
    num_sample_rows: int = key(8, "Rows of the sample table.")
    skip_self_checks: bool = key(False, "Start without the checks of models and rewards that precede the first update.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRecipe(TrainerRecipe):
    """`align classify`: a classifier or a regression on texts or pairs of texts, from an encoder or a decoder."""

    model_name_or_path: str = required("Encoder (BERT-like) or decoder to put the classification head on.")
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = key(
        None,
        "What `label` means, by transformers' name: one label per row (text or ids from 0), the list of those that apply, "
        "or a number. By default text and whole numbers are single labels, lists multiple ones, and fractions a regression.",
    )
    max_length: int = key(512, "Most tokens of a row; longer rows are bad rows.")


@dataclass(frozen=True, slots=True, kw_only=True)
class MLMRecipe(TrainerRecipe):
    """`align mlm`: continued pre-training of an encoder (BERT-like) on plain text by masked language modelling."""

    model_name_or_path: str = required(
        "Encoder to go on training; one without a masked-language-model head gets a new one."
    )
    learning_rate: float = key(5e-5, "Peak learning rate of AdamW.")
    mlm_probability: float = key(
        0.15,
        "Share of the tokens to predict: 80% of them masked, 10% replaced by a random token, 10% left as they are.",
    )
    max_length: int = key(
        512,
        "Most tokens of a piece, special tokens included: longer texts are cut into even pieces, of which none is lost.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRecipe:
    """`align evaluate`: several models, or one with and without examples in its prompt, on the same rows.

    Rows are read and split as the training stages do: with the same sources, `seed` and `eval_fraction`, the rows that
    a stage held out are evaluated here.
    """

    output_dir: str = required("Folder for `results.json`, `results.md` and `predictions.jsonl`.")
    stage: Literal["evaluate"] | None = key(None, "What this recipe is for.")
    seed: int = key(42, "Seed of splits, of the examples in prompts, of sampling and of resampling.")

    models: dict[str, str] = required(
        "Models to compare, the baseline first: a list of folders or hub ids, or a mapping of names to these."
    )

    train_dataset: list[DataSource] = key(
        [], "Rows that give the examples of `num_shots`; not needed for an `eval_dataset` without examples."
    )
    eval_dataset: list[DataSource] = key([], "Rows to evaluate; without it, the share that the stages hold out.")
    eval_fraction: float = key(0.05, "Share of the prompts held out when there is no `eval_dataset`.")
    max_eval_rows: int | None = key(None, "Evaluate on at most this many rows.")
    on_bad_row: Literal["error", "skip"] = key(
        "error",
        "What to do with rows that cannot be used, by one model or with one number of examples: refuse, or skip.",
    )
    chat_template_path: str | None = key(None, "Jinja file with the chat template, for models that have none.")

    metrics: list[str] = key(
        ["perplexity", "token_accuracy"],
        "perplexity, token_accuracy (of the reference), exact_match, accuracy, f1, bleu, rouge, chrf (of the prediction), "
        "or what `evaluate.load` takes, such as the path of a metric script. accuracy and f1 read labels back from templates.",
    )
    grader: str | None = key(
        None, "`module:function` with TRL's reward signature that gives each prediction a score from 0 to 1."
    )
    num_shots: list[int] = key([0], "Numbers of worked examples in the prompt; each is tried with each model.")
    max_length: int | None = key(
        None, "Most tokens of examples, prompt and answer; longer rows are bad rows. The model's own limit by default."
    )
    max_new_tokens: int = key(128, "Most tokens of a prediction.")
    temperature: float = key(0.0, "0 takes the likeliest token; above 0, sampling at this temperature.")
    stop_strings: list[str] = key([], "A prediction also ends before the first of these.")
    bootstrap_iters: int = key(1000, "Resamples of the rows behind each interval and p-value.")

    per_device_eval_batch_size: int = key(16, "Most rows in one forward pass per device.")
    bf16: bool = key(False, "Run the models in bfloat16.")
    attn_implementation: str | None = key(
        None, "Attention kernel, as in `from_pretrained`: sdpa, flash_attention_2, eager."
    )
    trust_remote_code: bool = key(False, "Allow code from the model's repository to run.")


RECIPES: dict[str, type[StageRecipe]] = {
    "sft": SFTRecipe,
    "reward": RewardRecipe,
    "ppo": PPORecipe,
    "classify": ClassifyRecipe,
    "mlm": MLMRecipe,
}
EVALUATE = "evaluate"  # the `stage` of a recipe that trains nothing
CLASSES: dict[str, type[StageRecipe] | type[EvaluateRecipe]] = {**RECIPES, EVALUATE: EvaluateRecipe}
