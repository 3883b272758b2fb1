"""Check the regular expressions in an adapter's configuration, which PEFT matches with every module name of the base model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from align.config.convert import shown
from align.errors import UserError

SECONDS = 5.0  # for all of them; a pattern with nested repetitions takes exponential time
TYPICAL = ("model.layers.10.self_attn.q_proj", "transformer.h.10.attn.c_attn", "encoder.layer.10.attention.self.query")


def check_patterns(config: Mapping[str, Any], tensors: Collection[str], where: str) -> None:
    """Check that each regular expression is valid and fast to match.

    Args:
        config: content of `adapter_config.json`.
        tensors: names of the base model's tensors.
        where: begins the error: a key and the file.

    Raises:
        UserError: names the key of the expression.
    """
    patterns = list(_patterns(config))
    if not patterns:
        return
    from reward_models.time_limit import TimedOut, time_limit  # imports torch with the rest of its package

    names = {*TYPICAL, *(name.rpartition(".")[0] for name in tensors)}
    names |= {name.rpartition(".")[0] for name in names}
    with time_limit(SECONDS, f"{where}: a regular expression takes too long"):
        for key, text, pattern in patterns:
            try:
                compiled = re.compile(pattern)
                for name in names:
                    compiled.match(name)
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(
                    f"{where}: {key}: expected a regular expression, got {shown(text)} ({error}); correct it."
                ) from None
            except TimedOut:
                raise UserError(
                    f"{where}: {key}: matching the regular expression {shown(text)} with the names of modules takes more than "
                    f"{SECONDS:.0f} s; write it without repetitions inside repetitions."
                ) from None


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Key, text, and the regular expression that PEFT makes of it."""
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(config.get(key), str):  # a list has names, which are compared
            yield key, config[key], rf"(?:{config[key]})\Z"
    for key, form in (
        ("rank_pattern", r"(.*\.)?({})$"),
        ("alpha_pattern", r"(.*\.)?({})$"),
        ("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
        ("modules_to_save", r"(^|.*\.){}($|\..*)"),
    ):
        found = config.get(key) or []
        for text in [found] if isinstance(found, str) else found if isinstance(found, list | dict) else []:
            if isinstance(text, str):
                yield key, text, form.replace("{}", text)
