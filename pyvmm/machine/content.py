# SPDX-License-Identifier: Apache-2.0
"""What is loaded, and where its bytes come from: memory, a file, or a gzip stream. Each is copied once, to the guest.

:class:`OpenFile` owns a descriptor; what is taken from it (:class:`FilePart`, :class:`Gzip` over one) lives as long as
it is open. Nothing here is read before it is asked for: a kernel's header costs one page of its file. A file that
changes meanwhile is refused when that is noticed. All errors are UsageErrors that name the file.
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

#: Bytes of a packed file read, and unpacked, at once.
CHUNK: Final = 1 << 20
GZIP_MAGIC: Final = b"\x1f\x8b\x08"
#: Bytes of a gzip stream's beginning that can be looked at without unpacking it.
PEEK: Final = 4096


def damaged(what: str) -> UsageError:
    """Make the error of a file that is not as it was made, and can only be got again."""
    return UsageError(what, hint="copy, download or build it again")


def big_endian(source: str) -> UsageError:
    """Make the error of a kernel whose data is big-endian."""
    return UsageError(
        f"kernel {source} is big-endian; only little-endian guests are supported",
        hint="build it with CONFIG_CPU_BIG_ENDIAN off",
    )


class Loadable(Protocol):
    """As much of guest memory as loading needs."""

    def write(self, gpa: Gpa, data: bytes, /) -> None:
        """Copy ``data`` to ``gpa``."""
        ...

    def load_file(self, gpa: Gpa, fd: int, at: int, size: int, /) -> int:
        """Read ``size`` bytes at ``at`` of a file to ``gpa``, and return how many there were."""
        ...


class Content(Protocol):
    """Bytes to be loaded. ``size`` is None where only unpacking tells; slices are bytes."""

    @property
    def size(self) -> int | None:
        """How many there are."""
        ...

    def __getitem__(self, which: slice, /) -> bytes:
        """Return a few of them."""
        ...

    def load(self, memory: Loadable, gpa: int, room: int) -> None:
        """Put all of them at ``gpa``, where there is room for ``room`` bytes."""
        ...


class Known(Content, Protocol):
    """Content that can be taken apart."""

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
    """Bytes that are in memory already."""

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
    """Return all of it, for who has to search it."""
    return b"".join(content.chunks()) if isinstance(content, Gzip) else content[:]


#: What a segment of zeros, or one that is written later, is loaded from.
NOTHING: Final = Bytes()


class Segment(NamedTuple):
    """``size`` bytes at ``gpa`` that start with ``data``; the rest is zero, as fresh memory is, and not written."""

    what: str
    gpa: int
    size: int
    data: Content = NOTHING

    @property
    def end(self) -> int:
        """The first gpa behind it."""
        return self.gpa + self.size


class OpenFile:
    """A regular file, open to be read; ``what`` names it in errors ("kernel path"). Close it.

    ``missing_hint`` is asked with ``what`` and ``path`` where there is no such file.
    """

    def __init__(
        self, path: str, what: str, *, missing_hint: Callable[[str, str], str | None] = lambda _what, _path: None
    ) -> None:
        self.what = f"{what} {path}"
        try:
            # O_NONBLOCK: a FIFO without a writer must be refused, not waited for.
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
                raise UsageError(f"{self.what} is not a regular file", hint="copy it to one")
            if status.st_size == 0:
                raise damaged(f"{self.what} is empty")
        except BaseException:
            self.close()
            raise
        self.size = status.st_size

    def read(self, at: int, size: int) -> bytes:
        """Return ``size`` bytes at ``at``, fewer at the file's end."""
        try:
            return os.pread(self.fd, size, at)
        except OSError as error:
            raise self.unreadable(error) from None

    def unreadable(self, error: OSError) -> UsageError:
        """Make the error of a read that failed."""
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
        """Return the file they are in, from its start; parts of a file have no stream of their own."""
        return open(self.file.fd, "rb", closefd=False)

    def load(self, memory: Loadable, gpa: int, room: int) -> None:  # noqa: ARG002 - who placed them knows their size
        """Read them straight to ``gpa``."""
        try:
            done = memory.load_file(Gpa(gpa), self.file.fd, self.start, self.size)
        except OSError as error:
            raise self.file.unreadable(error) from None
        if done < self.size:
            raise UsageError(
                f"{self.file.what} has become shorter while it was loaded: it ends at byte {self.start + done}, "
                f"{self.start + self.size} were there",
                hint="wait until whatever writes it is done",
            )


class Gzip:
    """What a gzip stream unpacks to, a chunk at a time; its beginning can be looked at. ``what`` names the file."""

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
        """Unpack from the beginning, at most ``most`` bytes at once; UsageError where the stream is damaged.

        It may have several members, one behind the other (RFC 1952, 2.2).
        """
        import zlib  # many a kernel is not packed

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
                raise damaged(f"{self._what} starts like a gzip file, but is damaged: {error}") from None
            if not chunk and not packed:
                raise damaged(f"{self._what} is a truncated gzip file: it ends after {total} bytes unpacked")
            total += len(chunk)
            if chunk:
                yield chunk

    def _next_member(self, behind: bytes, at: int) -> tuple[bytes, int]:
        """Return how the member behind one begins, nothing where there is none, and where to read on.

        ``behind`` was read already. Zeros are skipped, and what else is no member ends the stream, as gzip has it: a
        signature may stand there.
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
        """Unpack it to ``gpa``; UsageError for more than ``room`` bytes."""
        done = 0
        for chunk in self.chunks():
            if done + len(chunk) > room:
                raise damaged(f"{self._what} is damaged: it unpacks to more than the {room} bytes its header says")
            memory.write(Gpa(gpa + done), chunk)
            done += len(chunk)
