"""Render chat templates as transformers does, in the process of `align.config.sandbox`."""

from __future__ import annotations

import functools
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from align.compat.transformers import apply_chat_template, chat_template_compiler
from align.config.sandbox import TemplateProblem, check, render
from align.config.sandbox_process import FAILED, LIMIT, SYNTAX
from align.errors import BadRow, TemplateFailure, UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KWARGS = "chat_template_kwargs"  # attribute of the tokenizer
# The date that templates write as today's (by `strftime_now`), so that ids do not change overnight. Llama 3's own default.
TODAY = date(2024, 7, 26)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> str:
    """The text of messages, by the tokenizer's chat template.

    Args:
        tools: functions that the template lists for the model.

    Raises:
        BadRow: the template raises an error on them.
        TemplateFailure: it is no template, or goes over a limit.
    """
    try:
        return apply_chat_template(
            tokenizer,
            messages,
            _ChatTemplate,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **template_kwargs(tokenizer),
        )
    except TemplateProblem as problem:
        name = f"the chat template {_file(tokenizer)}"
        if problem.kind == LIMIT:
            raise TemplateFailure(f"{name} {problem}; fix the template, or shorten the row.") from problem
        if problem.kind == SYNTAX:
            raise TemplateFailure(f"{name} is {problem}; fix it, or name another as `chat_template_path`.") from problem
        verb = "fails with" if problem.kind == FAILED else "rejects it:"
        raise BadRow(f"{name} {verb} {problem}") from problem
    except Exception as error:  # of transformers, on messages of an odd form
        raise BadRow(f"the chat template {_file(tokenizer)} fails with {type(error).__name__}: {error}") from error


def set_template_kwargs(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Render the tokenizer's chat template with these values for its variables from now on.

    Raises:
        UserError: there is no chat template, or it does not read one of them.
    """
    name = f"chat_template_kwargs: {tokenizer.name_or_path or 'the tokenizer'}"
    if values and not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template that could read them; leave the key out.")
    words = set(re.findall(r"[^\W\d]\w*", str(tokenizer.chat_template)))
    for each in values:
        if each not in words:
            hint = nearest(each, words)
            raise UserError(f"{name} has a chat template that does not read `{each}`{hint}; leave it out.")
    setattr(tokenizer, KWARGS, dict(values))


def template_kwargs(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The values of `set_template_kwargs`."""
    values: dict[str, Any] = getattr(tokenizer, KWARGS, {})
    return values


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for today's date, and gets `TODAY`."""
    return "strftime_now" in str(tokenizer.chat_template)


def check_chat_template(text: str) -> None:
    """Check the syntax of a chat template.

    Raises:
        TemplateFailure: what is wrong, to be put after the template's name.
    """
    try:
        check(text, _compiler())
    except TemplateProblem as problem:
        raise TemplateFailure(f"{problem}." if problem.kind == LIMIT else f"is {problem}") from problem


@dataclass(frozen=True)
class _ChatTemplate:
    """A stand-in for a Jinja template, which transformers renders."""

    text: str

    def render(self, **variables: Any) -> str:
        return render(self.text, variables, _compiler())


_compiler = functools.cache(functools.partial(chat_template_compiler, TODAY))


def _file(tokenizer: PreTrainedTokenizerBase) -> str:
    """The file of the tokenizer's chat template."""
    named = getattr(tokenizer, "chat_template_path", None)  # by `align.models.tokenizer`
    folder = str(tokenizer.name_or_path)
    files = [os.path.join(folder, name) for name in ("chat_template.jinja", "tokenizer_config.json")]
    return named or next(filter(os.path.isfile, files), folder) or "of the tokenizer"
