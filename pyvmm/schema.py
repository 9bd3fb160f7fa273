# SPDX-License-Identifier: Apache-2.0
"""Check JSON values against a schema, which is data.

A schema is a dict with a schema for each member, a list with one for all elements, a tuple with one for each element,
or a :class:`Kind`. Of :class:`Either` one schema must fit. :class:`Each` has one for all members of a dict.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable


class SchemaError(ValueError):
    """A value does not fit. The message names its place."""


class Kind:
    """A kind of values: its name, and what tells whether a value is of it."""

    def __init__(self, name: str, fits: Callable[[Any], bool]) -> None:
        self.name, self.fits = name, fits


class Each:
    """A dict whose members all have one schema. Its keys are of the kind ``key``."""

    def __init__(self, key: Kind, schema: Any) -> None:
        self.key, self.schema = key, schema


class Either:
    """One of several schemas."""

    def __init__(self, *schemas: Any) -> None:
        self.schemas = schemas


def _matching(name: str, pattern: str) -> Kind:
    whole = re.compile(pattern)
    return Kind(name, lambda value: isinstance(value, str) and whole.fullmatch(value) is not None)


def _number(bits: int) -> Kind:
    return Kind(f"a number from 0 to 2**{bits} - 1", lambda value: type(value) is int and not value >> bits)


U32: Final = _number(32)
NUMBER: Final = _number(63)
U64: Final = _number(64)
BOOL: Final = Kind("true or false", lambda value: isinstance(value, bool))
TEXT: Final = Kind("text", lambda value: isinstance(value, str))
HEX: Final = _matching("a number in hexadecimal", "0x[0-9a-f]+")
BYTES: Final = _matching("bytes in hexadecimal", "(?:[0-9a-f]{2})*")
NOTHING: Final = Kind("null", lambda value: value is None)
OBJECT: Final = Kind("an object", lambda value: isinstance(value, dict))


def check(value: Any, schema: Any, where: str) -> None:
    """Raise SchemaError if ``value`` does not fit ``schema``. ``where`` names it."""
    match schema:
        case Kind():
            if not schema.fits(value):
                raise SchemaError(f"{where} is {_shown(value)}, not {schema.name}")
        case Either():
            _check_either(value, schema, where)
        case Each():
            check(value, OBJECT, where)
            for key, each in value.items():
                check(key, schema.key, f"a key of {where}")
                check(each, schema.schema, f"{where}.{key}")
        case dict():
            check(value, OBJECT, where)
            if value.keys() != schema.keys():
                raise SchemaError(f"{where} has the members {_shown(sorted(value))}, not {_shown(sorted(schema))}")
            for key, each in schema.items():
                check(value[key], each, f"{where}.{key}")
        case _:
            _check_list(value, schema, where)


def _check_list(value: Any, schema: list[Any] | tuple[Any, ...], where: str) -> None:
    if not isinstance(value, list):
        raise SchemaError(f"{where} is {_shown(value)}, not a list")
    if isinstance(schema, tuple) and len(value) != len(schema):
        raise SchemaError(f"{where} has {len(value)} elements, not {len(schema)}")
    for number, each in enumerate(value):
        check(each, schema[number] if isinstance(schema, tuple) else schema[0], f"{where}[{number}]")


def _check_either(value: Any, schema: Either, where: str) -> None:
    *others, last = schema.schemas
    for each in others:
        with contextlib.suppress(SchemaError):
            check(value, each, where)
            return
    check(value, last, where)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
