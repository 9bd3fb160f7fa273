# SPDX-License-Identifier: Apache-2.0
"""Write and read flattened device trees. Owns nothing.

The format is that of the Devicetree Specification, release v0.4, chapter 5; the same tree always gives the same bytes.
:mod:`pyvmm.machine.describing` decides what a machine's tree contains.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

#: Types of a property: a 32-bit cell, a string, a list of cells or of strings, True for an empty property, or raw bytes
#: (:func:`cells64` makes 64-bit cells).
Value = bytes | bool | int | str | Sequence[int] | Sequence[str]

# v0.4, 5.2: header; 5.4.1: structure block tokens.
_MAGIC: Final = 0xD00D_FEED
_VERSION: Final = 17
_LAST_COMPATIBLE: Final = 16
_HEADER: Final = struct.Struct(">10I")
_RESERVATION: Final = struct.Struct(">QQ")
_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
_CELL: Final = struct.Struct(">I")
_PROPERTY: Final = struct.Struct(">2I")

#: Linux drivers/of/fdt.c, FDT_MAX_DEPTH: Linux ignores deeper nodes.
_DEEPEST: Final = 64
#: Maximum bytes read of a property's name. Some exceed the specified 31, and names may share their ends.
_LONGEST_NAME: Final = 256

# v0.4, 2.2.1 and 2.2.4.1: names.
_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_NODE_NAME: Final = _LETTERS | frozenset("0123456789,._+-")
_PROPERTY_NAME: Final = _NODE_NAME | frozenset("?#")
_LONGEST: Final = 31


def cells32(*values: int) -> bytes:
    """Encode values of 0 to 2^32 - 1, each one cell."""
    return _integers(values, "I", 32)


def cells64(*values: int) -> bytes:
    """Encode values of 0 to 2^64 - 1, each two cells, the high one first."""
    return _integers(values, "Q", 64)


def encode(value: Value) -> bytes:
    """Return a property's bytes. Raises UsageError for False, a number that is too big, or a NUL in a string."""
    if isinstance(value, bytes):
        return value
    if value is True:
        return b""
    if value is False:
        raise UsageError("a device tree property cannot be False", hint="leave the property out")
    if isinstance(value, int):
        return cells32(value)
    if isinstance(value, str):
        return _string(value)
    return b"".join(_string(part) if isinstance(part, str) else cells32(part) for part in value)


class Node:
    """One node: ``name`` with its unit address, properties in the order they were set, then children."""

    def __init__(
        self, name: str, properties: dict[str, Value] | None = None, children: list[Node] | None = None
    ) -> None:
        self.name = name
        self.properties = {} if properties is None else properties
        self.children = [] if children is None else children

    def add(self, name: str, properties: Mapping[str, Value] | None = None) -> Node:
        """Append a child and return it."""
        child = Node(name, dict(properties or {}))
        self.children.append(child)
        return child


class Tree:
    """A device tree: ``root`` (whose name is empty), reserved (gpa, bytes) pairs, and the CPU that boots."""

    def __init__(
        self, root: Node | None = None, reservations: list[tuple[int, int]] | None = None, boot_cpu: int = 0
    ) -> None:
        self.root = Node("") if root is None else root
        self.reservations = [] if reservations is None else reservations
        self.boot_cpu = boot_cpu
        self._phandles = 0

    def phandle(self, node: Node) -> int:
        """Return the phandle of ``node``, for properties that refer to the node. Sets it once."""
        handle = node.properties.get("phandle")
        if not isinstance(handle, int):
            self._phandles = handle = self._phandles + 1
            node.properties["phandle"] = handle
        return handle

    def to_bytes(self) -> bytes:
        """Flatten: header, memory reservations, structure, strings, in the order of v0.4, 5.1."""
        strings = _Strings()
        structure = bytearray()
        _flatten(self.root, structure, strings, "/")
        structure += _CELL.pack(_END)
        reserved = b"".join(_RESERVATION.pack(*pair) for pair in [*self.reservations, (0, 0)])
        # 5.6: reservations are aligned to 8 bytes, the structure to 4. The parts before them keep that alignment.
        structure_at = _HEADER.size + len(reserved)
        strings_at = structure_at + len(structure)
        total = strings_at + len(strings.block)
        header = _HEADER.pack(
            _MAGIC,
            total,
            structure_at,
            strings_at,
            _HEADER.size,
            _VERSION,
            _LAST_COMPATIBLE,
            self.boot_cpu,
            len(strings.block),
            len(structure),
        )
        return header + reserved + bytes(structure) + bytes(strings.block)


