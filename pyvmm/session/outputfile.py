# SPDX-License-Identifier: Apache-2.0
"""A file that is opened before a run and written after it. Owns its descriptor."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, Self

from pyvmm.errors import PyvmmError
from pyvmm.syntax.paths import open_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BUFFER: Final = 1 << 20


class OutputFile:
    """A file written once, at the end. Opened at once, so that an unwritable path fails early. A context manager.

    An existing file keeps its contents until then. A new file is removed if nothing was written.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._written = False

    def __enter__(self) -> Self:
        self._made = not os.path.exists(self._path)
        self._fd = open_output(self._path, keep=True)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._made and not self._written:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def write(self, text: str) -> None:
        """Replace the file's contents by ``text``."""
        with self.writing() as put:
            put(text.encode())

    @contextlib.contextmanager
    def writing(self) -> Iterator[Callable[[bytes], object]]:
        """Yield a function that takes the file's new contents piece by piece."""
        try:
            # A pipe or a device cannot be truncated.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            with open(self._fd, "wb", buffering=_BUFFER, closefd=False) as file:
                yield file.write
        except OSError as error:
            raise PyvmmError(f"{self._path!r} cannot be written: {error.strerror}") from None
        self._written = True
