"""Hostile and broken templates: of rows in the recipe, of chats in a file or in the model's folder."""

# fmt: off
from __future__ import annotations

from collections.abc import Iterator

from tests.campaign.cases import Case, Refusal, refusals

CHAT = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}] * 4


def template(prompt: str) -> Refusal:
    """The training rows of sft through this template."""
    source = {"path": "data/answers.jsonl", "templates": [{"prompt": prompt, "completion": "{{ completion }}"}]}
    return Refusal(keys={"train_dataset": source}, says=["templates[0]"])


def chat(text: str, *says: str) -> Refusal:
    """The training rows of sft are chats, and the chat template is this file."""
    keys = {"chat_template_path": "mine.jinja", "train_dataset": "data/chats.jsonl", "eval_dataset": [], "eval_fraction": 0}
    return Refusal(files={"mine.jinja": text, "data/chats.jsonl": CHAT}, keys=keys, says=says or ("mine.jinja", "chat template", "chat_template"))


BODY = "{% for m in messages %}{{ m.content }}{% endfor %}"
HOSTILE = {
    "not closed": "{{ prompt",
    "unknown filter": "{{ prompt | nosuch }}",
    "unknown tag": "{% nosuch %}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends 'x' %}",
    "reads a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reads globals": "{{ cycler.__init__.__globals__.os.system('touch canary_template') }}",
    "reads self": "{{ self.__init__.__globals__ }}",
    "attr filter": "{{ prompt | attr('__class__') }}",
    "format string": "{{ '{0.__class__}'.format(prompt) }}{{ nosuch.x }}",
    "two nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "silent nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range of 10**9": "{% for i in range(10**9) %}x{% endfor %}",
    "a power of a power": "{{ 10**(10**10) }}",
    "a power in a condition": "{% if 7**(9**9) > 1 %}x{% endif %}",
    "a text of 10**10": "{{ 'a' * 10**10 }}",
    "a list of 10**10": "{{ [1] * 10**10 }}",
    "text doubled 60 times": "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "list doubled 60 times": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "endless recursion": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "recursive loop": "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "centers to 10**10": "{{ 'a'.center(10**10) }}",
    "pads by format": "{{ '%10000000000d' % 5 }}",
    "pads by format method": "{{ '{:>10000000000}'.format(5) }}",
    "indents": "{{ ('a\n' * 99999) | indent(99999) }}",
    "joins": "{{ range(99999) | join('x' * 99999) }}",
    "replaces": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "batches": "{% for b in range(99999) | batch(10**10, 'x') %}{{ b }}{% endfor %}",
    "wraps": "{{ ('a ' * 9999999) | wordwrap(1) | length }}{{ 'x' * 10**10 }}",
    "divides by zero": "{{ 1 // 0 }}",
    "unknown name": "{{ nosuch }}",
    "calls a text": "{{ prompt() }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "a huge literal": "{{ " + "1" * 5000 + " }}",
}  # fmt: skip

ROW_TEMPLATES = {
    **{f"row: {name}": template(text) for name, text in HOSTILE.items()},
    "row: completion missing": Refusal(keys={"train_dataset": {"path": "data/answers.jsonl", "templates": [{"prompt": "a"}]}}, says=["templates[0]"]),
    "row: unknown part": Refusal(keys={"train_dataset": {"path": "data/answers.jsonl", "templates": [{"prompt": "a", "completion": "b", "promt": "c"}]}}, says=["templates[0]"]),
    "row: part is a number": Refusal(keys={"train_dataset": {"path": "data/answers.jsonl", "templates": [{"prompt": 5, "completion": "b"}]}}, says=["templates[0]"]),
    "row: not a list of mappings": Refusal(keys={"train_dataset": {"path": "data/answers.jsonl", "templates": ["{{ prompt }}"]}}, says=["templates"]),
    "row: nothing comes out": Refusal(keys={"train_dataset": {"path": "data/answers.jsonl", "templates": [{"prompt": "{{ prompt }}", "completion": "{# nothing #}"}]}}, says=["templates[0]", "answers.jsonl:1"]),
    "row: an escape comes out": Refusal(keys={"train_dataset": {"path": "data/answers.jsonl", "templates": [{"prompt": "a", "completion": "{{ nosuch['\x1b[31m'] }}"}]}}, says=["templates[0]"]),
}  # fmt: skip
CHAT_TEMPLATES = {
    **{f"chat: {name}": chat(f"{BODY}{text.replace('prompt', 'messages[0].content')}") for name, text in HOSTILE.items() if name not in ("unknown name", "attr filter")},
    "chat: empty": chat(""),
    "chat: prints nothing": chat("{# nothing #}", "mine.jinja", "chats.jsonl:1"),
    "chat: refuses": chat("{{ raise_exception('no chats today') }}", "no chats today"),
    "chat: refuses in colour": chat("{{ raise_exception('\x1b[31mno') }}", "no"),
    "chat: reads a missing part": chat("{% for m in messages %}{{ m.name.first }}{% endfor %}"),
    "chat: loses the answer": chat("{{ messages[0].content }}", "mine.jinja", "chats.jsonl:1"),
    "chat: not UTF-8": Refusal(files={"mine.jinja": b"\xff\xfe", "data/chats.jsonl": CHAT}, keys={"chat_template_path": "mine.jinja", "train_dataset": "data/chats.jsonl"}, says=["mine.jinja"]),
    "chat: in the model's folder": Refusal(files={"base/chat_template.jinja": f"{BODY}{{% for i in range(99999) %}}{{% for j in range(99999) %}}x{{% endfor %}}{{% endfor %}}", "data/chats.jsonl": CHAT}, keys={"train_dataset": "data/chats.jsonl"}, says=["base", "chat template", "chat_template"]),
    "chat: no template at all": Refusal(files={"data/chats.jsonl": CHAT}, keys={"train_dataset": "data/chats.jsonl"}, says=["chat template", "chat_template", "chats.jsonl"]),
}  # fmt: skip


def cases() -> Iterator[Case]:
    yield from refusals("row templates", ROW_TEMPLATES)
    yield from refusals("chat templates", CHAT_TEMPLATES)
