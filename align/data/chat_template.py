"""Chat templates: rendered as by transformers, within the limits of `align.config.template_limits`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from align.compat.transformers import apply_chat_template, chat_template_environment
from align.config.sandbox import LimitedEnvironment, compile_problem, limited
from align.config.template_limits import TemplateLimit, begin_render
from align.errors import BadRow, TemplateFailure


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
    _environment()  # made with transformers' own compiler, which is replaced while it renders
    name = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
    try:
        return apply_chat_template(
            tokenizer, messages, _compile, add_generation_prompt=add_generation_prompt, tools=tools
        )
    except TemplateLimit as error:
        raise TemplateFailure(f"{name} {error}; fix the template or the row.") from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateFailure(f"{name} {_wrong_syntax(error)}") from error
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template rejects it: {error}") from error
    except Exception as error:  # a template may fail in any way on the messages
        raise BadRow(f"the chat template fails with {type(error).__name__}: {error}") from error


def check_chat_template(text: str) -> None:
    """Check the syntax of a chat template.

    Raises:
        TemplateFailure: what is wrong, to be put after the template's name.
    """
    try:
        _compile(text)
    except TemplateLimit as error:
        raise TemplateFailure(f"{error}.") from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateFailure(_wrong_syntax(error)) from error
    except Exception as error:  # of Jinja's parser and of Python's compiler
        raise TemplateFailure(f"is {compile_problem(error)}.") from error


def _wrong_syntax(error: jinja2.TemplateSyntaxError) -> str:
    return f"is not a Jinja template: {error.message}, in its line {error.lineno}."


@functools.cache
def _environment() -> LimitedEnvironment:
    return limited(chat_template_environment())


def _compile(template: str) -> jinja2.Template:
    begin_render()  # transformers compiles, from its cache or from this one, before each render
    return _compiled(template)


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)
