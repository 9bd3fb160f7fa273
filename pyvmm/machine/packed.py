# SPDX-License-Identifier: Apache-2.0
"""Compressed kernels: gzip, xz and zstd streams, unpacked in chunks on the way to the guest.

Only compressed kernels import this module. A stream is not trusted, nor is a size that it says: a reader gets it chunk
by chunk and stops at what it has room for. A chunk has at most CHUNK bytes, of zstd at most 33 MiB, because its library
takes no limit. An unpacker uses no more memory than WINDOW.
"""

from __future__ import annotations

from pyvmm.errors import PyvmmError, UsageError, pip_install
from pyvmm.machine.content import CHUNK, MAGICS, PEEK, Bytes, Content, Loadable, damaged
from pyvmm.memory.address import MIB, Gpa

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, Final

WINDOW: Final = 256 * MIB
"""Bytes of memory that an unpacker may use. Linux packs kernels with windows of up to 128 MiB."""
_SLICE: Final = 1024


class _BadStream(Exception):
    """The stream is damaged."""


class _Member:
    """Unpacks one member of a stream. ``stream`` is a library's object, which raises ``error`` for damaged bytes."""

    def __init__(self, stream: Any, error: type[Exception]) -> None:
        self._stream, self._error = stream, error

    @property
    def eof(self) -> bool:
        """Whether the member has ended."""
        return bool(self._stream.eof)

    @property
    def behind(self) -> bytes:
        """The bytes that it was given beyond the member's end."""
        return bytes(self._stream.unused_data)

    @property
    def hungry(self) -> bool:
        """Whether it needs more of the stream to go on."""
        return bool(self._stream.needs_input)

    def take(self, packed: bytes, most: int) -> bytes:
        """Unpack about ``most`` bytes more. Only a hungry one takes ``packed``. Raises _BadStream."""
        try:
            return self._unpack(packed, most)
        except self._error as error:
            raise _BadStream(error) from None

    def _unpack(self, packed: bytes, most: int) -> bytes:
        return bytes(self._stream.decompress(packed, most))


class _Gzip(_Member):
    def __init__(self) -> None:
        import zlib

        super().__init__(zlib.decompressobj(wbits=31), zlib.error)

    @property
    def hungry(self) -> bool:
        return not self._stream.unconsumed_tail

    def _unpack(self, packed: bytes, most: int) -> bytes:
        return super()._unpack(self._stream.unconsumed_tail + packed, most)


class _Xz(_Member):
    def __init__(self) -> None:
        import lzma

        super().__init__(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=WINDOW), lzma.LZMAError)


class _Zstd(_Member):
    """A frame. It is fed in small slices: a block of 4 bytes may unpack to 128 KiB, and all of it comes at once."""

    def __init__(self) -> None:
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW // 2)
        super().__init__(unpacker.decompressobj(), zstandard.ZstdError)
        self._left = memoryview(b"")

    @property
    def behind(self) -> bytes:
        return super().behind + bytes(self._left)

    @property
    def hungry(self) -> bool:
        return not self._left

    def _unpack(self, packed: bytes, most: int) -> bytes:
        if packed:
            self._left = memoryview(packed)
        unpacked = bytearray()
        while self._left and not self.eof and len(unpacked) < most:
            part, self._left = self._left[:_SLICE], self._left[_SLICE:]
            unpacked += self._stream.decompress(part)
        return bytes(unpacked)


_MEMBERS: Final[dict[str, Callable[[], _Member]]] = {"gzip": _Gzip, "xz": _Xz, "zstd": _Zstd}
_FIRST_BYTES: Final = {method: magic for magic, method in MAGICS.items()}
_ZBOOT_NAMES: Final = {"xzkern": "xz", "zstd22": "zstd"}
"""Names of make's commands in Linux (scripts/Makefile.lib), which an EFI zboot header may have instead."""


def method_of(name: str) -> str | None:
    """Return the method that an EFI zboot header names, or None for one that is not supported."""
    name = _ZBOOT_NAMES.get(name, name)
    return name if name in _MEMBERS else None


class Packed:
    """The contents of a compressed stream, unpacked in chunks. Its beginning can be read at once.

    ``what`` names the file in errors, ``method`` is a value of MAGICS. Raises PyvmmError if its library is missing.
    """

    size = None

    def __init__(self, packed: Content, what: str, method: str) -> None:
        self._packed, self._what, self.method = packed, what, method
        self._magic = _FIRST_BYTES[method]
        self._head = b""
        for chunk in self.chunks(PEEK):
            self._head += chunk
            if len(self._head) >= PEEK:
                break

    def __getitem__(self, which: slice, /) -> bytes:
        return self._head[which]

    def _member(self) -> _Member:
        try:
            return _MEMBERS[self.method]()
        except ImportError:
            raise PyvmmError(
                f"{self._what} is compressed with {self.method}, but the package that unpacks it is not installed",
                hint=f"{pip_install('zstandard')}; or unpack it to a plain Image first",
            ) from None

    def chunks(self, most: int = CHUNK) -> Iterator[bytes]:
        """Unpack from the beginning, about ``most`` bytes at once. Raises UsageError for a damaged stream.

        It may have several members, one after the other (RFC 1952, 2.2).
        """
        member = self._member()
        at = total = 0
        while True:
            packed = b""
            if member.eof:
                packed, at = self._next_member(member.behind, at)
                if not packed:
                    return
                member = self._member()
            elif member.hungry:
                packed = self._packed[at : at + CHUNK]
                at += len(packed)
            starving = member.hungry and not packed
            try:
                chunk = member.take(packed, most)
            except _BadStream as error:
                raise damaged(f"{self._what} is a damaged {self.method} file: {error}") from None
            if not chunk and starving:
                raise damaged(f"{self._what} is a truncated {self.method} file: it ends after {total} bytes unpacked")
            total += len(chunk)
            if chunk:
                yield chunk

    def _next_member(self, behind: bytes, at: int) -> tuple[bytes, int]:
        """Return the next member's first bytes (empty without one), and the offset to read on from.

        ``behind`` was already read. Zeros are skipped. Other bytes, such as a signature, or the size that follows a
        kernel in EFI zboot, end the stream, as in gzip.
        """
        behind = behind.lstrip(b"\0")
        while len(behind) < len(self._magic):
            more = self._packed[at : at + CHUNK]
            if not more:
                break
            at += len(more)
            behind = (behind + more).lstrip(b"\0")
        return (behind if behind.startswith(self._magic) else b""), at

    def load(self, memory: Loadable, gpa: int, room: int) -> None:
        """Unpack it to ``gpa``. Raises UsageError for more than ``room`` bytes."""
        done = 0
        for chunk in self.chunks():
            if done + len(chunk) > room:
                raise damaged(f"{self._what} is damaged: it unpacks to more than the {room} bytes its header says")
            memory.write(Gpa(gpa + done), chunk)
            done += len(chunk)

    def unpack(self, room: int, too_big: Callable[[], UsageError]) -> Bytes:
        """Return all of it, for a kernel that must be parsed as a whole.

        Raises UsageError if there is nothing, ``too_big()`` for more than ``room`` bytes.
        """
        unpacked = bytearray()
        for chunk in self.chunks():
            unpacked += chunk
            if len(unpacked) > room:
                raise too_big()
        if not unpacked:
            raise damaged(f"{self._what} is a {self.method} file without contents")
        return Bytes(bytes(unpacked))


def whole(content: Content) -> bytes:
    """Return all bytes, for a search."""
    return b"".join(content.chunks()) if isinstance(content, Packed) else content[:]
