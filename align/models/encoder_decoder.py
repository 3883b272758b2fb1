"""How much an encoder-decoder reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from align.compat.transformers import has_sequence_classifier
from align.data.collate import pad_right
from align.errors import UserError
from align.models.context_length import check_vocabulary, max_positions
from align.models.model_types import is_encoder_decoder
from align.models.packing import TOLERANCE, VOCABULARY, example_rows
from align.models.small_model import small_model

STARTS_FROM_LABELS = {"mbart", "plbart"}  # whose decoder starts from the last label, the code of a language
READS_SOURCE = "fsmt"  # whose decoder reads the source where it is given labels alone


def side_positions(config: PretrainedConfig) -> tuple[int | None, int | None]:
    """The maximum number of tokens that encoder and decoder read; None where the configuration sets no limit (T5)."""
    whole = max_positions(config)
    sides = (getattr(config, f"max_{side}_position_embeddings", None) for side in ("encoder", "decoder"))  # LED's
    encoder, decoder = (side or whole for side in sides)
    return encoder, decoder


def check_starts_and_ends(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, key: str, path: str) -> None:
    """Check that there is a token that the decoder starts from, and one that its responses end with.

    Raises:
        UserError: there is not, or it is an FSMT; begins with `key`.
    """
    if config.model_type == READS_SOURCE:
        raise UserError(
            f"{key}: {path}: transformers' {config.model_type} has two vocabularies, and its decoder reads the source in place of the labels; "
            "name another encoder-decoder, such as a T5, BART or Marian."
        )
    if config.model_type not in STARTS_FROM_LABELS and getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"{key}: {path}: its config.json has no decoder_start_token_id, the token that the decoder starts from; set the one "
            "it was trained with (T5's is its padding token)."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{key}: {path}: the tokenizer has no end-of-text token; set `eos_token` in its tokenizer_config.json."
        )


@torch.no_grad()
def check_reads_no_padding(config: PretrainedConfig, key: str, path: str, trust_remote_code: bool = False) -> None:
    """Check that a row's log-probabilities do not depend on the padding of its batch; tried on a small model of the configuration.

    Raises:
        UserError: they do; begins with `key`.
    """
    sources, targets = (example_rows(lengths, VOCABULARY) for lengths in ((12, 5), (4, 9)))
    try:
        model = small_model(config, VOCABULARY, trust_remote_code=trust_remote_code)
        ids, mask = pad_right(sources, int(model.config.pad_token_id or 0))
        labels, real = pad_right(targets, -100)
        padded = model(input_ids=ids, attention_mask=mask.long(), labels=labels).logits.log_softmax(-1)
        gaps = [
            padded[row, real[row]] - model(input_ids=ids[row : row + 1, mask[row]], labels=labels[row : row + 1, real[row]])
            .logits[0].log_softmax(-1)
            for row in range(len(ids))
        ]  # fmt: skip
    except Exception:  # an architecture without a small model, as in `check_causal`
        return
    if (gap := max(float(each.abs().max()) for each in gaps)) > TOLERANCE:
        raise UserError(
            f"{key}: {path}: a model of type {config.model_type} reads the padding of a batch: it changes log-probabilities by up to {gap:.2g} "
            "nats (tried on a small random model); name another encoder-decoder, such as a T5 or a BART."
        )


def check_classifier_exists(config: PretrainedConfig, key: str, path: str) -> None:
    """Check that transformers has a sequence classifier of an encoder-decoder; of other kinds of models there is one.

    Raises:
        UserError: it has not; begins with `key`.
    """
    if is_encoder_decoder(config) and not has_sequence_classifier(config):
        raise UserError(
            f"{key}: {path}: transformers has no sequence classifier of {config.model_type}; name a T5- or BART-like encoder-decoder, "
            "an encoder (BERT-like) or a decoder."
        )


def check_pairs_fit(
    sources: Iterable[Sequence[int]], targets: Iterable[Sequence[int]], config: PretrainedConfig
) -> None:
    """Check that the model has a position and an embedding for every token of the rows.

    Raises:
        UserError: a prompt or a completion is longer than the model reads, or has a token that it does not know.
    """
    for name, rows, limit in zip(("prompt", "completion"), (sources, targets), side_positions(config), strict=True):
        sizes = [(len(row), max(row, default=0)) for row in rows]
        check_vocabulary((largest for _, largest in sizes), config)
        longest = max((length for length, _ in sizes), default=0)
        if limit is not None and longest > limit:
            raise UserError(
                f"max_length: the longest {name} has {longest} tokens, and the model reads at most {limit}; set max_length: "
                f"{limit}, and on_bad_row: skip to leave longer rows out."
            )


def check_answers_fit(
    sources: Sequence[Sequence[int]], response_length: int, config: PretrainedConfig, remedy: str
) -> None:
    """Check that the model has a position for every token of the prompts and of a response.

    Args:
        remedy: what else to do than to lower response_length.

    Raises:
        UserError: it has not.
    """
    check_pairs_fit(sources, [], config)
    limit = side_positions(config)[1]
    if limit is not None and response_length > limit:
        raise UserError(
            f"response_length: the decoder writes at most {limit} tokens, got {response_length}; lower it, or {remedy}."
        )
