"""Stage 1: supervised fine-tuning of a language model on demonstrations, by TRL's SFTTrainer.

    align sft recipes/quickstart/1_sft.yaml
    deepspeed --num_gpus 8 --module align.sft recipes/hh-rlhf/1_sft.yaml

An encoder-decoder (T5, BART) is trained by transformers' Trainer instead (`align/sft/encoder_decoder.py`).

Rows are tokenized here rather than by TRL, so that EOS, chat template, labels and length limits are those of the other
stages. The objective, and what keeps it exact, is in `align/sft/trainer.py`. With `model_config` the stage first trains a
tokenizer on its rows and starts from a random model.
"""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig

from align.compat.trl import router_settings
from align.config.sft import SFTRecipe
from align.data.batches import pad_to_batches
from align.data.duplicates import describe_duplicates
from align.data.end_tokens import end_texts
from align.data.load import Rows
from align.engine.batch_plan import batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import World, connect, disconnect
from align.engine.sequence_parallel import SequenceGroup
from align.engine.sharding import load_device, sharded_load
from align.models.bottleneck import continue_adapter
from align.models.from_scratch import scratch_config, write_scratch_model
from align.models.load import adapter_base, language_model_class, load_policy
from align.models.model_types import is_encoder_decoder
from align.models.quantization import cast_trained_to_float32, quantization_kwargs
from align.models.tokenizer import keep_ends
from align.models.trainable import check_target_modules, freeze, parameter_counts, peft_config
from align.runs.checkpoint import step_of
from align.runs.manifest import open_stage
from align.runs.markdown import code_span, markdown_text, python_text
from align.runs.output_folder import one_run_per_folder
from align.runs.quiet import quiet
from align.runs.results import SFTResult
from align.runs.stage import finish, finished_results, last_checkpoint, write_untrained
from align.runs.tracker import Tracker
from align.sft.encoder_decoder import pair_trainer
from align.sft.evaluated_trainer import DemonstrationEvaluation
from align.sft.fused_head import fused_head_is_exact, has_router_loss
from align.sft.inputs import load_config_and_tokenizer
from align.sft.report import (
    forgetting_warning,
    history_section,
    loss_curves,
    retention_lines,
    sft_results,
    write_loss_chart,
)
from align.sft.responses import response_evaluation
from align.sft.retention import load_with_retention
from align.sft.rows import tokenize_rows
from align.sft.trainer import DemonstrationTrainer
from align.trainer.arguments import eval_batch_size, total_steps, training_arguments
from align.trainer.hf_trainer import evaluation_logs, save_trained, train
from reward_models.bottleneck import base_of


