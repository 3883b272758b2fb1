"""Tokenizers: loading, the chat template, the padding token."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from align.config.base import StageRecipe
from align.errors import UserError


def load_tokenizer(path: str, recipe: StageRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`: left padding, a padding token, and the recipe's chat template if it names one.

    Raises:
        UserError: no tokenizer there, no end-of-text token, or an unreadable chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=recipe.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: no tokenizer can be loaded from there. {str(error).splitlines()[0]}") from error
    end = tokenizer.eos_token or tokenizer.sep_token  # an encoder's rows end with the separator
    if end is None:
        raise UserError(
            f"{path}: the tokenizer has no end-of-text token; set `eos_token` in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = end  # safe: padding is told by masks, never by ids
    if recipe.chat_template_path is not None:
        try:
            tokenizer.chat_template = Path(recipe.chat_template_path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"chat_template_path: cannot read {recipe.chat_template_path} ({error.strerror})."
            ) from error
    return tokenizer


def set_right_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad on the right, with a token other than end-of-text.

    transformers' decoders score the last token that is not padding, so end-of-text must not be padding.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    plain = max(set(tokenizer.get_vocab().values()) - set(special))
    candidates = [tokenizer.unk_token_id, tokenizer.bos_token_id, *special, plain]
    pad = next(token for token in candidates if token not in (None, tokenizer.eos_token_id))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
