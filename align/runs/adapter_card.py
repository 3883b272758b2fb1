"""The model card of a bottleneck adapter: how to load it in Python, on its base model."""

from __future__ import annotations

import re

from align.runs.markdown import python_text
from reward_models.bottleneck import base_of

IMPORT = "from reward_models.bottleneck import adapted_config, insert_bottlenecks\n"


def card_of_adapter(card: str, folder: str) -> str:
    """The card of a model in `folder`, with the line that loads it replaced by those that load an adapter and its base.

    Args:
        card: Markdown with a block of Python in which a line says `model = ....from_pretrained(folder)`.
    """
    here, base = python_text(folder), python_text(base_of(folder))

    def load(match: re.Match[str]) -> str:
        return f"model = {match[1]}({base}, config=adapted_config({here}))\ninsert_bottlenecks(model, {here})\n"

    text, found = re.subn(r"^model = (\w+\.from_pretrained)\(.*\)\n", load, card, flags=re.MULTILINE)
    if found:
        text = re.sub(
            r"^(from transformers import .*\n)", lambda match: match[1] + IMPORT, text, count=1, flags=re.MULTILINE
        )
    return text.replace(
        "\n```python", "\nIt is a bottleneck adapter: plain transformers does not load it by itself.\n\n```python", 1
    )
