"""Continued pre-training of an encoder (BERT-like) on plain text, by masked language modeling.

A T5-like encoder-decoder learns to fill in spans instead (`align/encoders/span_corruption.py`), a BART-like one to write the
text without gaps (`align/encoders/text_infilling.py`).

    align mlm recipe.yaml
    deepspeed --num_gpus 8 --module align mlm recipe.yaml

Rows are {text}. A text of more than `max_length` tokens is split into even pieces instead of being a bad row. The mask
of a piece is a function of seed, epoch and piece, whatever its batch and rank; held-out pieces have one mask for all
evaluations. The loss of an optimizer step is the sum over the masked tokens of all microbatches and ranks, divided by
their number.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from align.config.encoders import NSP_METRICS, MLMRecipe
from align.data.batches import pad_to_batches
from align.data.load import DataSettings, load_rows
from align.data.rows import Passage
from align.encoders.method import apply_method
from align.encoders.mlm_inputs import check_mlm_inputs, corruption, cut, model_to_train
from align.encoders.mlm_trainer import MaskedTrainer
from align.encoders.sentence_pairs import SentencePairTrainer
from align.encoders.tokenize import piece_length
from align.engine.batch_plan import batch_plan
from align.engine.deepspeed_config import uses_deepspeed
from align.engine.distributed import connect, disconnect
from align.maths.perplexity import perplexity
from align.models.load import load_masked_lm
from align.models.model_types import is_encoder_decoder
from align.models.new_modules import new_modules
from align.runs.checkpoint import step_of
from align.runs.manifest import open_stage
from align.runs.markdown import code_span, markdown_text, python_text
from align.runs.output_folder import one_run_per_folder
from align.runs.quiet import quiet
from align.runs.results import MLMResult
from align.runs.stage import finish, finished_results, last_checkpoint, write_untrained
from align.runs.tables import markdown_table
from align.runs.tracker import Tracker
from align.trainer.arguments import eval_batch_size, total_steps, training_arguments
from align.trainer.hf_trainer import save_trained, train
from align.trainer.row_trainer import row_training_arguments
from reward_models.bottleneck import base_of


@one_run_per_folder
def run(recipe: MLMRecipe) -> MLMResult:
    """Continue the pre-training of an encoder; returns the results, which are also in `stage.json`."""
    quiet()
    if open_stage(recipe):
        return MLMResult.from_json(recipe.output_dir, finished_results(recipe.output_dir))
    world = connect(uses_deepspeed(recipe), tf32=recipe.tf32)
    plan = batch_plan(recipe, world.size)
    config, tokenizer = check_mlm_inputs(recipe)
    rows = load_rows(DataSettings.from_recipe(recipe), Passage)
    length = piece_length(tokenizer, config, recipe.max_length)
    pieces = cut(recipe, rows.train, tokenizer, length, "train_dataset")
    world.check_rows(len(pieces))
    train_rows = pad_to_batches(pieces, plan.batch_size)
    pairs = is_encoder_decoder(config)
    auto = model_to_train(recipe, config)
    masking = corruption(recipe, tokenizer, config)
    eval_rows = None
    if rows.evaluation:
        eval_rows = masking.mask_once(cut(recipe, rows.evaluation, tokenizer, length, "eval_dataset"))
        eval_rows = pad_to_batches(eval_rows, world.size * eval_batch_size(recipe, len(eval_rows), world.size))
    steps = total_steps(recipe, len(train_rows), plan)

    checkpoint = last_checkpoint(recipe, world, rows.report)
    start = write_untrained(
        recipe.output_dir, recipe.seed, world, checkpoint is not None, partial(write_masked_lm, recipe, auto)
    )
    with Tracker(recipe, "mlm", steps, resume_step=step_of(checkpoint)) as tracker:
        tracker.say(plan.describe())
        made = "pairs of pieces" if recipe.next_sentence_prediction else "pieces"
        tracker.say(f"{len(rows.train)} texts in {len(pieces)} {made} of up to {length} tokens, by {masking.objective}")
        arguments = row_training_arguments(
            training_arguments(recipe, plan, world, eval_rows, resuming=checkpoint is not None)
        )
        load_untrained = partial(
            load_masked_lm,
            start,
            auto=auto,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
        )
        model: Any = load_untrained()
        whole = new_modules(model, base_of(recipe.model_name_or_path))
        model = apply_method(model, recipe, "FEATURE_EXTRACTION", model.get_output_embeddings(), whole)
        trainer = (SentencePairTrainer if recipe.next_sentence_prediction else MaskedTrainer)(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=masking,
            processing_class=tokenizer,
        )
        before, after = train(trainer, recipe, tracker, checkpoint)
        save_trained(trainer, recipe, world, load_untrained)
        results = mlm_results(before, after, steps, "target" if pairs else "masked")
        if results["table"]:
            tracker.say("\n" + markdown_table(["measure", "before", "after"], results["table"]))
        if world.is_main:
            data = {**rows.report, "pieces": len(pieces)}
            card = (PAIR_CARD if pairs else CARD).format(
                folder=python_text(recipe.output_dir),
                base=markdown_text(recipe.model_name_or_path),
                mask=code_span(str(tokenizer.mask_token)),
                objective=masking.objective,
            )
            finish(recipe, tokenizer, data, results, card)
    world.barrier()
    disconnect()
    return MLMResult.from_json(recipe.output_dir, results)


def write_masked_lm(recipe: MLMRecipe, auto: Any, folder: Path) -> None:
    """Write the model that training starts from. An encoder without a masked-language-model head gets a new one."""
    load_masked_lm(
        base_of(recipe.model_name_or_path),
        auto=auto,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
    ).save_pretrained(folder)


def mlm_results(
    before: dict[str, float], after: dict[str, float], steps: int, predicted: str = "masked"
) -> dict[str, Any]:
    """The stage's results from the evaluation logs before and after training; without evaluation, the steps alone.

    Args:
        predicted: what the tokens that are predicted are called.
    """
    results: dict[str, Any] = {"steps": steps, "table": []}
    if not after:
        return results
    for suffix, log in (("_before", before), ("", after)):
        results[f"eval_loss{suffix}"] = log["eval_loss"]
        results[f"eval_accuracy{suffix}"] = log["eval_accuracy"]
        results |= {f"eval_{name}{suffix}": log[f"eval_{name}"] for name in NSP_METRICS if f"eval_{name}" in log}
    results["table"] = [
        [f"held-out loss (nats/{predicted} token)", before["eval_loss"], after["eval_loss"]],
        [f"held-out perplexity of {predicted} tokens", perplexity(before["eval_loss"]), perplexity(after["eval_loss"])],
        [f"held-out accuracy on {predicted} tokens", before["eval_accuracy"], after["eval_accuracy"]],
    ]
    for name, measure in zip(NSP_METRICS, ("loss (nats/pair)", "accuracy"), strict=True):
        if f"eval_{name}" in results:
            row = [f"held-out next-sentence {measure}", results[f"eval_{name}_before"], results[f"eval_{name}"]]
            results["table"].append(row)
    return results


CARD = """# A masked language model

Trained from {base} by the `mlm` stage of align: it fills in {mask}. The stages `classify` and `reward` can start from it.

```python
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
```
"""
PAIR_CARD = """# An encoder-decoder that fills in spans

Trained from {base} by the `mlm` stage of align, by {objective}. The stage `sft` can start from it.

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained({folder})
tokenizer = AutoTokenizer.from_pretrained({folder})
```
"""
