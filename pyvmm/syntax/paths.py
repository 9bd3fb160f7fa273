# SPDX-License-Identifier: Apache-2.0
"""Types of options that name files: output files, and paths to make absolute."""

from __future__ import annotations

import os

from pyvmm.errors import PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from typing import Any


class OutputPath(str):
    """The name of an output file, as given.

    Options with ``type=OutputPath`` write to the workstation's file even where the verb runs in the lab.
    """

    __slots__ = ()

    @property
    def path(self) -> str:
        """The file's path in the given text."""
        return str(self)


class _OutputBehind(OutputPath):
    """An output file after the first ``=``, as in ``file=PATH``."""

    __slots__ = ()

    @property
    def path(self) -> str:
        return self.partition("=")[2]


def output_behind(word: str) -> Callable[[str], str]:
    """Return a type for options that accept ``WORD=FILE`` with an output file."""
    return lambda text: _OutputBehind(text) if text.startswith(f"{word}=") and text != f"{word}=" else text


def open_output(path: str, *, keep: bool = False) -> int:
    """Open a file for writing and return its descriptor. Truncates it unless ``keep``. Raises UsageError."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC), 0o666)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{path!r} cannot be written: {reason}") from None


def write_output(path: str, data: bytes) -> None:
    """Write a whole file. Raises UsageError if it cannot be opened, PyvmmError if it cannot be written."""
    with open(open_output(path), "wb") as file:
        try:
            file.write(data)
            file.flush()
        except OSError as error:
            raise PyvmmError(f"{path!r} cannot be written: {error.strerror}") from None


def find_outputs(args: argparse.Namespace) -> list[str]:
    """Return the paths of all output files in a parsed command line."""

    def look(value: Any) -> Iterator[str]:
        if isinstance(value, OutputPath):
            yield value.path
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from look(item)

    return list(dict.fromkeys(look(list(vars(args).values()))))


# -- making paths absolute, for an option's ``path``


def whole_path(text: str, directory: str) -> str:
    """Make a path absolute that is the option's whole text."""
    return os.path.join(directory, text)


def path_behind(word: str) -> Callable[[str, str], str]:
    """Return a function that makes the path in ``WORD=PATH`` absolute and keeps other texts."""

    def absolute(text: str, directory: str) -> str:
        before, equals, path = text.partition("=")
        return f"{word}={os.path.join(directory, path)}" if equals and before == word else text

    return absolute
