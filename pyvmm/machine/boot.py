# SPDX-License-Identifier: Apache-2.0
"""Boot protocol: identify a kernel file, place its parts in guest memory, and set the first vCPU's start state.

The machine calls :func:`read` before it opens anything else. It calls :func:`place` once memory has its slots and the
devices their places. Each file is read once, straight to guest memory. The device tree is written last. A
:class:`BootImage` owns its files in between. Everything except the loading is a pure function of bytes.

    1. open the file, or the built-in payload, and look at its header, through compression and EFI zboot
    2. identify it: arm64 Image, ELF, or else a flat binary
    3. place it: an Image at RAM's start + text_offset, an ELF where its program headers say, a flat binary at 512 KiB
    4. place the device tree in the last aligned 2 MiB of memory (at most of its first 32 GiB), the initrd right below
    5. refuse parts that overlap or lie outside memory
    6. load it all, unpacking on the way; pc = the entry, x0 = the device tree's gpa
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Sequence
from itertools import pairwise

from pyvmm.errors import UsageError, hex_
from pyvmm.machine import layout
from pyvmm.machine.content import (
    MAGICS,
    PEEK,
    Bytes,
    Content,
    FilePart,
    Known,
    Loadable,
    OpenFile,
    Segment,
    big_endian,
    damaged,
)
from pyvmm.machine.describing import Describable, GicNode, describe, machine_tree, without_entropy
from pyvmm.machine.fdt import Tree, check_header
from pyvmm.memory.address import MIB, Gpa, align_down
from pyvmm.pages import IMAGE_PAGES
from pyvmm.typed import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.devices.base import Line

#: Linux Documentation/arch/arm64/booting.rst: a device tree has at most 2 MiB, and Linux maps it by blocks of 2 MiB.
FDT_ROOM: Final = 2 * MIB

#: booting.rst: initrd and kernel lie in one window of this size, which starts at a multiple of 1 GiB, as RAM does.
INITRD_WINDOW: Final = 32 << 30

#: Bytes of entropy for a Linux guest: 8 for the address of its kernel, 64 for its random numbers.
SEEDS: Final = 8 + 64

PAYLOAD: Final = "payload:"

# booting.rst, "Call the kernel image": code0, code1, text_offset, image_size, flags, res2-4, magic, res5.
_IMAGE: Final = struct.Struct("<2I3Q24x4sI")
_IMAGE_MAGIC: Final = b"ARM\x64"
_IMAGE_MAGIC_AT: Final = 0x38
_IMAGE_BIG_ENDIAN: Final = 1
# For kernels before 3.17, which leave image_size 0.
_IMAGE_OLD_OFFSET: Final = 0x8_0000
# Linux drivers/firmware/efi/libstub/zboot-header.S: MZ, "zimg", payload offset and size, 8 bytes, compression's name.
_ZBOOT: Final = struct.Struct("<4s4s2I8x32s")
_ELF_MAGIC: Final = b"\x7fELF"

_OTHERS: Final = {
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"\x02\x21\x4c\x18": "compressed with lz4",
    b"BZh": "compressed with bzip2",
    b"\x27\x05\x19\x56": "a U-Boot image",
    b"ANDROID!": "an Android boot image",
    b"QFI\xfb": "a qcow2 disk image",
    b"070701": "a cpio archive, as initrds are",
    b"!<arch>": "an archive",
}
"""First bytes of files that users may mistake for a kernel. No program begins with these instructions."""

_TEXT: Final = bytes(range(0x20, 0x7F)) + b"\t\n\r\f"

_UNPACK_HINT: Final = "unpack it to a plain Image first"


class BootImage(NamedTuple):
    """A parsed kernel file: ``kind`` is Image, ELF or flat; ``pc`` the gpa of its first instruction.

    It holds open the files that its parts are loaded from. Close it.
    """

    kind: str
    source: str
    pc: int
    segments: tuple[Segment, ...]
    initrd: Known | None = None
    files: contextlib.ExitStack | None = None
    page: int = 0
    """Bytes of the kernel's pages, as an Image's header says them; 0 if it does not."""

    def close(self) -> None:
        """Close the files; idempotent."""
        if self.files is not None:
            self.files.close()


class Entry(NamedTuple):
    """The first vCPU's start state, and the device tree as written. ``plan`` is everything that was loaded."""

    pc: Gpa
    fdt: Gpa
    device_tree: bytes
    plan: tuple[Segment, ...]
    tree: Tree | None = None

    def described(self) -> bytes:
        """Return the device tree without the random seeds that pyvmm put in."""
        return self.device_tree if self.tree is None else without_entropy(self.tree).to_bytes()


