"""What data, models and file names hold is shown on terminals and in Markdown, and never obeyed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from rich.text import Text

from align.errors import UserError
from align.runs.charts import draw
from align.runs.command_line import CommandParser, exit_code
from align.runs.markdown import code_span, markdown_line, markdown_text, python_text
from align.runs.progress import Display
from align.runs.tables import make_console, make_table, markdown_table
from align.terminal import printable, say

EVIL = "\x1b]0;title\x07\x1b[2Jred\r\x9b31m\u202eevil\u2066\x00\udcff\u2028"
SHOWN = r"\x1b]0;title\x07\x1b[2Jred\r\x9b31m\u202eevil\u2066\x00\udcff\u2028"
ORDINARY = "é 你好 مرحبا नमस्ते 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 [red]x[/] :smile: \\x1b"


def test_printable():
    assert printable(EVIL) == SHOWN
    assert printable(ORDINARY) == ORDINARY
    assert printable("a\n\tb") == "a\n\tb"
    assert printable("a\n\tb", one_line=True) == r"a\n\tb"
    controls = {chr(code) for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
    assert all(len(printable(each)) > 1 for each in controls)


def test_every_way_to_the_terminal(capfd):
    say(f"{EVIL}\nnext")
    Display("sft", 1).say(EVIL + ORDINARY)
    exit_code(lambda: fail(UserError(EVIL)))
    console = make_console()
    console.print(EVIL)
    console.print(Text("plain ") + Text(EVIL, "red"))
    table = make_table(EVIL, EVIL)
    table.add_row(ORDINARY)
    table.add_row(EVIL)
    console.print(table)
    out, err = capfd.readouterr()
    assert not any(each in out + err for each in "\x1b\x07\r\x9b\u202e\u2066\x00\u2028")
    assert err.splitlines()[0] == SHOWN + r"\nnext"
    assert err.count(SHOWN.split(r"\r")[0]) == 3  # an error is one line: there a line break is a space
    assert out.count(SHOWN) >= 3
    assert ORDINARY in err
    assert ORDINARY in out


def test_nothing_else_prints():
    """`print` shows what it is given: elsewhere than in `align.terminal`, only constants, JSON and help."""
    calls = {}
    folder = Path(__file__).parents[1] / "align"
    for path in sorted(folder.glob("**/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"]
        calls[str(path.relative_to(folder))] = [
            ast.unparse(node.args[0]) for node in found if not isinstance(node.args[0], ast.Name)
        ]
    calls = {name: found for name, found in calls.items() if found}
    names = {"terminal.py", "__main__.py", "cli/report_file.py", "cli/verify.py"}
    assert calls.keys() == {*names, "generation/vllm_server.py"}  # which runs where this package is not, into a log
    assert all("printable(" in text for name in ("terminal.py", "__main__.py") for text in calls[name])


def fail(error: BaseException) -> int:
    raise error


def test_markdown():
    assert markdown_text("[a](javascript:x) ![b][c] <script>|`&amp;\\\nnext") == (
        r"[a]\(javascript:x) ![b]\[c] &lt;script>\|\`&amp;amp;\\<br>next"
    )
    assert markdown_text("é 你好 👩‍👩‍👧 out/a_b*.jsonl 0.5 [0.4, 0.6]") == "é 你好 👩‍👩‍👧 out/a_b*.jsonl 0.5 [0.4, 0.6]"
    assert markdown_table(["`a|b"], [["\x1b"]]).splitlines()[0::2] == [r"| \`a\|b |", r"| \\x1b |"]
    assert markdown_line("a judge (`judge_a`) | <b> `<b>`") == r"a judge (`judge_a`) \| &lt;b> `<b>`"
    for text in ("a `b", "a``b", "`a` [b]``(c)"):  # no code spans
        assert markdown_line(text) == markdown_text(text)
    assert (code_span("</s>"), code_span("a`b``\n")) == ("`</s>`", "``` a`b``\\n ```")
    assert python_text('out/a"b\n```\u202e') == r'"out/a\"b\n```\u202e"'
    assert eval(python_text('out/a"b\n```\u202e')) == 'out/a"b\n```\u202e'
    assert python_text("<img>") == r'"\x3cimg>"'
    assert python_text("out/ü") == '"out/ü"'
    assert r"\x1b&lt;script&gt;" in draw([0, 1], {"\x1b<script>": [1.0, 2.0]}, "title")


class TestExits:
    @pytest.mark.parametrize("code", [0, None, 3, "stopped"])
    def test_sys_exit_is_an_error(self, code, capsys):
        assert exit_code(lambda: sys.exit(code)) == 2
        assert capsys.readouterr().err.startswith(f"error: sys.exit({code!r}) in {__file__}, line ")

    def test_other_ends(self, capfd):
        assert exit_code(lambda: CommandParser(prog="x").parse_args(["--help"])) == 0
        assert capfd.readouterr().out.startswith("usage: x")
        assert exit_code(lambda: fail(KeyboardInterrupt())) == 130
        with pytest.raises(BrokenPipeError):  # of another pipe than standard output
            exit_code(lambda: fail(BrokenPipeError()))
        with pytest.raises(SystemExit):  # of a signal's handler
            exit_code(lambda: sys.exit(143))
