"""Inputs of `align evaluate`: the rows and every model's prompts in token ids, checked before weights are loaded."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, TypeVar

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from align.config.evaluate import EvaluateRecipe
from align.config.judge_reward import JudgeRewardRecipe
from align.config.stages import STAGES
from align.data.chat_template import set_template_kwargs
from align.data.encode import encode_example, encode_prompt
from align.data.findings import print_note
from align.data.load import DataSettings, load_rows
from align.data.reasoning import scored_turns, scores_reasoning, set_scores_reasoning
from align.data.rows import BadRows, Demonstration, Turns, render_text, tools_of
from align.data.turn_end import turn_end_note
from align.errors import BadRow, UserError
from align.evaluate.few_shot import (
    SEPARATOR,
    draw_examples,
    ends_at_separator,
    example_pools,
    few_shot_prompt,
    pool_for,
)
from align.models.causality import check_causal
from align.models.check_files import check_files
from align.models.context_length import max_positions
from align.models.load import adapter_settings, load_config
from align.models.model_types import is_encoder
from align.models.tokenizer import load_tokenizer
from align.models.virtual_tokens import check_takes_virtual_tokens, prompt_tuning_base
from align.runs.manifest import check_template_kwargs, read_manifest

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedRow:
    """An evaluation row as one model reads it.

    Attributes:
        prompt: with the few-shot examples.
        prompt_ids: from which the model writes its response.
        ids: of the prompt and the reference response, end-of-text included.
        reference_start: index of the reference's first id.
        stop_strings: a prediction is cut before the first of these.
    """

    prompt: Turns
    prompt_ids: list[int]
    ids: list[int]
    reference_start: int
    stop_strings: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class EvalSetting:
    """A model, loaded from `path`, with a number of few-shot examples in each prompt."""

    model: str
    path: str
    num_shots: int
    tokenizer: PreTrainedTokenizerBase
    rows: list[EncodedRow]


@dataclasses.dataclass(frozen=True, slots=True)
class EvalInputs:
    """The rows that every setting can use, in the order of each setting's `rows`.

    Attributes:
        settings: by model, the baseline's first.
        report: of the data, from `align.data.load`.
    """

    rows: list[Demonstration]
    settings: list[EvalSetting]
    report: dict[str, Any]

    @property
    def references(self) -> list[str]:
        tokenizer = self.settings[0].tokenizer
        return [render_text(scored_turns(tokenizer, row.completion)).strip() for row in self.rows]


def prepare_inputs(recipe: EvaluateRecipe, generates: bool) -> EvalInputs:
    """Load the rows and encode the prompts of every setting.

    Args:
        generates: whether responses are generated, for which prompts must have room.

    Raises:
        UserError: a model is missing or cannot generate, there are no rows, fewer training rows than examples, or bad
            rows while `on_bad_row` is "error".
    """
    tokenizers = {name: _load_tokenizer(path, recipe) for name, path in recipe.models.items()}
    training, rows, report = load_evaluation_rows(recipe, Demonstration)
    if generates and (plain := next((row for row in rows if not row.prompt), None)):
        raise UserError(
            f"{plain.where}: plain text has no prompt to respond to; evaluate it by perplexity and token_accuracy alone."
        )
    if any(not isinstance(row.prompt, str) for row in rows):
        for name, (tokenizer, _) in tokenizers.items():
            if note := turn_end_note(tokenizer):
                print_note(f"{name}: {note}")
    max_new_tokens = recipe.max_new_tokens if generates else 0
    pools = example_pools(training)
    bad = BadRows()
    usable = set(range(len(rows)))
    settings: list[tuple[str, int, list[EncodedRow | None]]] = []
    for name, (tokenizer, limit) in tokenizers.items():
        for num_shots in recipe.num_shots:
            encoded: list[EncodedRow | None] = [None] * len(rows)
            for index, row in enumerate(rows):
                examples = draw_examples(pool_for(row, pools), num_shots, f"{recipe.seed} examples {index}")
                if index in usable:
                    with bad.catch(row.where):
                        if generates or "bits_per_byte" in recipe.metrics:
                            _check_reference(row)
                        encoded[index] = encode_row(
                            row, examples, name, tokenizer, limit, max_new_tokens, recipe.stop_strings
                        )
                    if encoded[index] is None:
                        usable.discard(index)
            settings.append((name, num_shots, encoded))
    report["bad_rows"] |= bad.raise_or_report(recipe.on_bad_row)
    if not usable:
        raise UserError(
            f"none of {len(rows)} rows can be used ({bad.summary()}); give other rows, or change these limits."
        )
    report["evaluation_rows"] = len(usable)
    return EvalInputs(
        [rows[index] for index in sorted(usable)],
        [
            EvalSetting(
                name,
                recipe.models[name],
                num_shots,
                tokenizers[name][0],
                [row for index, row in enumerate(encoded) if index in usable and row is not None],
            )
            for name, num_shots, encoded in settings
        ],
        report,
    )


def load_evaluation_rows(
    recipe: EvaluateRecipe | JudgeRewardRecipe, row_type: type[T]
) -> tuple[list[T], list[T], dict[str, Any]]:
    """Training rows, evaluation rows, and the report of the data."""
    if recipe.train_dataset:
        settings = DataSettings(
            train_dataset=recipe.train_dataset,
            eval_dataset=recipe.eval_dataset,
            eval_fraction=recipe.eval_fraction,
            max_eval_rows=recipe.max_eval_rows,
            on_bad_row=recipe.on_bad_row,
            seed=recipe.seed,
        )
        rows = load_rows(settings, row_type)
        if not rows.evaluation:
            raise UserError(
                "eval_fraction: is 0, so that there are no rows to evaluate; set it above 0, or give an `eval_dataset`."
            )
        return rows.train, rows.evaluation, rows.report
    settings = DataSettings(train_dataset=recipe.eval_dataset, on_bad_row=recipe.on_bad_row, seed=recipe.seed)
    rows = load_rows(settings, row_type, "eval_dataset")
    size = min(recipe.max_eval_rows or len(rows.train), len(rows.train))
    chosen = sorted(random.Random(f"{recipe.seed} evaluation").sample(range(len(rows.train)), size))
    sources = [{**source, "used_for": "evaluation"} for source in rows.report["sources"]]
    report = {**rows.report, "sources": sources, "train_rows": 0, "evaluation_rows": size}
    return [], [rows.train[index] for index in chosen], report


def _load_tokenizer(path: str, recipe: EvaluateRecipe) -> tuple[PreTrainedTokenizerBase, int]:
    """A model's tokenizer, and the maximum number of tokens in a row."""
    stage = (read_manifest(path) or {}).get("stage")
    if stage in STAGES and not STAGES[stage].generates:
        raise UserError(
            f"models: {path} was made by the {stage} stage and does not generate text; name a language model."
        )
    if found := prompt_tuning_base(path):
        base, num_virtual_tokens = found
        where = f"models: {path} holds virtual tokens for {base}"
        config = load_config(base, where, recipe.trust_remote_code)
        method = "prefix" if (adapter_settings(path) or {}).get("peft_type") == "PREFIX_TUNING" else "prompt"
        check_takes_virtual_tokens(config, method, where, recipe.trust_remote_code)
    else:
        num_virtual_tokens = 0
        config = load_config(path, "models", recipe.trust_remote_code)
    if is_encoder(config) or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"models: {path} ({config.model_type}) is not a decoder; name causal language models.")
    tokenizer = load_tokenizer(path, None, recipe.trust_remote_code)
    if not tokenizer.chat_template and recipe.chat_template_path:
        tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code)
    set_template_kwargs(tokenizer, recipe.chat_template_kwargs)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)
    check_template_kwargs(path, recipe.chat_template_kwargs, "models")
    check_files(AutoModelForCausalLM, path, "models", config, tokenizer, attn_implementation=recipe.attn_implementation)
    check_causal(config, "models", path, recipe.trust_remote_code)
    limits = [tokenizer.model_max_length]
    if (positions := max_positions(config)) is not None:
        limits.append(positions - num_virtual_tokens)
    if recipe.max_length is not None:
        limits.append(recipe.max_length)
    return tokenizer, min(limits)


