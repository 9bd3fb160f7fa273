# SPDX-License-Identifier: Apache-2.0
"""Sources of loaded bytes: memory, a file, or a gzip stream. Each byte is copied once, to the guest.

:class:`OpenFile` owns a descriptor. Its parts (:class:`FilePart`, :class:`Gzip` over one) are valid while it is open.
Nothing is read early: a kernel's header costs one page of its file. A file that changes meanwhile is refused once that
is detected. All errors are UsageErrors that name the file.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator

from pyvmm.errors import UsageError
from pyvmm.memory.address import Gpa
from pyvmm.typed import NamedTuple, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO, Final

#: Bytes of a packed file to read, and to unpack, at once.
CHUNK: Final = 1 << 20
GZIP_MAGIC: Final = b"\x1f\x8b\x08"
#: Bytes at a gzip stream's beginning that can be read without unpacking it whole.
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


def whole(content: Content) -> bytes:
    """Return all bytes, for a search."""
    return b"".join(content.chunks()) if isinstance(content, Gzip) else content[:]


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


class Gzip:
    """The contents of a gzip stream, unpacked in chunks. Its beginning can be read at once. ``what`` names the file."""

    size = None

    def __init__(self, packed: Content, what: str) -> None:
        self._packed = packed
        self._what = what
        self._head = b""
        for chunk in self.chunks(PEEK):
            self._head += chunk
            if len(self._head) >= PEEK:
                break

    def __getitem__(self, which: slice, /) -> bytes:
        return self._head[which]

    def chunks(self, most: int = CHUNK) -> Iterator[bytes]:
        """Unpack from the beginning, at most ``most`` bytes at once. Raises UsageError for a damaged stream.

        It may have several members, one after the other (RFC 1952, 2.2).
        """
        import zlib  # many kernels are not packed

        unpacker = zlib.decompressobj(wbits=31)
        at = total = 0
        while True:
            packed = unpacker.unconsumed_tail
            if unpacker.eof:
                packed, at = self._next_member(unpacker.unused_data, at)
                if not packed:
                    return
                unpacker = zlib.decompressobj(wbits=31)
            elif not packed:
                packed = self._packed[at : at + CHUNK]
                at += len(packed)
            try:
                chunk = unpacker.decompress(packed, most)
            except zlib.error as error:
                raise damaged(f"{self._what} is a damaged gzip file: {error}") from None
            if not chunk and not packed:
                raise damaged(f"{self._what} is a truncated gzip file: it ends after {total} bytes unpacked")
            total += len(chunk)
            if chunk:
                yield chunk

    def _next_member(self, behind: bytes, at: int) -> tuple[bytes, int]:
        """Return the next member's first bytes (empty without one), and the offset to read on from.

        ``behind`` was already read. Zeros are skipped. Other bytes, such as a signature, end the stream, as in gzip.
        """
        behind = behind.lstrip(b"\0")
        while len(behind) < len(GZIP_MAGIC):
            more = self._packed[at : at + CHUNK]
            if not more:
                break
            at += len(more)
            behind = (behind + more).lstrip(b"\0")
        return (behind if behind.startswith(GZIP_MAGIC) else b""), at

    def load(self, memory: Loadable, gpa: int, room: int) -> None:
        """Unpack it to ``gpa``. Raises UsageError for more than ``room`` bytes."""
        done = 0
        for chunk in self.chunks():
            if done + len(chunk) > room:
                raise damaged(f"{self._what} is damaged: it unpacks to more than the {room} bytes its header says")
            memory.write(Gpa(gpa + done), chunk)
            done += len(chunk)
