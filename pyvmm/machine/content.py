# SPDX-License-Identifier: Apache-2.0
"""Sources of loaded bytes: memory, a file, or a compressed stream (:mod:`pyvmm.machine.packed`).

Each byte is copied once, to the guest. :class:`OpenFile` owns a descriptor. Its parts are valid while it is open.
Nothing is read early: a kernel's header costs one page of its file. A file that changes meanwhile is refused once that
is detected. All errors are UsageErrors that name the file.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable

from pyvmm.errors import UsageError
from pyvmm.memory.address import Gpa
from pyvmm.typed import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO, Final

#: Bytes of a packed file to read, and to unpack, at once.
CHUNK: Final = 1 << 20
MAGICS: Final = {b"\x1f\x8b\x08": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files that can be unpacked, and the method."""
#: Bytes at a compressed stream's beginning that can be read without unpacking it whole.
PEEK: Final = 4096


def damaged(what: str) -> UsageError:
    """Return the error for a damaged file."""
    return UsageError(what, hint="copy, download or build it again")


def big_endian(source: str) -> UsageError:
    """Return the error for a big-endian kernel."""
    return UsageError(
        f"kernel {source} is big-endian; only little-endian guests are supported",
        hint="build it with CONFIG_CPU_BIG_ENDIAN off",
    )


class Loadable(Protocol):
    """The part of guest memory's interface that loading needs."""

    def write(self, gpa: Gpa, data: bytes, /) -> None:
        """Copy ``data`` to ``gpa``."""
        ...

    def load_file(self, gpa: Gpa, fd: int, at: int, size: int, /) -> int:
        """Read ``size`` bytes at ``at`` of a file to ``gpa``. Returns the number of bytes read."""
        ...


class Content(Protocol):
    """Bytes to load. ``size`` is None if it is known only after unpacking. Slices are bytes."""

    @property
    def size(self) -> int | None:
        """The number of bytes."""
        ...

    def __getitem__(self, which: slice, /) -> bytes:
        """Return a slice of the bytes."""
        ...

    def load(self, memory: Loadable, gpa: int, room: int) -> None:
        """Load all bytes to ``gpa``, which has room for ``room`` bytes."""
        ...


class Known(Content, Protocol):
    """Content of known size, with parts."""

    @property
    def size(self) -> int:
        """How many bytes there are."""
        ...

    def part(self, start: int, size: int) -> Known:
        """Return ``size`` of them from ``start`` on, all inside."""
        ...

    def stream(self) -> BinaryIO:
        """Return all of them as a file to read."""
        ...


class Bytes:
    """Content that is already in memory."""

    __slots__ = ("data",)

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bytes) and self.data == other.data

    def __hash__(self) -> int:
        return hash(self.data)

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self.data)

    def __getitem__(self, which: slice, /) -> bytes:
        return self.data[which]

    def part(self, start: int, size: int) -> Bytes:
        """Return ``size`` of them from ``start`` on."""
        return Bytes(self.data[start : start + size])

    def stream(self) -> BinaryIO:
        """Return them as a file to read."""
        return io.BytesIO(self.data)

    def load(self, memory: Loadable, gpa: int, room: int) -> None:  # noqa: ARG002 - who placed them knows their size
        """Put them at ``gpa``."""
        if self.data:
            memory.write(Gpa(gpa), self.data)


#: The source of a segment of zeros, or of one that is written later.
NOTHING: Final = Bytes()


class Segment(NamedTuple):
    """``size`` bytes at ``gpa`` that start with ``data``. The rest is zero in fresh memory, and is not written."""

    what: str
    gpa: int
    size: int
    data: Content = NOTHING

    @property
    def end(self) -> int:
        """The first gpa after it."""
        return self.gpa + self.size


class OpenFile:
    """A regular file, open for reading. ``what`` names it in errors ("kernel path"). Close it.

    If the file is missing, ``missing_hint(what, path)`` gives the error's hint.
    """

    def __init__(
        self, path: str, what: str, *, missing_hint: Callable[[str, str], str | None] = lambda _what, _path: None
    ) -> None:
        self.what = f"{what} {path}"
        try:
            # O_NONBLOCK: a FIFO without a writer must be refused, and must not block.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise UsageError(f"{self.what}: no such file", hint=missing_hint(what, path)) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"{what} {path!r} cannot be opened: {reason}") from None
        try:
            status = os.fstat(self.fd)
            if stat.S_ISDIR(status.st_mode):
                raise UsageError(f"{self.what} is a directory", hint=f"name the {what} file itself")
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{self.what} is not a regular file", hint="copy it to a regular file")
            if status.st_size == 0:
                raise damaged(f"{self.what} is empty")
        except BaseException:
            self.close()
            raise
        self.size = status.st_size

    def read(self, at: int, size: int) -> bytes:
        """Return up to ``size`` bytes at ``at``; fewer at the file's end."""
        try:
            return os.pread(self.fd, size, at)
        except OSError as error:
            raise self.unreadable(error) from None

    def unreadable(self, error: OSError) -> UsageError:
        """Return the error for a failed read."""
        return UsageError(f"{self.what} cannot be read: {error.strerror}")

    def close(self) -> None:
        """Close it; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class FilePart:
    """``size`` bytes of an open file from ``start`` on."""

    __slots__ = ("file", "size", "start")

    def __init__(self, file: OpenFile, start: int, size: int) -> None:
        self.file = file
        self.start = start
        self.size = size

    def __getitem__(self, which: slice, /) -> bytes:
        start, stop, _ = which.indices(self.size)
        return self.file.read(self.start + start, max(stop - start, 0))

    def part(self, start: int, size: int) -> FilePart:
        """Return ``size`` of them from ``start`` on."""
        return FilePart(self.file, self.start + start, size)

    def stream(self) -> BinaryIO:
        """Return the whole file as a stream, from its start. A part of a file cannot be a stream."""
        return open(self.file.fd, "rb", closefd=False)

    def load(self, memory: Loadable, gpa: int, room: int) -> None:  # noqa: ARG002 - who placed them knows their size
        """Read the bytes straight to ``gpa``."""
        try:
            done = memory.load_file(Gpa(gpa), self.file.fd, self.start, self.size)
        except OSError as error:
            raise self.file.unreadable(error) from None
        if done < self.size:
            raise UsageError(
                f"{self.file.what} was truncated while it was loaded: it ends at byte {self.start + done}, "
                f"but had {self.start + self.size} before",
                hint="wait until its writer has finished",
            )
