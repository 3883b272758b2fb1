"""Templates end within their limits, whatever they are asked to make, and each failure is one error with row and template."""

from __future__ import annotations

import os

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from align.config import sandbox
from align.config.data_source import DataSource, check_template
from align.config.sandbox import TemplateProblem, render
from align.config.sandbox_process import Limits
from align.data.chat_template import render_chat
from align.data.load import DataSettings, load_rows
from align.data.rows import BadRows, Demonstration
from align.errors import BadRow, TemplateFailure, UserError
from align.models.tokenizer import read_chat_template
from tests.worlds import write_jsonl


@pytest.fixture
def short(monkeypatch):
    """A process with short limits."""

    def start(**limits):
        sandbox.end_process()
        monkeypatch.setattr(sandbox, "LIMITS", Limits(**limits))

    yield start
    sandbox.end_process()


@pytest.mark.parametrize(
    "text",
    [
        "{{ n ** n ** n }}",  # one operation of Python, which heeds no signal handler
        "{{ ('ab' * 9 * n).strip('xyz' * n ~ 'ab') }}",
        "{% set ns = namespace(v=[1], w=[1]) %}{% for i in range(60) %}{% set ns.v = [ns.v, ns.v] %}"
        "{% set ns.w = [ns.w, ns.w] %}{% endfor %}{{ ns.v == ns.w }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ('ab' * 9 * n) | reject('string') | list }}",
    ],
)
def test_too_long(short, text):
    short(seconds=0.1)
    begun = os.times()
    with pytest.raises(TemplateProblem, match=r"takes longer than 0.1 seconds"):
        render(text, {"n": 999_999})
    ended = os.times()
    assert ended.children_user + ended.children_system - begun.children_user - begun.children_system < 2
    assert render("{{ n }}", {"n": 1}) == "1"  # in another process


def test_too_large(short):
    short(memory=2**28)
    for text in (
        "{{ 'x' * 10 ** 10 }}",
        "{{ range(99999) | join('x' * 99999) }}",
        "{% set ns = namespace(x='xxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ):
        with pytest.raises(TemplateProblem, match=r"needs more than 0.25 GiB of memory"):
            render(text, {})


def test_a_text_that_is_too_long():
    with pytest.raises(TemplateProblem, match="makes a text of more than 67,108,864 characters"):
        render("{{ 'x' * n }}y", {"n": 2**26})


def test_many_slow_rows(short):
    short(seconds=0.2, per_render=0.001)
    slow = "{% for i in range(99999) %}{{ i if i == 3 }}{% endfor %}"
    render(slow, {})
    with pytest.raises(TemplateProblem, match=r"takes too long: 0\.0.* seconds for each of \d+ rows"):  # noqa: PT012
        for _ in range(100):
            render(slow, {})


def test_a_fork_and_an_interruption_leave_the_next_render_alone(monkeypatch):
    assert render("{{ a }}", {"a": 1}) == "1"
    first = sandbox._process
    if not (child := os.fork()):
        os._exit(render("{{ a }}", {"a": 2}) != "2")
    assert os.waitpid(child, 0)[1] == 0
    assert render("{{ a }}", {"a": 3}) == "3"
    assert sandbox._process is first
    with monkeypatch.context() as patch:
        patch.setattr(first, "replies", None)  # the request is sent, and its reply not read
        with pytest.raises(AttributeError):
            render("{{ a }}", {"a": 4})
    assert render("{{ a }}", {"a": 5}) == "5"


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
    with pytest.raises(BadRow, match=f"^the chat template some/model {reason}"):
        render_chat(tokenizer, MESSAGES, False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% if %}", "is not a Jinja template: Expected an expression"),
        ("{{ 'x' * 10 ** 10 }}", "needs more than 2 GiB"),
    ],
)
def test_a_chat_template_that_cannot_work_stops_at_its_row(tokenizer, text, reason):
    tokenizer.chat_template = text
    bad = BadRows()
    with (
        pytest.raises(UserError, match=f"^a.jsonl:7: the chat template some/model {reason}"),
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
    ],
)
def test_a_file_that_is_no_chat_template(tmp_path, content, reason):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError, match=f"^chat_template_path: .*{reason}"):
        read_chat_template(str(tmp_path / "t.jinja"))


def test_a_recipe_template_over_a_limit_names_row_and_template(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"n": 1}, {"n": 10**10}])
    source = DataSource(path=path, templates=[{"prompt": "{{ 'x' * n }}", "completion": "c"}])
    with pytest.raises(UserError, match=r"a.jsonl:2: templates\[0\].prompt needs more than 2 GiB of memory; fix"):
        load_rows(DataSettings(train_dataset=[source], seed=1, on_bad_row="skip"), Demonstration)


def test_a_recipe_template_nested_too_deeply():
    with pytest.raises(UserError, match=r"^here.prompt: nested too deeply"):
        check_template({"prompt": "{{ " + "(" * 5000 + ")" * 5000 + " }}", "completion": "c"}, "here")


def test_a_number_that_python_does_not_read():
    with pytest.raises(UserError, match=r"^here.completion: not a Jinja template: ValueError: Exceeds the limit"):
        check_template({"prompt": "p", "completion": "{{ " + "9" * 5000 + " }}"}, "here")


def test_a_failure_is_no_bad_row():  # `on_bad_row: skip` would try the template on every row
    assert not issubclass(TemplateFailure, BadRow)


def test_errors_name_the_file_of_the_template(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ 1 / 0 }}"
    tokenizer.name_or_path = str(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(tokenizer.chat_template)
    bad = BadRows()
    with bad.catch("a.jsonl:7"):
        render_chat(tokenizer, MESSAGES, False)
    said = r"the chat template .*/chat_template.jinja fails with ZeroDivisionError.*\(a.jsonl:7\)\nFix them or the template, or"
    with pytest.raises(UserError, match=said):
        bad.raise_or_report("error")
    tokenizer.chat_template_path = "mine.jinja"
    with pytest.raises(BadRow, match=r"the chat template mine\.jinja fails"):
        render_chat(tokenizer, MESSAGES, False)