@one_run_per_folder
def run(recipe: SFTRecipe) -> SFTResult:
    """Fine-tune a language model; returns the results, which are also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return SFTResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe), tf32=recipe.tf32)
    plan = batch_plan(recipe, world.size)

    sequence = None
    if recipe.sequence_parallel_size > 1:
        sequence = SequenceGroup(world, recipe.sequence_parallel_size)

    # Rows, and the model to start from
    rows, retention = load_with_retention(recipe)
    checkpoint = last_checkpoint(recipe, world, rows.report)
    resuming = checkpoint is not None
    start = recipe.model_name_or_path or _random_model(recipe, world, rows, resuming)
    config, tokenizer = load_config_and_tokenizer(start, recipe)
    start = base_of(start)  # a bottleneck adapter is put on it below
    pairs = is_encoder_decoder(config)  # trained by another Trainer
    # Tried on small models here: later, models are sharded as they are made.
    # A loss with label smoothing is of all logits: an evaluation by other modules would confuse what ZeRO-3 fetches ahead.
    smoothed = recipe.label_smoothing_factor > 0
    fused_head = not pairs and not smoothed and fused_head_is_exact(config, recipe.trust_remote_code)
    router = {} if pairs else router_settings(config, has_router_loss(config, recipe.trust_remote_code))
    data = tokenize_rows(recipe, rows, retention, tokenizer, config)
    responses = response_evaluation(recipe, rows.evaluation, tokenizer, config, world)
    world.check_rows(len(data.train), plan.world_size)
    train_rows = pad_to_batches(data.train, plan.batch_size)
    eval_rows = None
    if data.evaluation is not None:
        size = eval_batch_size(recipe, len(data.evaluation.rows), plan.world_size)
        eval_rows = pad_to_batches(data.evaluation.rows, plan.world_size * size)

    # Training
    steps = total_steps(recipe, len(train_rows), plan)
    with Tracker(recipe, "sft", steps, resume_step=step_of(checkpoint)) as tracker:
        tracker.say(plan.describe())
        if (line := describe_duplicates(rows.report)) is not None:
            tracker.say(line)
        for line in retention_lines(rows.report, data.num_train, data.num_replayed):
            tracker.say(line)
        # An adapter is merged, and weights are quantized, before ZeRO-3 shards them.
        whole = adapter_base(start) is not None or recipe.method == "qlora"
        with contextlib.nullcontext() if whole else sharded_load(recipe):
            model = load_policy(
                start,
                auto=language_model_class(config),
                attn_implementation=recipe.attn_implementation,
                trust_remote_code=recipe.trust_remote_code,
                device=None if whole else load_device(world),
                **quantization_kwargs(recipe.method, recipe.bf16),
            )
        keep_ends(model, tokenizer)
        check_target_modules(model, recipe.lora_target_modules)
        freeze(model, model.get_output_embeddings(), recipe.method, recipe.freeze_layers, recipe.trainable_pattern)
        set_seed(recipe.seed)  # TRL 1.14 initializes adapters unseeded
        arguments = training_arguments(recipe, plan, world, eval_rows, resuming)
        common: dict[str, Any] = {
            "evaluation": data.evaluation,
            "responses": responses,
            "tracker": tracker,
            "max_forgetting": recipe.max_forgetting,
            "train_dataset": train_rows,
            "eval_dataset": eval_rows,
            "processing_class": tokenizer,
        }
        trainer: DemonstrationEvaluation
        if pairs:
            trainer = pair_trainer(recipe, model, arguments, **common)
        else:
            trainer = DemonstrationTrainer(
                example_mean=recipe.loss_normalization == "example_mean",
                fused_head=fused_head,
                sequence=sequence,
                model=model,
                args=SFTConfig(
                    **arguments,
                    dataset_kwargs={"skip_prepare_dataset": True},
                    loss_type="nll",
                    padding_free=recipe.packing or recipe.padding_free,
                    neftune_noise_alpha=recipe.neftune_noise_alpha,
                    label_smoothing_factor=recipe.label_smoothing_factor,
                    **router,
                ),
                peft_config=peft_config(recipe, model.config, "CAUSAL_LM"),
                **common,
            )
        continue_adapter(trainer.model, recipe.model_name_or_path)
        cast_trained_to_float32(trainer.model)
        trained, total = parameter_counts(trainer.model)
        tracker.say(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
        before, after = train(trainer, recipe, tracker, checkpoint)
        save_trained(
            trainer,
            recipe,
            world,
            lambda: keep_ends(
                load_policy(
                    start,
                    auto=language_model_class(config),
                    attn_implementation=recipe.attn_implementation,
                    trust_remote_code=recipe.trust_remote_code,
                ),
                tokenizer,
            ),
        )

        # Results
        history = evaluation_logs(trainer)
        results = {"trained_parameters": trained, **sft_results(before, after, steps, recipe.eval_metrics)}
        if history:
            evaluated_at = [int(entry["step"]) for entry in history]
            tracker.chart(evaluated_at[-1], "losses", evaluated_at, loss_curves(history))
        best_step = trainer.state.best_global_step
        if line := forgetting_warning(after, recipe.max_forgetting, best_step, recipe.load_best_model_at_end):
            tracker.say(line)
        if world.is_main:
            if history:
                write_loss_chart(recipe.output_dir, history)
            num_rows = {"replayed_rows": data.num_replayed, "train_rows": len(rows.train) + data.num_replayed}
            report = {**rows.report, **num_rows, "skipped": data.skipped}
            card = _model_card(recipe, config, tokenizer) + history_section(history)
            finish(recipe, tokenizer, report, results, card)
    world.barrier()
    disconnect()
    return SFTResult.from_json(recipe.output_dir, results)


def _random_model(recipe: SFTRecipe, world: World, rows: Rows, resuming: bool) -> str:
    """Write the random model of `model_config`, with a tokenizer trained on the rows; returns its folder."""
    config = scratch_config(recipe.model_config, recipe.tokenizer_vocab_size)
    return write_untrained(
        recipe.output_dir,
        recipe.seed,
        world,
        resuming,
        lambda folder: write_scratch_model(
            config,
            rows.train,
            folder,
            tokenizer_vocab_size=recipe.tokenizer_vocab_size,
            chat_template_path=recipe.chat_template_path,
            seed=recipe.seed,
        ),
    )


def _model_card(recipe: SFTRecipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    return CARD.format(
        folder=python_text(recipe.output_dir),
        base=markdown_text(recipe.model_name_or_path or f"a random {config.model_type} model"),
        auto=language_model_class(config).__name__,
        does="answers" if is_encoder_decoder(config) else "continues",
        prompts="messages in its chat template" if tokenizer.chat_template else "plain text",
        eos=" or ".join(map(code_span, end_texts(tokenizer))),
    )


CARD = """# A fine-tuned language model

Trained from {base} by the `sft` stage of align: it {does} {prompts} as the demonstrations do, and ends with {eos}.

```python
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
```
"""
