"""Hints for keys of TRL, transformers or another stage that this stage does not have."""

from __future__ import annotations

import dataclasses

from align.config.stages import STAGES

SAMPLING = (
    "do_sample top_k top_p min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty no_repeat_ngram_size "
    "encoder_repetition_penalty min_length min_new_tokens num_beams length_penalty bad_words_ids logits_processor"
)
_SAMPLED = (
    "refused: it would sample from another distribution than the one whose log-probabilities PPO compares; "
    "only `temperature` applies to both"
)
_GREEDY = "not supported: temperature 0 is greedy decoding, above 0 samples from the full distribution"
_DERIVED_SIZES = (
    "derived: set train_batch_size (rows per optimizer step over all devices) and per_device_train_batch_size"
)
_BY_STEPS = "not needed: set eval_steps, save_steps or logging_steps"
_RESUMES = "not needed: the same command resumes; delete output_dir to start over"
_NO_HUB = "not supported: upload output_dir afterwards with `hf upload`"
_NO_DROPOUT = "not supported: dropout is off in every stage"
TOKEN_BUDGETS = (  # of verl, OpenRLHF and slime
    *("ppo_max_token_len_per_gpu", "use_dynamic_bsz", "use_dynamic_batch_size", "max_tokens_per_gpu"),
    *("train_max_tokens_per_gpu", "max_tokens_per_batch"),
)
ANY_STAGE = {
    "gradient_accumulation_steps": _DERIVED_SIZES,
    "per_gpu_train_batch_size": "called per_device_train_batch_size here",
    "per_gpu_eval_batch_size": "called per_device_eval_batch_size here",
    "auto_find_batch_size": "not supported: set per_device_train_batch_size, which affects memory only",
    "fp16": "not supported: use bf16, or float32 by default",
    "fp32": "not needed: float32 is the default",
    "torch_dtype": "derived from bf16; the weights that train are float32",
    "dtype": "derived from bf16; the weights that train are float32",
    "optimizer": "called optim here",
    "momentum": "part of optim_args here, with optim: sgd or rmsprop",
    "adam_betas": "called adam_beta1 and adam_beta2 here",
    "optim_target_modules": "not supported: it is for GaLore and APOLLO, which `optim` does not offer",
    "warmup_ratio": "called warmup_steps here; a number below 1 is a share of all steps",
    "lr_scheduler": "called lr_scheduler_type here",
    "eval_strategy": _BY_STEPS,
    "evaluation_strategy": _BY_STEPS,
    "save_strategy": _BY_STEPS,
    "logging_strategy": _BY_STEPS,
    "logging_dir": "not supported: metrics go to metrics.jsonl in output_dir, and to W&B with report_to",
    "greater_is_better": "derived: false if metric_for_best_model ends in loss, perplexity, gap or forgetting",
    "resume_from_checkpoint": _RESUMES,
    "overwrite_output_dir": _RESUMES,
    "push_to_hub": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_token": _NO_HUB,
    "dataset": "called train_dataset here",
    "dataset_name": "called train_dataset here, with eval_dataset beside it",
    "dataset_config": "called `name` here, inside train_dataset",
    "dataset_train_split": "called `split` here, inside train_dataset",
    "dataset_test_split": "called `split` here, inside eval_dataset",
    "lora_dropout": _NO_DROPOUT,
    "disable_dropout": _NO_DROPOUT,
    "use_peft": "called method: lora here",
    "use_dora": "called method: dora here",
    "load_in_4bit": "called method: qlora here",
    "group_by_length": "called train_sampling_strategy: group_by_length here",
    "packing_strategy": "derived: examples are not split, except plain text longer than max_length",
    "max_seq_length": "called max_length here",
    "assistant_only_loss": "called completion_only_loss here; in `messages` it trains on every assistant turn",
    "wandb_project": "called project here",
}
OF_STAGE = {
    "classify": {
        "class_weight": "called class_weights here",
        "pos_weight": "called class_weights here, for rows with one label each",
        "focal_loss": "not supported: it was measured and did not help, see docs/fine-tuning.md",
        "num_labels": "derived from the labels of the training rows",
        "id2label": "derived: text labels get ids in alphabetical order; whole numbers are ids",
        "label2id": "derived: text labels get ids in alphabetical order; whole numbers are ids",
        "label_names": "derived: the labels are in the column `label`; map another to it under `columns:`",
    },
    "token-classification": {
        "num_labels": "derived from the tags of the training rows",
        "id2label": "derived: O, then B- and I- of each type in alphabetical order",
        "label2id": "derived: O, then B- and I- of each type in alphabetical order",
        "label_list": "called label_names here, for tags in ids",
        "max_seq_length": "called max_length here",
        "label_all_tokens": "derived: all tokens of a word have its label; predictions are read at the first",
        "text_column_name": "map the column to `tokens` or `text` under `columns:`",
        "label_column_name": "map the column to `tags` or `spans` under `columns:`",
    },
    "question-answering": {
        "max_seq_length": "called max_length here",
        "n_best_size": "derived: every first and last token of a window within max_answer_length is tried",
        "version_2_with_negative": "derived: whether training rows have no answers",
        "null_score_diff_threshold": "derived: 0; answers have their scores in what `align predict` writes",
    },
    "mlm": {
        "mask_probability": "called mlm_probability here",
        "line_by_line": "not needed: each row is a text; longer ones are split into pieces of max_length tokens",
        "wwm": "called whole_word_mask here",
        "nsp": "called next_sentence_prediction here",
    },
    "ppo": {
        "gradient_accumulation_steps": "derived: set minibatch_size (responses per optimizer step over all devices) "
        "and per_device_train_batch_size",
        "num_mini_batches": "derived: set minibatch_size; there are rollout_batch_size / minibatch_size of them",
        "mini_batch_size": "called minibatch_size here",
        "train_batch_size": "called minibatch_size here (per optimizer step) and rollout_batch_size (per update)",
        "batch_size": "called rollout_batch_size here",
        "local_batch_size": "derived: set rollout_batch_size, which is over all devices",
        "local_rollout_forward_batch_size": "called per_device_eval_batch_size here",
        "num_train_epochs": "called total_episodes here (responses in the run), with num_ppo_epochs per rollout",
        **dict.fromkeys(TOKEN_BUDGETS, "called max_tokens_per_device here"),
        "max_steps": "called total_episodes here; an update takes rollout_batch_size of them",
        "max_length": "called max_prompt_length and response_length here",
        "max_new_tokens": "called response_length here",
        "model_name_or_path": "called sft_model_path here",
        "num_sample_generations": "called eval_steps here, with num_sample_rows",
        "num_total_batches": "derived: total_episodes / rollout_batch_size",
        "exp_name": "called run_name here",
        "init_kl_coef": "called kl_coef here",
        "adap_kl_ctrl": "called kl_target here: kl_coef adapts to it when it is set",
        "target": "called kl_target here, in nats per response",
        "horizon": "called kl_horizon here",
        "target_kl": "called max_approx_kl here when it ends an update early, kl_target when kl_coef adapts to it",
        "early_stopping": "called max_approx_kl here when it ends an update, early_stopping_patience when it ends the run",
        "load_best_model_at_end": "derived: with evaluation prompts the best policy is in best/, the last in output_dir",
        "beta": "called kl_coef here",
        "adv_estimator": "called advantage_estimator here",
        "buffer_size": "called replay_size here, in rollout batches",
        "use_score_scaling": "called normalize_scores here",
        "use_score_norm": "called normalize_scores here",
        "scale_rewards": "derived: advantage_estimator grpo divides by the standard deviation of a prompt's scores, "
        "dr_grpo does not",
        "loss_type": "derived from advantage_estimator: grpo is a mean over responses, dr_grpo over response_length, "
        "others over tokens",
        "n_samples_per_prompt": "called num_generations here",
        "vf_coef": "not supported: policy and value model have optimizers of their own; set value_learning_rate",
        "stop_token": "derived: a response ends at the tokenizer's end-of-text token",
        "stop_token_id": "derived: a response ends at the tokenizer's end-of-text token",
        "whiten_advantages": "not needed: advantages are always whitened over all devices",
    },
    "evaluate": {
        "model": "called models here, a list or a mapping of names to folders or hub ids",
        "model_name_or_path": "called models here, a list or a mapping of names to folders or hub ids",
        "tasks": "called eval_dataset here: rows are data sources, measured by metrics or a grader",
        "num_fewshot": "called num_shots here, a list",
        "batch_size": "called per_device_eval_batch_size here",
        "limit": "called max_eval_rows here",
        "until": "called stop_strings here",
        "max_gen_toks": "called max_new_tokens here",
        "response_length": "called max_new_tokens here",
        "reward_funcs": "called grader here, one function",
        "eval_reward_funcs": "called grader here, one function",
        "deepspeed": "not supported: every process holds complete models, and evaluates its share of the rows",
    },
    "judge-reward": {
        "model_name_or_path": "called reward_model_path here",
        "model": "called reward_model_path here",
        "sft_model_path": "called policy_path here",
        "batch_size": "called per_device_eval_batch_size here",
        "max_new_tokens": "called response_length here",
        "deepspeed": "not supported: every process holds the whole model, and scores its share of the rows",
    },
    "bon": {
        "model": "called model_name_or_path here",
        "sft_model_path": "called model_name_or_path here",
        "n": "called num_generations here",
        "best_of": "called num_generations here",
        "n_samples_per_prompt": "called num_generations here",
        "eval_dataset": "called train_dataset here: every prompt is sampled for, and no row is held out",
        "eval_reward_funcs": "called judge_reward_funcs here",
        "batch_size": "called per_device_eval_batch_size here",
        "max_new_tokens": "called response_length here",
        "deepspeed": "not supported: every process holds complete models, and samples its share of the responses",
    },
}
# Values of `method` in other libraries that do not exist here.
METHODS_ELSEWHERE = {
    **dict.fromkeys(("adapter", "adapters", "seq_bn", "double_seq_bn"), "called bottleneck here"),
    **{name: f"called bottleneck here, with bottleneck_placement: {name}" for name in ("houlsby", "pfeiffer")},
}


def explain(stage: str, name: str) -> str | None:
    """The clause that follows "unknown key", or None when only a nearest key can help."""
    if name in SAMPLING.split():
        return f"; {_SAMPLED if stage != 'evaluate' else _GREEDY}"
    if known := OF_STAGE.get(stage, {}).get(name) or ANY_STAGE.get(name):
        return f"; {known}"
    training = [each for each in STAGES.values() if each.methods]
    owners = [each.name for each in training if name in {field.name for field in dataclasses.fields(each.recipe)}]
    if owners:
        stages = f"stage{'s' if len(owners) > 1 else ''}"
        return f"; it belongs to the {' and '.join(owners)} {stages}, but this recipe is for {stage}"
    return None
