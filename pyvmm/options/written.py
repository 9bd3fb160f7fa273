# SPDX-License-Identifier: Apache-2.0
"""Write options as a file, for ``--print-config`` and for snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyvmm.errors import UsageError
from pyvmm.syntax.option import INVOCATION, MACHINE

if TYPE_CHECKING:
    import argparse

    from pyvmm.options.table import Table
    from pyvmm.syntax.option import Option


def as_toml(args: argparse.Namespace, table: Table) -> str:
    """Return the options in ``args``, and the defaults of others that have a value, as a file.

    Raises UsageError for a value that TOML cannot express.
    """
    texts = _texts(args, table)
    return "".join(_line(option, value) for option, value in texts if option.about != INVOCATION)


def machine_options(args: argparse.Namespace, table: Table, directory: str) -> str:
    """Return the options that define the machine, as such a file.

    The paths in them are relative to ``directory``. They are made absolute, except those of sockets that would become
    too long.
    """
    texts = _texts(args, table)
    return "".join(
        _line(option, _absolute(option, value, directory)) for option, value in texts if option.about == MACHINE
    )


def _texts(args: argparse.Namespace, table: Table) -> list[tuple[Option, Any]]:
    """Return each option that has a key and a value: its text, list of texts, bool, or default."""
    # Of several options with the same meaning, the first that has a key.
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
        raise UsageError(f"{text!r} cannot be written in TOML, which is UTF-8") from None
    # Every character that a terminal may obey is written as a number, in TOML's way.
    return "".join(
        each if each.isprintable() else f"\\U{ord(each):08x}" for each in json.dumps(text, ensure_ascii=False)
    )