def _check_reference(row: Demonstration) -> None:
    if not isinstance(row.completion, str) and row.completion[-1].get("tool_calls"):
        raise BadRow("a tool call as the reference of a text; evaluate it by perplexity and token_accuracy alone")


def encode_row(
    row: Demonstration,
    examples: Sequence[Demonstration],
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    max_new_tokens: int,
    stop_strings: Sequence[str],
) -> EncodedRow:
    """The row after its examples, in token ids.

    Raises:
        BadRow: no response, or more than `limit` tokens.
    """
    prompt = few_shot_prompt(row, examples)
    prompt_ids = encode_prompt(tokenizer, prompt, tools_of(row))
    if prompt and not prompt_ids:
        raise BadRow("the tokenizer leaves nothing of the prompt")
    before, reference = encode_example(
        tokenizer, prompt, row.completion, tools_of(row), answer_only=not scores_reasoning(tokenizer)
    )
    if len(reference) < 2:  # end-of-text alone
        raise BadRow("empty response")
    ids, start = before + reference, len(before)
    if not start:  # nothing predicts the first token of a text without a BOS token
        prompt_ids, start = prompt_ids or ids[:1], 1
    if max(len(ids), len(prompt_ids) + max_new_tokens) > limit:
        shots = f" with {len(examples)} examples" if examples else ""
        room = ", which may take max_new_tokens" if max_new_tokens else ""
        raise BadRow(f"model {model}: longer than {limit} tokens{shots} and its response{room}")
    stops = [*stop_strings, *([SEPARATOR] if ends_at_separator(examples) else [])]
    return EncodedRow(prompt, prompt_ids, ids, start, stops)
