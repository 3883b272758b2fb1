"""JSON files that nobody should have written: each ends in one error that begins with its path."""

from __future__ import annotations

import os

import pytest

from align.config.json_file import parse_json, read_file
from align.errors import BadFile

NO_JSON = {
    b"": "x: is empty",
    b" \n": "x: is empty",
    b"{": "x: not valid JSON: Expecting property name",
    b'{"a": 1': "x: not valid JSON: Expecting ',' delimiter",
    b"\0\xff": "x: not valid JSON: byte 1 is not UTF-8",
    b'{"a": 1, "b": {"c": 1, "c": 2}}': "x: not valid JSON: 'c' is written twice",
    b"[NaN]": "x: not valid JSON: NaN is not a number of JSON",
    b"-Infinity": "x: not valid JSON: -Infinity is not a number of JSON",
    b"[1e999]": "x: not valid JSON: 1e999 is too large a number",
    b"1" * 5000: "x: not valid JSON: Exceeds the limit",
    b"[" * 100_000: "x: not valid JSON: nested more than 64 deep",
    b'{"a":' * 65 + b"1" + b"}" * 65: "x: not valid JSON: nested more than 64 deep",
    b'["\\ud800"]': "x: not valid JSON: a lone surrogate is not Unicode",
    b'{"a": {"\\udfff": 1}}': "x: not valid JSON: a lone surrogate is not Unicode",
}


@pytest.mark.parametrize("raw", NO_JSON, ids=lambda raw: repr(raw[:20]))
def test_what_is_not_json_is_refused(raw):
    with pytest.raises(BadFile) as error:
        parse_json(raw, "x")
    assert str(error.value).startswith(NO_JSON[raw])
    assert "\n" not in str(error.value)


def test_what_is_json_is_read():
    deep = b"[" * 64 + b"]" * 64
    assert parse_json(b'{"a": [1, -2.5, null, true, "\\ud83d\\ude00 \xc3\xa9"]}', "x") == {
        "a": [1, -2.5, None, True, "\U0001f600 \xe9"]
    }
    assert parse_json(deep, "x") is not None
    assert parse_json(b"[NaN, Infinity]", "x", nan_as_null=True) == [None, None]


def test_what_is_no_file_is_refused_at_once(tmp_path):
    """A pipe without a writer would block for ever, and a device has no end."""
    (tmp_path / "file").write_text("[1]")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_text("[%s1]" % (" " * 2000))
    os.mkfifo(tmp_path / "pipe")
    assert read_file(tmp_path / "file", follow_links=False) == b"[1]"
    assert read_file(tmp_path / "link", follow_links=True) == b"[1]"
    for name, why in {
        "none": "cannot be read: No such file or directory",
        "link": "is a symbolic link, expected a file",
        "folder": "is not a regular file",
        "pipe": "is not a regular file",
        "large": "has 2003 bytes, expected at most 1000",
    }.items():
        with pytest.raises(BadFile) as error:
            read_file(tmp_path / name, follow_links=False, max_bytes=1000)
        assert str(error.value) == f"{tmp_path / name}: {why}"
    for path in (tmp_path / "loop", "/dev/zero"):
        with pytest.raises(BadFile):
            read_file(path, follow_links=True)
