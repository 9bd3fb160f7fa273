# SPDX-License-Identifier: Apache-2.0
"""Parse options that describe a device: ``PATH,ro,queues=2``, parts between commas.

A part is ``key=value``, or a key that has no value. The first part may be the value of the option's main key without
the key. A value cannot contain a comma.
"""

from __future__ import annotations

import argparse
import os

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


class PartError(argparse.ArgumentTypeError):
    """The part ``key`` is invalid."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Parts:
    """The type of such an option. Called with a text, it returns the values of its parts by key.

    ``keys`` has the converter of each part's text, or None for a key without a value, which becomes True. ``main`` is
    the key whose value may come first without the key. ``check`` takes the text and the values and returns the option's
    value. It raises argparse.ArgumentTypeError for missing or contradicting parts.
    """

    def __init__(
        self,
        keys: Mapping[str, Callable[[str], Any] | None],
        *,
        main: str | None = None,
        check: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.keys, self.main = keys, main
        self._check = check

    def __call__(self, text: str) -> dict[str, Any]:
        """Return the values. Raises PartError for unknown or repeated keys, and for missing values."""
        values: dict[str, Any] = {}
        for number, part in enumerate(text.split(",") if text else ()):
            key, equals, value = self._split(number, part)
            if key not in self.keys:
                raise PartError(key, f"{key!r} in {text!r} is not known; known are {self.known}")
            if key in values:
                raise PartError(key, f"{key} is twice in {text!r}")
            function = self.keys[key]
            if (function is None) == bool(equals):
                how = "takes no value" if function is None else f"needs a value: {key}=..."
                raise PartError(key, f"{part!r} in {text!r}: {key} {how}")
            values[key] = True if function is None else _value(function, key, value, text)
        return values if self._check is None else self._check(text, values)

    @property
    def known(self) -> str:
        """The keys, for a message."""
        return ", ".join(key if function is None else f"{key}=" for key, function in self.keys.items())

    def _split(self, number: int, part: str) -> tuple[str, str, str]:
        key, equals, value = part.partition("=")
        if number == 0 and self.main is not None and not equals and (key not in self.keys or not key):
            return self.main, "=", part
        return key, equals, value

    def absolute(self, key: str, *, longest: Callable[[], int] | None = None) -> Callable[[str, str], str]:
        """Return a function that makes the path in the part ``key`` absolute, for the ``path`` of an option.

        A path that would become longer than ``longest`` bytes stays relative: absolute, every restore would refuse it,
        and relative it works in its directory. The function raises UsageError for a directory with a comma.
        """

        def absolute(text: str, directory: str) -> str:
            most = None if longest is None else longest()
            parts = text.split(",")
            for number, part in enumerate(parts):
                name, _, path = self._split(number, part)
                there = os.path.join(directory, path)
                if name != key or (most is not None and len(os.fsencode(there)) > most):
                    continue
                if "," in there:
                    raise UsageError(
                        f"{path!r} in {directory!r}: the directory's name contains a comma, which would end the part",
                        hint="run the guest in a directory without a comma in its name",
                    )
                parts[number] = f"{key}={there}"
            return ",".join(parts)

        return absolute


def _value(function: Callable[[str], Any], key: str, value: str, text: str) -> Any:
    if not value:
        raise PartError(key, f"{key} in {text!r} is empty")
    try:
        return function(value)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise PartError(key, f"{key} in {text!r}: {error}") from None
