"""Templates end within their limits, whatever they are asked to make, and each failure is one error with row and template."""

from __future__ import annotations

import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from align.config import template_limits
from align.config.data_source import DataSource, check_template
from align.config.template_limits import TemplateLimit, begin_render
from align.data import chat_template
from align.data.chat_template import _environment, render_chat
from align.data.load import DataSettings, load_rows
from align.data.rows import BadRows, Demonstration
from align.errors import BadRow, TemplateFailure, UserError
from align.models.tokenizer import read_chat_template
from tests.worlds import write_jsonl

LOOP = "{% set ns = namespace(x='xxxxxxxx', y=[1]) %}{% for i in range(60) %}"
# One operation of Python, or a few, which nothing could interrupt.
TOO_LARGE = [
    "{{ 10 ** (10 ** 10) }}",
    "{% set a = 10 %}{% set b = 10 ** 9 %}{{ a ** b }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 10 ** 10 * [1] }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ 'x'.ljust(10 ** 10) }}",
    "{{ 'x' | attr('zfill')(10 ** 10) }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
    "{% filter center(10 ** 10) %}x{% endfilter %}",
    "{{ 'x\nx' | indent(10 ** 10) }}",
    "{{ [1] | tojson(indent=10 ** 10) }}",
    "{{ 3 | round(10 ** 10, 'floor') }}",
    "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "{{ range(99999) | join('x' * 999999) }}",
    "{{ ('x' * 999999).join(range(9999) | map('string')) }}",
    "{{ ('x' * 99999) | replace('x', 'x' * 99999) }}",
    "{{ ('x' * 99999).translate({120: 'x' * 99999}) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%.9999999999f' | format(1) }}",
    "{{ ('%s' * 99999) % ('x' * 9999) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10 ** 10) }}",
    "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "{{ ('<!-- -->' * 999999) | striptags }}",
    "{{ (('x' * 999999) + ('x' * 999999)).rsplit('x' * 999999) }}",
    "{{ ('x' * 9999999) | list }}",
    "{{ ('x' * 9999999).split('x') }}",
    "{{ ([[1]] * 9999) | sum(start=[]) }}",
    LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    LOOP + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    LOOP + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    LOOP + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    LOOP + "{% set ns.x = ns.x * 2 %}{% endfor %}",
    LOOP + "{% set ns.y = ns.y + ns.y %}{% endfor %}",
    LOOP + "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y == ns.y }}",
    LOOP + "{% set ns.y = {'a': ns.y, 'b': ns.y} %}{% endfor %}{{ ns.y }}",
    LOOP + "{% set ns.y = dict(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.y }}",
    LOOP + "{% set ns.y = namespace(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.y }}",
    "{% macro d(n) %}{{ d(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}{{ d(60, 1) }}",
]
TOO_LONG = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n < 60 %}{{ m(n + 1) }}{{ m(n + 1) }}{% endif %}{% endmacro %}{{ m(0) }}",
    "{% set b = 'x' * 9999999 %}{{ range(99999) | map('string') | select('in', b) | list }}",
    "{% set r = range(99999) | list %}{% for i in r %}{{ r | sort | length }}{% endfor %}",
]


