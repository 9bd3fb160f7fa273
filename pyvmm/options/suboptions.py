# SPDX-License-Identifier: Apache-2.0
"""The shape of options that describe a device: ``PATH,ro,queues=2``, parts between commas.

A part is ``key=value``, a key that has no value, or, first and where the option has such, the value of the main key
alone. A value holds no comma.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class PartError(argparse.ArgumentTypeError):
    """What is wrong with the part of ``key``; ``unknown`` where there is no such part."""

    def __init__(self, key: str, message: str, *, unknown: bool = False) -> None:
        super().__init__(message)
        self.key = key
        self.unknown = unknown


def parse(text: str, keys: Mapping[str, Callable[[str], Any] | None], *, main: str | None = None) -> dict[str, Any]:
    """Return the values of the parts of ``text``: what a key's function makes of it, True for a key that has None.

    ``main`` is the key whose value may stand first without it. Raises PartError for keys that are unknown, twice there,
    or without a value that they need.
    """
    values: dict[str, Any] = {}
    for number, part in enumerate(text.split(",") if text else ()):
        key, equals, value = part.partition("=")
        if number == 0 and main is not None and not equals and (key not in keys or not key):
            key, equals, value = main, "=", part
        if key not in keys:
            raise PartError(key, f"{key!r} in {text!r} is not known; known are {_known(keys)}", unknown=True)
        if key in values:
            raise PartError(key, f"{key} is twice in {text!r}")
        function = keys[key]
        if (function is None) == bool(equals):
            how = f"has no value, {key} alone says it" if function is None else f"needs a value: {key}=..."
            raise PartError(key, f"{part!r} in {text!r}: {key} {how}")
        values[key] = True if function is None else _value(function, key, value, text)
    return values


def _value(function: Callable[[str], Any], key: str, value: str, text: str) -> Any:
    if not value:
        raise PartError(key, f"{key} in {text!r} is empty")
    try:
        return function(value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise PartError(key, f"{key} in {text!r}: {error}") from None


def _known(keys: Mapping[str, Callable[[str], Any] | None]) -> str:
    return ", ".join(key if function is None else f"{key}=" for key, function in keys.items())
