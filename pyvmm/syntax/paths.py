# SPDX-License-Identifier: Apache-2.0
"""Options that name files: those that are written, and those that have to be found again from another directory."""

from __future__ import annotations

import os

from pyvmm.errors import PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from typing import Any


class OutputPath(str):
    """The name of a file to be written, as it was given.

    Options with ``type=OutputPath`` write to the workstation's file even where the verb runs in the lab.
    """

    __slots__ = ()

    @property
    def path(self) -> str:
        """The file's path in what was given."""
        return str(self)


class _OutputBehind(OutputPath):
    """An output file behind the first ``=``, as in ``file=PATH``."""

    __slots__ = ()

    @property
    def path(self) -> str:
        return self.partition("=")[2]


def output_behind(word: str) -> Callable[[str], str]:
    """Return a type for options one of whose forms is ``WORD=FILE`` with a file to be written."""
    return lambda text: _OutputBehind(text) if text.startswith(f"{word}=") and text != f"{word}=" else text


def open_output(path: str, *, keep: bool = False) -> int:
    """Return a descriptor to write a file by, which is emptied unless ``keep``. UsageError where that cannot be."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC), 0o666)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{path!r} cannot be written: {reason}") from None


def write_output(path: str, data: bytes) -> None:
    """Write a file whole. Raises UsageError where it cannot be opened, PyvmmError where it cannot be written."""
    with open(open_output(path), "wb") as file:
        try:
            file.write(data)
            file.flush()
        except OSError as error:
            raise PyvmmError(f"{path!r} cannot be written: {error.strerror}") from None


def find_outputs(args: argparse.Namespace) -> list[str]:
    """Return the paths of all files that the parsed command line says are to be written."""

    def look(value: Any) -> Iterator[str]:
        if isinstance(value, OutputPath):
            yield value.path
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from look(item)

    return list(dict.fromkeys(look(list(vars(args).values()))))


# -- made absolute: each is for an option's ``path``


def whole_path(text: str, directory: str) -> str:
    """Make a path absolute that is all of an option's text."""
    return os.path.join(directory, text)


def path_behind(word: str) -> Callable[[str, str], str]:
    """Return what makes the path in ``WORD=PATH`` absolute; other texts stay as they are."""

    def absolute(text: str, directory: str) -> str:
        before, equals, path = text.partition("=")
        return f"{word}={os.path.join(directory, path)}" if equals and before == word else text

    return absolute
