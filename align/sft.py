"""Stage 1: supervised fine-tuning of a language model on demonstrations, by TRL's SFTTrainer.

    align sft recipes/quickstart/1_sft.yaml
    deepspeed --num_gpus 8 --module align.sft recipes/hh-rlhf/1_sft.yaml

Rows are tokenised here, so that end-of-text, chat template, labels and what is too long are ours to decide. The
objective, and how it stays exact, is in `align/sft_trainer.py`.
With `model_config` the stage first trains a tokenizer on its rows and starts from a random model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig

from align.checkpoint import open_stage
from align.config import SFTRecipe, UserError
from align.data import Demonstration, render_text
from align.duplicates import duplicates_line
from align.engine import connect, disconnect
from align.eval_responses import questions
from align.methods import freeze, parameter_counts, peft_config, quantization, train_in_float32
from align.models import is_encoder, load_config, load_policy, load_tokenizer
from align.recipes import batch_plan, stage_inputs
from align.retention import load_with_retention
from align.sft_report import bound_line, closing_numbers, course, curves, retention_lines, write_picture
from align.sft_rows import token_rows
from align.sft_trainer import DemonstrationTrainer
from align.stage import (
    already_finished,
    check_tokenizer,
    finish,
    last_checkpoint,
    step_of,
    write_untrained,
)
from align.strict import nearest
from align.tokenization import pad_to_batches
from align.tracking import Tracker, quiet
from align.trainers import (
    eval_batch_size,
    evaluations,
    save_trained,
    total_steps,
    train,
    training_arguments,
)

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]


def run(recipe: SFTRecipe) -> dict[str, Any]:
    """Fine-tune a language model; returns the closing numbers, also in `stage.json`."""
    quiet()
    inputs = stage_inputs(recipe)
    if open_stage(recipe, "sft", inputs):
        return already_finished(recipe)
    world = connect(recipe)
    plan = batch_plan(recipe, world.size)
    rows, retention = load_with_retention(recipe)
    checkpoint = last_checkpoint(recipe, world)
    if (start := recipe.model_name_or_path) is None:
        config = scratch_config(recipe)
        start = write_untrained(
            recipe, world, checkpoint is not None, lambda folder: write_scratch(recipe, config, rows.train, folder)
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
        if (line := duplicates_line(rows.report)) is not None:
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
        train_in_float32(trainer.model)
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
            finish(recipe, "sft", inputs, tokenizer, data, results, card + course(history))
    world.barrier()
    disconnect()
    return results


def scratch_config(recipe: SFTRecipe) -> PretrainedConfig:
    """The configuration of a model to train from scratch; vocabulary and special ids come from its tokenizer.

    Raises:
        UserError: an unknown architecture or key, or values that do not go together.
    """
    given = dict(recipe.model_config)
    model_type = given.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type)
        known_keys = {*known.to_dict(), *known.attribute_map} - {
            "vocab_size",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        }
        for name in given:
            if name not in known_keys:
                raise UserError(f"model_config: {model_type} has no key {name!r} to set{nearest(name, known_keys)}")
        config: PretrainedConfig = AutoConfig.for_model(model_type, **given)
        AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise UserError(f"model_config: {model_type} is no architecture that generates; take llama or gpt2.") from error
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model_config: transformers cannot make this {model_type}: {reason}") from error
    if recipe.tokenizer_vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UserError(
            f"tokenizer_vocab_size: expected at least {256 + len(SPECIAL_TOKENS)} (all bytes and "
            f"{', '.join(SPECIAL_TOKENS)}), got {recipe.tokenizer_vocab_size}."
        )
    return config


def write_scratch(recipe: SFTRecipe, config: PretrainedConfig, rows: Sequence[Demonstration], folder: Path) -> None:
    """Write a random model, and a tokenizer trained on the rows, as a Hugging Face folder."""
    tokenizer = train_tokenizer(
        [render_text(turns) for row in rows for turns in (row.prompt, row.completion)], recipe.tokenizer_vocab_size
    )
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if recipe.chat_template_path is not None:
        tokenizer.chat_template = Path(recipe.chat_template_path).read_text(encoding="utf-8")
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = range(len(SPECIAL_TOKENS))
    set_seed(recipe.seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens, which knows every text and begins it with <s>."""
    pad, bos, eos = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


CARD = """# A fine-tuned language model

Trained from {base} by the `sft` stage of align: it continues {prompts} as the demonstrations do, and ends with `{eos}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""

if __name__ == "__main__":
    from align.__main__ import run_stage_cli

    run_stage_cli("sft")