# ---- reading -----------------------------------------------------------------------------------------------------


def read(kernel: str, initrd: str | None = None, *, room: int = layout.RAM_LIMIT) -> BootImage:
    """Open and identify ``kernel`` (a path, or ``payload:NAME``) and open ``initrd``; close the result.

    ``room`` is the guest's memory in bytes. Larger files are refused before they are read or unpacked. Raises
    UsageError for a file that is missing, unreadable, not a file, empty, damaged, or for another machine.
    """
    with contextlib.ExitStack() as files:
        if kernel.startswith(PAYLOAD):
            from pyvmm.payloads import memory_of, payload

            binary = payload(kernel.removeprefix(PAYLOAD))
            image = _flat(Bytes(binary), kernel, memory_of(binary))
        else:
            image = identify(_open(kernel, "kernel", room, files), kernel, room=room)
        ramdisk = None if initrd is None else _open(initrd, "initrd", room, files)
        return image._replace(initrd=ramdisk, files=files.pop_all())


def identify(data: Known, source: str, *, room: int = layout.RAM_LIMIT) -> BootImage:
    """Identify ``data`` and decide where its parts go. ``source`` names it in errors."""
    if not data.size:
        raise damaged(f"kernel {source} is empty")
    whole: Content = data
    start = data[:8]
    if start == b"MZ\0\0zimg":
        whole = _zboot_payload(data, source)
    elif method := next((name for magic, name in MAGICS.items() if start.startswith(magic)), None):
        whole = _packed(data, source, method)
    if whole[_IMAGE_MAGIC_AT : _IMAGE_MAGIC_AT + 4] == _IMAGE_MAGIC and whole[: len(_ELF_MAGIC)] != _ELF_MAGIC:
        return _image(whole, source, room)
    if whole.size is None:
        data = _unpack(whole, source, room)
    if data[: len(_ELF_MAGIC)] == _ELF_MAGIC:
        from pyvmm.machine.elf import segments

        pc, parts = segments(data, source)
        return BootImage("ELF", source, pc, parts)
    if data[:2] == b"MZ":
        raise UsageError(
            f"kernel {source} is an EFI program, but not an arm64 Linux Image",
            hint="is it a kernel for another architecture? An arm64 Image has ARM\\x64 at byte 56",
        )
    # A flat binary has no signature. Only data whose first instruction cannot execute can be refused.
    start = data[:PEEK]
    for magic, what in _OTHERS.items():
        if start.startswith(magic):
            raise UsageError(f"kernel {source} is {what}", hint=_UNPACK_HINT if "compressed" in what else None)
    if start.isascii() and not start.translate(None, _TEXT):
        raise UsageError(f"kernel {source} is a text file", hint="name an Image, an ELF file, or a flat arm64 binary")
    if not any(start):
        raise damaged(f"kernel {source} starts with {len(start)} bytes of zeros, which are not code")
    return _flat(data, source)


def read_tree(path: str) -> bytes:
    """Return the device tree in a file unchanged. Raises UsageError if it is not one, or is larger than FDT_ROOM."""
    with contextlib.closing(OpenFile(path, "device tree")) as file:
        if file.size > FDT_ROOM:
            raise UsageError(f"{file.what} has {file.size} bytes, more than the maximum of {FDT_ROOM}")
        data = file.read(0, file.size)
    return data[: check_header(data, file.what)]


def _open(path: str, what: str, room: int, files: contextlib.ExitStack) -> FilePart:
    file = OpenFile(path, what, missing_hint=_missing_hint)
    files.callback(file.close)
    if file.size > room:
        raise _too_big(file.what, file.size, room)
    return FilePart(file, 0, file.size)


def _missing_hint(what: str, path: str) -> str | None:
    from pyvmm.payloads import names

    if what == "kernel" and path in names():
        return f"did you mean the built-in {PAYLOAD}{path}?"
    return None


def _too_big(what: str, size: int, room: int) -> UsageError:
    return UsageError(
        f"{what} has {size} bytes, but the guest has only {room} bytes of memory",
        hint=f"give it more, for example -m {2 * ((size + 4 * FDT_ROOM) // MIB + 1)}M",
    )


