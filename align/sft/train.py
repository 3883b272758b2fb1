"""Stage 1: supervised fine-tuning of a language model on demonstrations, by TRL's SFTTrainer.

    align sft recipes/quickstart/1_sft.yaml
    deepspeed --num_gpus 8 --module align.sft recipes/hh-rlhf/1_sft.yaml

Rows are tokenised here, so that end-of-text, chat template, labels and what is too long are ours to decide. The
objective, and how it stays exact, is in `align/sft/trainer.py`.
With `model_config` the stage first trains a tokenizer on its rows and starts from a random model.
"""

from __future__ import annotations

from transformers import set_seed
from trl import SFTConfig

from align.config.sft import SFTRecipe
from align.data.batches import pad_to_batches
from align.data.duplicates import describe_duplicates
from align.engine.batch_plan import batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import connect, disconnect
from align.errors import UserError
from align.models.from_scratch import scratch_config, write_scratch_model
from align.models.load import is_encoder, load_config, load_policy
from align.models.tokenizer import load_tokenizer
from align.models.trainable import cast_trained_to_float32, freeze, parameter_counts, peft_config, quantization
from align.runs.manifest import check_tokenizer, open_stage
from align.runs.quiet import quiet
from align.runs.results import SFTResult
from align.runs.stage import finish, finished_results, last_checkpoint, step_of, write_untrained
from align.runs.tracker import Tracker
from align.sft.report import bound_line, closing_numbers, course, curves, retention_lines, write_picture
from align.sft.responses import questions
from align.sft.retention import load_with_retention
from align.sft.rows import token_rows
from align.sft.trainer import DemonstrationTrainer
from align.trainer.hf_trainer import eval_batch_size, evaluations, save_trained, total_steps, train, training_arguments


def run(recipe: SFTRecipe) -> SFTResult:
    """Fine-tune a language model; returns the closing numbers, also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return SFTResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe))
    plan = batch_plan(recipe, world.size)
    rows, retention = load_with_retention(recipe)
    checkpoint = last_checkpoint(recipe, world)
    if (start := recipe.model_name_or_path) is None:
        config = scratch_config(recipe)
        start = write_untrained(
            recipe.output_dir,
            recipe.seed,
            world,
            checkpoint is not None,
            lambda folder: write_scratch_model(recipe, config, rows.train, folder),
        )
    config = load_config(start, recipe, "model_name_or_path")
    if is_encoder(config):
        raise UserError(
            f"model_name_or_path: {start} is an encoder ({config.model_type}); name a model that generates."
        )
    tokenizer = load_tokenizer(start, recipe)
    check_tokenizer(start, tokenizer, "model_name_or_path")
    tokens = token_rows(recipe, rows, retention, tokenizer, config)
    asked = questions(recipe, rows.evaluation, tokenizer, config, world)
    world.check_rows(len(tokens.train))
    train_rows = pad_to_batches(tokens.train, plan.batch_size)
    eval_rows = None
    if tokens.measured is not None:
        size = eval_batch_size(recipe, len(tokens.measured.rows), world)
        eval_rows = pad_to_batches(tokens.measured.rows, world.size * size)

    steps = total_steps(recipe, len(train_rows), plan)
    with Tracker(recipe, "sft", steps, resume_step=step_of(checkpoint)) as tracker:
        tracker.say(plan.describe())
        if (line := describe_duplicates(rows.report)) is not None:
            tracker.say(line)
        for line in retention_lines(rows.report, tokens.target, tokens.replayed):
            tracker.say(line)
        arguments = SFTConfig(
            **training_arguments(recipe, plan, world, eval_rows, resuming=checkpoint is not None),
            dataset_kwargs={"skip_prepare_dataset": True},
            loss_type="nll",
            padding_free=recipe.packing or recipe.padding_free,
            neftune_noise_alpha=recipe.neftune_noise_alpha,
            label_smoothing_factor=recipe.label_smoothing_factor,
        )
        model = load_policy(start, recipe, **quantization(recipe))
        freeze(model, recipe, model.get_output_embeddings())
        set_seed(recipe.seed)  # for the first weights of an adapter, which TRL 1.14 draws without one
        trainer = DemonstrationTrainer(
            example_mean=recipe.loss_normalization == "example_mean",
            measured=tokens.measured,
            questions=asked,
            tracker=tracker,
            max_forgetting=recipe.max_forgetting,
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft_config(recipe, "CAUSAL_LM"),
        )
        cast_trained_to_float32(trainer.model)
        trained, whole = parameter_counts(trainer.model)
        tracker.say(f"{trained:,} of {whole:,} parameters are trained ({trained / whole:.2%})")
        before, after = train(trainer, recipe, tracker, checkpoint)
        save_trained(trainer, recipe, world, lambda: load_policy(start, recipe))
        history = evaluations(trainer)
        results = {"trained_parameters": trained, **closing_numbers(before, after, steps, recipe.eval_metrics)}
        if history:
            tracker.chart(
                int(history[-1]["step"]), "losses", [int(entry["step"]) for entry in history], curves(history)
            )
        if (line := bound_line(after, trainer.state.best_global_step, recipe)) is not None:
            tracker.say(line)
        if world.is_main:
            if history:
                write_picture(recipe.output_dir, history)
            replayed = {"replayed_rows": tokens.replayed, "train_rows": rows.report["train_rows"] + tokens.replayed}
            data = {**rows.report, **replayed, "skipped": tokens.skipped}
            card = CARD.format(
                folder=recipe.output_dir,
                base=recipe.model_name_or_path or f"a random {config.model_type} model",
                prompts="messages in its chat template" if tokenizer.chat_template else "plain text",
                eos=tokenizer.eos_token,
            )
            finish(recipe, tokenizer, data, results, card + course(history))
    world.barrier()
    disconnect()
    return SFTResult.from_json(recipe.output_dir, results)


CARD = """# A fine-tuned language model

Trained from {base} by the `sft` stage of align: it continues {prompts} as the demonstrations do, and ends with `{eos}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""