@pytest.mark.parametrize("text", TOO_LARGE)
def test_too_large(text, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SIZE", 2**22)
    monkeypatch.setattr(template_limits, "_SEARCH", 2**22)
    begin_render()
    with pytest.raises(TemplateLimit, match=r"makes|pads|indents|takes too long on"):
        _environment().from_string(text).render()


@pytest.mark.parametrize("text", TOO_LONG)
def test_too_long(text, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_TOTAL", 2**26)
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    begun = time.process_time()
    begin_render()
    with pytest.raises(TemplateLimit, match=r"takes longer than 0.05 seconds|characters in all"):
        _environment().from_string(text).render()
    assert time.process_time() - begun < 5


ORDINARY = r"""{%- set ns = namespace(last=-1, text='') %}{% macro turn(m, n=1) %}[{{ m.role | upper }}]{{ caller() }}{% endmacro %}
{%- for m in messages[::-1] if m.role == 'user' %}{% if loop.first %}{% set ns.last = loop.revindex0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set c = m['content'].split('</think>')[-1].lstrip('\n') | trim %}
    {%- call turn(m, n=2) %}{{ '<|' + m.role + '|>' + '\n' + c ~ loop.index0 % 2 ~ '\n' }}{% endcall %}
    {%- set ns.text = ns.text ~ m.role[0] * 3 ~ [m.role, loop.index] | join('-') ~ {'a': m} | tojson(indent=2) %}
    {%- if not loop.last %}{{ loop.nextitem.role is defined and 'é' in c }}{% continue %}{% endif %}
{%- endfor %}
{{ ns.text }}{{ '%s %5.1f' % ('x', 2) }}{{ '{:>6}|{}'.format(ns.last, none) }}{{ 2 ** 10 }}{{ ['b', 'a'] | sort }}{{ undefined_name }}
{{ (messages | map(attribute='role') | list) + ['z'] }}{{ messages | selectattr('role', 'eq', 'user') | list | length }}
{{ 'a<b' | replace('<', '&') | indent(2, true) | center(20) | wordwrap(5) }}{{ [1.5, 2] | sum }}{{ 3.14159 | round(2) }}
{%- if add_generation_prompt %}{{ bos_token }}go{% endif %}"""
MESSAGES = [{"role": "user", "content": "é ¿ 你好 {{ 1 }}"}, {"role": "assistant", "content": "<think>a</think>\n b "}]


@pytest.fixture
def tokenizer():
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    made.name_or_path = "some/model"
    made.chat_template = ORDINARY
    return made


def test_the_text_is_that_of_transformers(tokenizer):
    chat_template._environment.cache_clear()  # as in a new process
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
        assert render_chat(tokenizer, MESSAGES, prompt) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError: division by zero"),
        ("{{ 'a' + 1 }}", "fails with TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails with RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails with OverflowError: Range too big"),
        ("{{ raise_exception('no roles') }}", "rejects it: no roles"),
        ("{{ messages[9].x }}", "rejects it: list object has no element 9"),
        ("{{ ''.__class__.__mro__ }}", "rejects it: access to attribute '__class__'"),
    ],
)
def test_an_error_in_a_chat_template_makes_a_bad_row(tokenizer, text, reason):
    tokenizer.chat_template = text
    with pytest.raises(BadRow, match=f"the chat template {reason}"):
        render_chat(tokenizer, MESSAGES, False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{% if %}", "is not a Jinja template: Expected an expression"), ("{{ 'x' * 10 ** 9 }}", r"\* makes more than")],
)
def test_a_chat_template_that_cannot_work_stops_at_its_row(tokenizer, text, reason):
    tokenizer.chat_template = text
    bad = BadRows()
    with (
        pytest.raises(UserError, match=f"^a.jsonl:7: the chat template of some/model {reason}"),
        bad.catch("a.jsonl:7"),
    ):
        render_chat(tokenizer, MESSAGES, False)
    assert not len(bad)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{% for %}", "t.jinja is not a Jinja template: .*, in its line 1"),
        (b"\xff\xfe", "t.jinja: .*UTF-8"),
        (b"{{ " + b"(" * 5000 + b")" * 5000 + b" }}", "t.jinja is nested too deeply"),
        (b"{{ " + b"9" * 5000 + b" }}", "t.jinja is not a Jinja template: ValueError: Exceeds the limit"),
        (b"x" * (2**20 + 1), "t.jinja has more than 1,048,576 characters"),
    ],
)
def test_a_file_that_is_no_chat_template(tmp_path, content, reason):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError, match=f"^chat_template_path: .*{reason}"):
        read_chat_template(str(tmp_path / "t.jinja"))


def test_a_recipe_template_over_a_limit_names_row_and_template(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"n": 1}, {"n": 10**10}])
    source = DataSource(path=path, templates=[{"prompt": "{{ 'x' * n }}", "completion": "c"}])
    with pytest.raises(UserError, match=r"a.jsonl:2: templates\[0\].prompt \* makes more than 67,108,864 characters"):
        load_rows(DataSettings(train_dataset=[source], seed=1, on_bad_row="skip"), Demonstration)


def test_a_recipe_template_nested_too_deeply():
    with pytest.raises(UserError, match=r"^here.prompt: nested too deeply"):
        check_template({"prompt": "{{ " + "(" * 5000 + ")" * 5000 + " }}", "completion": "c"}, "here")


def test_a_number_that_python_does_not_read():
    with pytest.raises(UserError, match=r"^here.completion: not a Jinja template: ValueError: Exceeds the limit"):
        check_template({"prompt": "p", "completion": "{{ " + "9" * 5000 + " }}"}, "here")


def test_a_failure_is_no_bad_row():  # `on_bad_row: skip` would try the template on every row
    assert not issubclass(TemplateFailure, BadRow)