def _packed(data: Known, source: str, method: str) -> Content:
    from pyvmm.machine.packed import Packed

    return Packed(data, f"kernel {source}", method)


def _unpack(content: Content, source: str, room: int) -> Bytes:
    """Unpack a kernel that must be parsed as a whole, or whose unpacked size is unknown."""
    from pyvmm.machine.packed import Packed

    assert isinstance(content, Packed)
    # The unpacked size is unknown, but at least this large.
    return content.unpack(room, lambda: _too_big(f"kernel {source}, unpacked,", room + 1, room))


def _zboot_payload(data: Known, source: str) -> Content:
    header = data[: _ZBOOT.size]
    if len(header) < _ZBOOT.size:
        raise damaged(f"kernel {source} is truncated: it ends within its EFI zboot header")
    _, _, offset, size, name = _ZBOOT.unpack(header)
    from pyvmm.machine.packed import method_of

    named = name.split(b"\0")[0].decode("ascii", "replace")
    if (method := method_of(named)) is None:
        raise UsageError(f"kernel {source} is an EFI zboot image compressed with {named!r}", hint=_UNPACK_HINT)
    if offset + size > data.size:
        raise damaged(
            f"kernel {source} is truncated: its EFI zboot payload ends at byte {offset + size}, the file at {data.size}"
        )
    return _packed(data.part(offset, size), source, method)


def _image(data: Content, source: str, room: int) -> BootImage:
    header = data[: _IMAGE.size]
    if len(header) < _IMAGE.size:
        raise damaged(f"kernel {source} is truncated: it ends within its Image header ({_IMAGE.size} bytes)")
    _, _, text_offset, image_size, flags, _, _ = _IMAGE.unpack(header)
    if flags & _IMAGE_BIG_ENDIAN:
        raise big_endian(source)
    if image_size == 0:
        text_offset = _IMAGE_OLD_OFFSET
        if data.size is None:
            data = _unpack(data, source, room)
    # image_size includes bss, which the file does not contain. A file may also be larger than its header says.
    gpa, size = layout.RAM_BASE + text_offset, max(image_size, data.size or 0)
    parts = (Segment(f"Image {source}", gpa, size, data),)
    return BootImage("Image", source, gpa, parts, page=IMAGE_PAGES[flags >> 1 & 3])


def _flat(data: Known, source: str, size: int = 0) -> BootImage:
    gpa = layout.RAM_BASE + layout.FLAT_OFFSET
    return BootImage("flat", source, gpa, (Segment(f"flat binary {source}", gpa, max(size, data.size), data),))


# ---- placing -----------------------------------------------------------------------------------------------------


def plan(image: BootImage, *, ram_size: int, loadable: int | None = None) -> tuple[Segment, ...]:
    """Return everything to load with its gpa: the image, the initrd, and last the room of the device tree.

    ``loadable`` is how many bytes from RAM's start the host may write (default ``ram_size``). Raises UsageError for
    parts that overlap or do not fit.
    """
    room = ram_size if loadable is None else loadable
    end = layout.RAM_BASE + room
    if image.source.startswith(PAYLOAD) and layout.RAM_BASE + ram_size > layout.PAYLOAD_LIMIT:
        most = (layout.PAYLOAD_LIMIT - layout.RAM_BASE) // MIB
        raise UsageError(
            f"{image.source} with {ram_size // MIB} MiB of memory: a payload cannot use addresses from "
            f"{hex_(layout.PAYLOAD_LIMIT)} on",
            hint=f"use at most -m {most}M",
        )
    fdt = (min(end, layout.RAM_BASE + INITRD_WINDOW) - FDT_ROOM) // FDT_ROOM * FDT_ROOM
    parts = [*image.segments, Segment("the device tree", fdt, FDT_ROOM)]
    if image.initrd is not None:
        gpa = align_down(fdt - image.initrd.size)
        parts.append(Segment("the initrd", gpa, image.initrd.size, image.initrd))
    parts.sort(key=lambda part: (part.gpa, part.end))
    for part in parts:
        if part.gpa < layout.RAM_BASE or part.end > end:
            raise UsageError(
                f"{_named(part)} does not fit into the loadable memory, [{hex_(layout.RAM_BASE)}, {hex_(end)})",
                hint=_room_hint(image, room, ram_size),
            )
    for low, high in pairwise(parts):
        if low.end > high.gpa:
            raise UsageError(f"{_named(low)} overlaps {_named(high)}", hint=_room_hint(image, room, ram_size))
    return tuple(parts)


