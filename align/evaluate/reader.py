"""How a model of `align evaluate` reads rows: its tokenizer, its limits, and a row in its token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from align.config.evaluate import EvaluateRecipe
from align.config.stages import STAGES
from align.data.chat_template import set_template_kwargs
from align.data.encode import encode_example, encode_prompt
from align.data.encoder_decoder import example_ids
from align.data.reasoning import scores_reasoning, set_scores_reasoning
from align.data.rows import Demonstration, Turns, tools_of
from align.errors import BadRow, UserError
from align.evaluate.few_shot import SEPARATOR, ends_at_separator, few_shot_prompt
from align.models.causality import check_causal
from align.models.check_files import check_files
from align.models.context_length import max_positions
from align.models.encoder_decoder import check_reads_no_padding, check_starts_and_ends, side_positions
from align.models.load import adapter_settings, language_model_class, load_config
from align.models.model_types import is_encoder, is_encoder_decoder
from align.models.tokenizer import load_tokenizer
from align.models.virtual_tokens import check_takes_virtual_tokens, prompt_tuning_base
from align.runs.manifest import check_template_kwargs, read_manifest


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedRow:
    """An evaluation row as one model reads it.

    Attributes:
        prompt: with the few-shot examples.
        prompt_ids: from which the model writes its response.
        ids: of the prompt and the reference response, end-of-text included; an encoder-decoder reads them apart.
        reference_start: index of the reference's first id.
        stop_strings: a prediction is cut before the first of these.
    """

    prompt: Turns
    prompt_ids: list[int]
    ids: list[int]
    reference_start: int
    stop_strings: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Reader:
    """How a model reads rows.

    Attributes:
        limit: most tokens of a prompt with its answer; for an encoder-decoder of a prompt.
        answer_limit: most tokens of an answer of an encoder-decoder; None for a decoder.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    answer_limit: int | None = None


def load_reader(path: str, recipe: EvaluateRecipe) -> Reader:
    """The reader of the model in `path`, whose files are checked.

    Raises:
        UserError: it is missing or cannot generate.
    """
    if found := prompt_tuning_base(path):
        base, num_virtual_tokens = found
        where = f"models: {path} holds virtual tokens for {base}"
        config = load_config(base, where, recipe.trust_remote_code, encoder_decoder=True)
        method = "prefix" if (adapter_settings(path) or {}).get("peft_type") == "PREFIX_TUNING" else "prompt"
        if not is_encoder_decoder(config):
            check_takes_virtual_tokens(config, method, where, recipe.trust_remote_code)
    else:
        num_virtual_tokens = 0
        config = load_config(path, "models", recipe.trust_remote_code, encoder_decoder=True)
    pairs = is_encoder_decoder(config)
    stage = (read_manifest(path) or {}).get("stage")
    if stage in STAGES and not STAGES[stage].generates and not (pairs and stage == "mlm"):
        raise UserError(
            f"models: {path} was made by the {stage} stage and does not generate text; name a language model."
        )
    if is_encoder(config):
        raise UserError(
            f"models: {path} ({config.model_type}) is an encoder, which cannot generate; name a language model."
        )
    tokenizer = load_tokenizer(path, None, recipe.trust_remote_code)
    if not tokenizer.chat_template and recipe.chat_template_path:
        tokenizer = load_tokenizer(path, recipe.chat_template_path, recipe.trust_remote_code)
    set_template_kwargs(tokenizer, recipe.chat_template_kwargs)
    set_scores_reasoning(tokenizer, recipe.score_reasoning)
    check_template_kwargs(path, recipe.chat_template_kwargs, "models")
    kernel = recipe.attn_implementation
    check_files(language_model_class(config), path, "models", config, tokenizer, attn_implementation=kernel)
    limits = [tokenizer.model_max_length, *([] if recipe.max_length is None else [recipe.max_length])]
    if pairs:
        check_starts_and_ends(config, tokenizer, "models", path)
        check_reads_no_padding(config, "models", path, recipe.trust_remote_code)
        prompt, answer = (
            min([*limits, *([] if each is None else [each - num_virtual_tokens])]) for each in side_positions(config)
        )
        return Reader(tokenizer, prompt, answer)
    check_causal(config, "models", path, recipe.trust_remote_code)
    if (positions := max_positions(config)) is not None:
        limits.append(positions - num_virtual_tokens)
    return Reader(tokenizer, min(limits))


def encode_row(
    row: Demonstration,
    examples: Sequence[Demonstration],
    model: str,
    reader: Reader,
    max_new_tokens: int,
    stop_strings: Sequence[str],
) -> EncodedRow:
    """The row after its examples, in token ids.

    Raises:
        BadRow: no response, or more tokens than the model reads.
    """
    prompt, tokenizer = few_shot_prompt(row, examples), reader.tokenizer
    stops = [*stop_strings, *([SEPARATOR] if ends_at_separator(examples) else [])]
    if reader.answer_limit is not None:
        return _encode_pair(row, prompt, model, reader, max_new_tokens, stops)
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
    if max(len(ids), len(prompt_ids) + max_new_tokens) > reader.limit:
        shots = f" with {len(examples)} examples" if examples else ""
        room = ", which may take max_new_tokens" if max_new_tokens else ""
        raise BadRow(f"model {model}: longer than {reader.limit} tokens{shots} and its response{room}")
    return EncodedRow(prompt, prompt_ids, ids, start, stops)


def _encode_pair(
    row: Demonstration, prompt: Turns, model: str, reader: Reader, max_new_tokens: int, stops: list[str]
) -> EncodedRow:
    """The row as an encoder-decoder reads it."""
    if not prompt:
        raise BadRow(f"model {model}: no prompt for the encoder to read")
    assert reader.answer_limit is not None
    source, target = example_ids(reader.tokenizer, prompt, row.completion, tools_of(row))
    if len(target) < 2:
        raise BadRow("empty response")
    if len(source) > reader.limit:
        raise BadRow(f"model {model}: prompt longer than {reader.limit} tokens")
    if max(len(target), max_new_tokens) > reader.answer_limit:
        raise BadRow(f"model {model}: longer than {reader.answer_limit} tokens in its response or in max_new_tokens")
    return EncodedRow(prompt, source, source + target, len(source), stops)
