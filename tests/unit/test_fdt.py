# SPDX-License-Identifier: Apache-2.0
"""Flattened device trees: dtc reads back any tree that was written."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import UsageError
from pyvmm.machine.fdt import Node, Tree, Value, cells32, cells64, encode, parse
from tests.unit.flat_tree import dtc, needs_dtc, read


def flat(node: Node, path: str = "") -> dict[str, dict[str, object]]:
    """Return the same form of a parsed tree."""
    found: dict[str, dict[str, object]] = {path or "/": dict(node.properties)}
    for child in node.children:
        found |= flat(child, f"{path}/{child.name}")
    return found


names = st.from_regex(r"[a-zA-Z][0-9a-zA-Z,._+-]{0,20}", fullmatch=True)
# dtc interprets linux,phandle and phandle: a random one would make an invalid tree.
properties = st.from_regex(r"[0-9a-zA-Z,._+?#-]{1,31}", fullmatch=True).filter(lambda name: "phandle" not in name)
texts = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=40)
u32 = st.integers(0, 2**32 - 1)
values = st.one_of(
    st.just(True),
    u32,
    texts,
    st.binary(max_size=50),
    st.lists(u32, max_size=6),
    st.lists(texts, min_size=1, max_size=4),
)
nodes = st.recursive(
    st.builds(Node, names, st.dictionaries(properties, values, max_size=5)),
    lambda inner: st.builds(
        Node, names, st.dictionaries(properties, values, max_size=3),
        st.lists(inner, max_size=4, unique_by=lambda node: node.name),
    ),
    max_leaves=12,
)  # fmt: skip
reservations = st.lists(st.tuples(st.integers(0, 2**63), st.integers(1, 2**62)), max_size=3)


@needs_dtc
@settings(max_examples=25)
@given(children=st.lists(nodes, max_size=4, unique_by=lambda node: node.name), reserved=reservations)
def test_dtc_reads_back_every_tree(children: list[Node], reserved: list[tuple[int, int]]) -> None:
    data = Tree(Node("", {"a": 1}, children), reserved).to_bytes()
    again = dtc(data, "dtb", "-f", "-q", "-q")
    assert again.returncode == 0, again.stderr.decode()
    assert read(again.stdout) == read(data)


@settings(max_examples=25)
@given(children=st.lists(nodes, max_size=4, unique_by=lambda node: node.name))
def test_every_tree_is_parsed_back_as_written(children: list[Node]) -> None:
    data = Tree(Node("", {"a": 1}, children)).to_bytes()
    assert flat(parse(data, "a tree")) == read(data)[1]


def tree_of(structure: bytes, strings: bytes = b"a\0") -> bytes:
    at = 40 + 16
    sizes = (at + len(structure) + len(strings), at, at + len(structure), 40, 17, 16, 0, len(strings), len(structure))
    return struct.pack(">10I", 0xD00DFEED, *sizes) + bytes(16) + structure + strings


BEGIN, END_NODE, END = cells32(1, 0), cells32(2), cells32(9)


def test_nops_in_a_tree_are_skipped() -> None:
    nop = cells32(4)
    root = parse(tree_of(nop + BEGIN + nop + cells32(3, 1, 0) + b"x\0\0\0" + nop + END_NODE + nop + END), "a tree")
    assert (root.name, root.properties, root.children) == ("", {"a": b"x"}, [])
    assert parse(tree_of(BEGIN * 64 + END_NODE * 64 + END), "a tree").children


@pytest.mark.parametrize(
    ("structure", "strings"),
    [
        (b"", b""),
        (END, b""),
        (BEGIN + END, b""),
        (BEGIN + END_NODE, b""),
        (BEGIN + END_NODE + END_NODE + END, b""),
        ((BEGIN + END_NODE) * 2 + END, b""),
        (cells32(3, 0, 0) + BEGIN + END_NODE + END, b"a\0"),
        (BEGIN + cells32(3, 13, 0) + END_NODE + END, b"a\0"),
        (BEGIN + cells32(3, 0, 2) + END_NODE + END, b"a\0"),
        (BEGIN + cells32(3, 0, 0) + END_NODE + END, b"a" * 5000 + b"\0"),
        (BEGIN + cells32(5) + END_NODE + END, b""),
        (cells32(1) + b"name", b""),
        (BEGIN * 65 + END_NODE * 65 + END, b""),
        (BEGIN * 200_000, b""),
    ],
    ids=[
        "nothing",
        "no root",
        "root open",
        "no end",
        "closed twice",
        "two roots",
        "outside",
        "long",
        "nameless",
        "long name",
        "token",
        "name open",
        "deep",
        "deeper",
    ],
)
def test_a_tree_whose_nodes_are_damaged_is_refused(structure: bytes, strings: bytes) -> None:
    with pytest.raises(UsageError, match=r"^a tree is damaged: its nodes cannot be read"):
        parse(tree_of(structure, strings), "a tree")


@given(value=values)
def test_a_value_is_as_long_as_its_parts(value: Value) -> None:
    data = encode(value)
    if value is True:
        assert data == b""
    elif isinstance(value, bytes):
        assert data == value
    elif isinstance(value, int):
        assert int.from_bytes(data, "big") == value
        assert len(data) == 4
    elif isinstance(value, str):
        assert data == value.encode() + b"\0"
    else:
        assert data == b"".join(encode(part) for part in value)


@pytest.mark.parametrize("value", [False, -1, 2**32, "a\0b", ["ok", "a\0b"], [1, 2**32]])
def test_a_value_that_fits_no_cell_or_string_is_refused(value: Value) -> None:
    with pytest.raises(UsageError):
        encode(value)


def test_cells_are_big_endian() -> None:
    assert cells32(1, 0xFFFFFFFF) == bytes.fromhex("00000001 ffffffff")
    assert cells64(0x8000_0000, 1 << 40) == bytes.fromhex("0000000080000000 0000010000000000")


def test_text_that_is_not_utf8_reaches_the_guest_unchanged() -> None:
    assert encode(b"caf\xe9".decode("utf-8", "surrogateescape")) == b"caf\xe9\0"


@pytest.mark.parametrize("name", ["", "1abc", "a b", "a/b", "a" * 32, "a@", "a@1@2", "é"])
def test_a_bad_node_name_is_refused(name: str) -> None:
    tree = Tree()
    tree.root.add(name)
    with pytest.raises(UsageError, match="not a valid name of a device tree node"):
        tree.to_bytes()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a" * 32, "é"])
def test_a_bad_property_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not a valid name of a device tree property"):
        Tree(Node("", {name: 1})).to_bytes()


def test_two_children_with_one_name_are_refused() -> None:
    tree = Tree()
    tree.root.add("twin")
    tree.root.add("twin")
    with pytest.raises(UsageError, match="two nodes are called 'twin'"):
        tree.to_bytes()


def test_each_phandle_is_allocated_once() -> None:
    tree = Tree()
    first, second = tree.root.add("a"), tree.root.add("b")
    assert (tree.phandle(first), tree.phandle(second), tree.phandle(first)) == (1, 2, 1)
