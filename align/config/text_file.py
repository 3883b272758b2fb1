"""Text and JSON files that a user gives: regular files of a bounded size, in UTF-8, that are what their names say."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from align.config.convert import kind
from align.config.json_file import parse_json
from align.errors import UserError

MAX_BYTES = 64 * 2**20  # the tokenizer.json of a vocabulary of 256,000 has 33 MB
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_GIT_LFS, _GIT_ANNEX = b"version https://git-lfs.github.com/spec/", b"/annex/objects/"


def check_regular(path: str | os.PathLike[str], where: str = "") -> None:
    """Check that `path` is a regular file with its content before it is opened, since opening a named pipe would block.

    Args:
        where: what the error begins with, such as the key that names the file.

    Raises:
        UserError: there is no such file, it is not a regular file, or it is a pointer of Git LFS or git-annex.
    """
    name = f"{where}: {path}" if where else f"{path}"
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character
        if os.path.islink(path):
            raise UserError(f"{name}: is a link to {os.readlink(path)}, which is not there{_fetch(path)}") from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{name}: cannot be read ({reason}); check the path.") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{name}: expected a file, got {_file_kind(mode)}; name a file.")
    try:
        with open(path, "rb") as file:
            head = file.read(len(_GIT_LFS))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); check its permissions.") from None
    for pointer, program in ((_GIT_LFS, "git lfs pull"), (_GIT_ANNEX, "git annex get")):
        if head.startswith(pointer):
            raise UserError(f"{name}: holds a pointer of git instead of the file; fetch the file by `{program}`.")


def read_text(path: str | os.PathLike[str], where: str = "", max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: as `check_regular`, or it is too large or not UTF-8.
    """
    check_regular(path, where)
    name = f"{where}: {path}" if where else f"{path}"
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{name}: has more than {max_bytes:,} bytes; this is not the file that is expected here.")
    return decode(content, name)


def decode(content: bytes, name: str) -> str:
    """UTF-8 as text.

    Raises:
        UserError: it is not; begins with `name` and says in which line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if (encoding := _BYTE_ORDER_MARKS.get(content[:2])) is not None:
            raise UserError(f"{name}: is in {encoding}; save it in UTF-8.") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); save the file in UTF-8."
        ) from None


def read_json(path: str | os.PathLike[str], where: str = "", nan_as_null: bool = False) -> dict[str, Any]:
    """The object in a JSON file that a user gives.

    Raises:
        UserError: as `read_text` and `align.config.json_file.parse_json`, or it is no object.
    """
    name = f"{where}: {path}" if where else f"{path}"
    value = parse_json(read_text(path, where).encode(), name, nan_as_null=nan_as_null)
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected a JSON object, got {kind(value)}.")
    return value


def _file_kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((words for test, words in kinds.items() if test(mode)), "something else")


def _fetch(link: str | os.PathLike[str]) -> str:
    annexed = ".git/annex/" in Path(os.readlink(link)).as_posix()
    return "; fetch the file by `git annex get`." if annexed else "; correct the link."
