# SPDX-License-Identifier: Apache-2.0
"""Options as a file: what ``--print-config`` prints, and what a snapshot holds of its machine's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyvmm.errors import UsageError
from pyvmm.syntax.option import INVOCATION, MACHINE

if TYPE_CHECKING:
    import argparse

    from pyvmm.options.table import Table
    from pyvmm.syntax.option import Option


def as_toml(args: argparse.Namespace, table: Table) -> str:
    """Return the options that ``args`` was parsed of, and the defaults of others that have a value, as a file.

    Raises UsageError for what cannot be said.
    """
    texts = _texts(args, table)
    return "".join(_line(option, value) for option, value in texts if option.about != INVOCATION)


def machine_options(args: argparse.Namespace, table: Table, directory: str) -> str:
    """Return, as such a file, those options that make a machine what it is.

    The paths in them are relative to ``directory``. They are made absolute, those of sockets as far as they can be.
    """
    texts = _texts(args, table)
    return "".join(
        _line(option, _absolute(option, value, directory)) for option, value in texts if option.about == MACHINE
    )


def _texts(args: argparse.Namespace, table: Table) -> list[tuple[Option, Any]]:
    """Return each option that has a key and a value, with its text, or a list of texts, or a bool, or its default."""
    # Of several options that say the same thing, the first that has a key.
    options: dict[str, Option] = {}
    for option in table:
        if option.keys:
            options.setdefault(option.says, option)
    says = {option.dest: option.says for option in table}
    texts = {says[dest]: text for dest, text in table.given(args.verb_argv[1:]).items() if dest in says}
    pairs: list[tuple[Option, Any]] = []
    for name, option in options.items():
        if name in texts:
            pairs.append((option, texts[name]))
        elif isinstance(option.default, bool | int | float | str) and option.default is not False:
            pairs.append((option, option.default))
    return pairs


def _absolute(option: Option, value: Any, directory: str) -> Any:
    if option.path is None:
        return value
    if isinstance(value, list):
        return [option.path(each, directory) for each in value]
    return option.path(value, directory)


def _line(option: Option, value: Any) -> str:
    return f"{option.key} = {_value(option, value)}\n"


def _value(option: Option, value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_quoted(each) for each in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if option.type is not None and text.isascii() and text.isdecimal() and str(int(text)) == text:
        return text
    return _quoted(text)


def _quoted(text: str) -> str:
    import json

    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{text!r} cannot be said in TOML, which is UTF-8") from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