def check_header(data: bytes, what: str) -> int:
    """Return the size of the flattened tree that ``data`` starts with. Raises UsageError, naming ``what``."""
    if len(data) < _HEADER.size or int.from_bytes(data[:4], "big") != _MAGIC:
        raise UsageError(
            f"{what} is not a flattened device tree: it does not start with {_MAGIC:#x}",
            hint="compile a source with dtc -I dts -O dtb, or write the machine's own with pyvmm run --dump-dtb",
        )
    _, total, structure, strings, reserved, version, compatible, _, n_strings, n_structure = _HEADER.unpack_from(data)
    if compatible > _VERSION or version < _LAST_COMPATIBLE:
        raise UsageError(f"{what} has version {version}, compatible with {compatible}; kernels read {_VERSION}")
    if total > len(data):
        raise UsageError(f"{what} is truncated: its header says {total} bytes, but it has {len(data)}")
    ends = (structure + n_structure, strings + n_strings, reserved + _RESERVATION.size)
    if max(ends) > total or min(structure, strings, reserved) < _HEADER.size:
        raise UsageError(f"{what} is damaged: its parts end at byte {max(ends)}, after its end at {total}")
    return int(total)


def parse(data: bytes, what: str) -> Node:
    """Return the root of an untrusted flattened tree, with properties as bytes.

    Raises UsageError, naming ``what``, for one that is damaged.
    """
    check_header(data, what)
    _, _, structure, strings, _, _, _, _, n_strings, n_structure = _HEADER.unpack_from(data)
    try:
        return _parse(data[structure : structure + n_structure], data[strings : strings + n_strings])
    except (ValueError, struct.error):  # no NUL at a name's end; an incomplete token
        raise UsageError(f"{what} is damaged: its nodes cannot be read") from None


def _parse(block: bytes, names: bytes) -> Node:
    path = [Node("")]
    at = 0
    while True:
        (token,) = _CELL.unpack_from(block, at)
        at += _CELL.size
        if token == _BEGIN_NODE and len(path) <= _DEEPEST:
            end = block.index(b"\0", at)
            path.append(path[-1].add(block[at:end].decode("latin-1")))
            at = end + 4 - end % 4
        elif token == _PROP and len(path) > 1:
            size, name = _PROPERTY.unpack_from(block, at)
            at += _PROPERTY.size
            if at + size > len(block):
                raise ValueError("a property ends outside of the block")
            end = names.index(b"\0", name, name + _LONGEST_NAME)
            path[-1].properties[names[name:end].decode("latin-1")] = block[at : at + size]
            at += size + -size % 4
        elif token == _END_NODE and len(path) > 1:
            path.pop()
        elif token == _END and len(path) == 1:
            (root,) = path[0].children  # ValueError for none, or two
            return root
        elif token != _NOP:
            raise ValueError("no valid token here")


class _Strings:
    """The strings block (v0.4, 5.5): each property name once."""

    def __init__(self) -> None:
        self.block = bytearray()
        self._offsets: dict[str, int] = {}

    def offset(self, name: str, path: str) -> int:
        known = self._offsets.get(name)
        if known is not None:
            return known
        if not (0 < len(name) <= _LONGEST and _PROPERTY_NAME.issuperset(name)):
            raise UsageError(f"{path}: {name!r} is not a valid name of a device tree property")
        self._offsets[name] = offset = len(self.block)
        self.block += _string(name)
        return offset


def _flatten(node: Node, out: bytearray, strings: _Strings, path: str) -> None:
    out += _CELL.pack(_BEGIN_NODE) + _padded(_string(node.name))
    for name, value in node.properties.items():
        data = encode(value)
        out += _CELL.pack(_PROP) + _PROPERTY.pack(len(data), strings.offset(name, path)) + _padded(data)
    seen: set[str] = set()
    for child in node.children:
        if not _is_node_name(child.name):
            raise UsageError(f"{path}: {child.name!r} is not a valid name of a device tree node")
        if child.name in seen:
            raise UsageError(f"{path}: two nodes are called {child.name!r}")
        seen.add(child.name)
        _flatten(child, out, strings, f"{path}{child.name}/")
    out += _CELL.pack(_END_NODE)


def _is_node_name(name: str) -> bool:
    # No regular expression: compiling one costs more than checking all names of a tree.
    base, at, unit = name.partition("@")
    return (
        0 < len(base) <= _LONGEST
        and base[0] in _LETTERS
        and _NODE_NAME.issuperset(base)
        and (not at or (unit != "" and _NODE_NAME.issuperset(unit)))
    )


def _integers(values: Sequence[int], code: str, bits: int) -> bytes:
    try:
        return struct.pack(f">{len(values)}{code}", *values)
    except struct.error:
        for value in values:
            if not 0 <= value < 1 << bits:
                raise UsageError(f"{value:#x} does not fit a device tree cell of {bits} bits") from None
        raise


def _string(text: str) -> bytes:
    # surrogateescape: text from a command line may hold bytes that are not UTF-8; the guest gets them as typed.
    data = text.encode("utf-8", "surrogateescape")
    if b"\0" in data:
        raise UsageError(f"{text!r} contains a NUL byte, which would end a string in a device tree")
    return data + b"\0"


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