class Board:
    """The machine's description for the guest, except for its memory.

    ``devices`` has each device with its gpa and interrupt line; a PL011 among them is the console. ``pool`` is the size
    of the guest's DMA pool in bytes, 0 for none. ``pmu``: its CPUs have performance counters.
    ``entropy`` returns random bytes, for a Linux Image.
    """

    def __init__(
        self,
        *,
        cpus: int,
        command_line: str = "",
        devices: Sequence[tuple[Describable, int, Line | None]] = (),
        gic: GicNode | None = None,
        pool: int = 0,
        pmu: bool = False,
        entropy: Callable[[int], bytes] | None = None,
    ) -> None:
        self.cpus, self.command_line, self.devices = cpus, command_line, devices
        self.gic, self.pool, self.pmu, self.entropy = gic, pool, pmu, entropy


def place(
    image: BootImage, memory: Loadable, board: Board | bytes, *, ram_size: int, loadable: int | None = None
) -> Entry:
    """Load ``image`` and the device tree of ``board`` into ``memory``. A tree in bytes is loaded unchanged.

    Raises UsageError as :func:`plan` does, and for a command line that makes the device tree too large.
    """
    parts = plan(image, ram_size=ram_size, loadable=loadable)
    by_name = {part.what: part for part in parts}
    fdt = Gpa(by_name["the device tree"].gpa)
    if isinstance(board, bytes):
        tree, data = None, board
    else:
        tree = _tree(board, image, by_name.get("the initrd"), ram_size)
        data = _flattened(tree)
    for part in parts:
        part.data.load(memory, part.gpa, part.size)
    memory.write(fdt, data)
    return Entry(Gpa(image.pc), fdt, data, parts, tree)


def _tree(board: Board, image: BootImage, initrd: Segment | None, ram_size: int) -> Tree:
    nodes = [
        describe(device, base) if line is None else describe(device, base, line.spi, line.kind)
        for device, base, line in board.devices
    ]
    tree = machine_tree(
        ram=[(layout.RAM_BASE, ram_size)],
        mpidrs=[layout.mpidr(index) for index in range(board.cpus)],
        devices=nodes,
        bootargs=board.command_line,
        stdout=next((node for node in nodes if "arm,pl011" in node.compatible), None),
        initrd=None if initrd is None else (initrd.gpa, initrd.size),
        gic=board.gic,
        pmu=board.pmu,
        entropy=board.entropy(SEEDS) if board.entropy is not None and image.kind == "Image" else b"",
    )
    if board.pool:
        from pyvmm.machine.swiotlb import add_pool

        add_pool(tree, board.pool)
    return tree


def _flattened(tree: Tree) -> bytes:
    data = tree.to_bytes()
    if len(data) > FDT_ROOM:
        raise UsageError(
            f"the device tree has {len(data)} bytes, more than the maximum of {FDT_ROOM}", hint="shorten the parameters"
        )
    return data


def _named(part: Segment) -> str:
    return f"{part.what} at [{hex_(part.gpa) if part.gpa >= 0 else part.gpa}, {hex_(max(part.end, 0))})"


def _room_hint(image: BootImage, room: int, ram_size: int) -> str:
    need = sum(part.size for part in image.segments) + (0 if image.initrd is None else image.initrd.size) + 2 * FDT_ROOM
    lowest = min(part.gpa for part in image.segments)
    if lowest < layout.RAM_BASE or lowest >= layout.RAM_LIMIT:
        return "link the kernel for this address map, or load its Image form"
    if room < ram_size:
        return f"with this backing only the first {room // MIB} MiB are loadable; use another backing"
    if need > INITRD_WINDOW:
        return f"a kernel, its initrd and its device tree must be within {INITRD_WINDOW >> 30} GiB"
    highest = max(part.end for part in image.segments) - layout.RAM_BASE
    # Twice the loaded size: the guest also needs memory to run.
    return f"give the guest more memory, for example -m {2 * (max(need, highest + FDT_ROOM * 2) // MIB + 1)}M"
