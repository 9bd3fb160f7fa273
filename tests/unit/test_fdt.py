# SPDX-License-Identifier: Apache-2.0
"""Flattened device trees: dtc reads back what was written, whatever was written."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.devices import kinds
from pyvmm.devices.base import Device, Trigger
from pyvmm.devices.kind import DeviceSpec
from pyvmm.devices.kinds.balloon import Balloon
from pyvmm.devices.kinds.console import Console
from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.kinds.net import Net
from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.kinds.vsock import Vsock
from pyvmm.devices.pl011 import Pl011
from pyvmm.errors import UsageError
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.fdt import (
    DeviceNode,
    GicNode,
    Node,
    Tree,
    Value,
    cells32,
    cells64,
    describe,
    encode,
    machine_tree,
    parse,
)
from pyvmm.machine.plan import Plan
from pyvmm.protection import Protection
from tests.unit.linux_bindings import complaints

DTC = shutil.which("dtc")
needs_dtc = pytest.mark.skipif(DTC is None, reason="dtc (package device-tree-compiler) is not installed")


def dtc(data: bytes, output: str, *more: str) -> subprocess.CompletedProcess[bytes]:
    assert DTC is not None
    command = [DTC, "-I", "dtb", "-O", output, *more, "-"]
    return subprocess.run(command, input=data, capture_output=True, timeout=20, check=False)


def read(data: bytes) -> tuple[list[tuple[int, int]], dict[str, dict[str, bytes]]]:
    """Parse a flattened tree the slow, literal way: reservations and {path: {property: bytes}}."""
    magic, total, structure, strings, reserve, version, compatible, _cpu, n_strings, n_structure = struct.unpack_from(
        ">10I", data
    )
    assert (magic, total, version, compatible) == (0xD00DFEED, len(data), 17, 16)
    assert structure + n_structure <= total
    assert strings + n_strings <= total
    assert reserve % 8 == 0
    assert structure % 4 == 0
    reserved = []
    while (pair := struct.unpack_from(">QQ", data, reserve)) != (0, 0):
        reserved.append(pair)
        reserve += 16
    nodes: dict[str, dict[str, bytes]] = {}
    path: list[str] = []
    at = structure
    while True:
        (token,) = struct.unpack_from(">I", data, at)
        at += 4
        if token == 1:
            end = data.index(b"\0", at)
            path.append(data[at:end].decode())
            nodes["/".join(path) or "/"] = {}
            at = end + 4 - end % 4
        elif token == 2:
            path.pop()
        elif token == 3:
            length, name = struct.unpack_from(">II", data, at)
            name_end = data.index(b"\0", strings + name)
            nodes["/".join(path) or "/"][data[strings + name : name_end].decode()] = data[at + 8 : at + 8 + length]
            at += 8 + (length + 3) // 4 * 4
        elif token == 9:
            return reserved, nodes
        else:
            assert token == 4


def flat(node: Node, path: str = "") -> dict[str, dict[str, object]]:
    """The same of a tree that was parsed."""
    found: dict[str, dict[str, object]] = {path or "/": dict(node.properties)}
    for child in node.children:
        found |= flat(child, f"{path}/{child.name}")
    return found


names = st.from_regex(r"[a-zA-Z][0-9a-zA-Z,._+-]{0,20}", fullmatch=True)
# linux,phandle and phandle mean something to dtc; a random one would be a wrong tree.
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
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(children=st.lists(nodes, max_size=4, unique_by=lambda node: node.name), reserved=reservations)
def test_dtc_reads_back_every_tree(children: list[Node], reserved: list[tuple[int, int]]) -> None:
    data = Tree(Node("", {"a": 1}, children), reserved).to_bytes()
    again = dtc(data, "dtb", "-f", "-q", "-q")
    assert again.returncode == 0, again.stderr.decode()
    assert read(again.stdout) == read(data)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(children=st.lists(nodes, max_size=4, unique_by=lambda node: node.name))
def test_every_tree_is_parsed_to_what_was_written(children: list[Node]) -> None:
    data = Tree(Node("", {"a": 1}, children)).to_bytes()
    assert flat(parse(data, "a tree")) == read(data)[1]


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0), byte=st.integers(0, 255))
def test_a_byte_of_a_tree_may_be_any_other(at: int, byte: int) -> None:
    data = bytearray(example())
    data[at % len(data)] = byte
    with contextlib.suppress(UsageError):
        parse(bytes(data), "a tree")


def tree_of(structure: bytes, strings: bytes = b"a\0") -> bytes:
    at = 40 + 16
    sizes = (at + len(structure) + len(strings), at, at + len(structure), 40, 17, 16, 0, len(strings), len(structure))
    return struct.pack(">10I", 0xD00DFEED, *sizes) + bytes(16) + structure + strings


BEGIN, END_NODE, END = cells32(1, 0), cells32(2), cells32(9)


def test_what_means_nothing_in_a_tree_is_passed_over() -> None:
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
def test_a_value_that_no_cell_or_string_can_hold_is_refused(value: Value) -> None:
    with pytest.raises(UsageError):
        encode(value)


def test_cells_are_big_endian() -> None:
    assert cells32(1, 0xFFFFFFFF) == bytes.fromhex("00000001 ffffffff")
    assert cells64(0x8000_0000, 1 << 40) == bytes.fromhex("0000000080000000 0000010000000000")


def test_text_that_is_not_utf8_reaches_the_guest_as_typed() -> None:
    assert encode(b"caf\xe9".decode("utf-8", "surrogateescape")) == b"caf\xe9\0"


@pytest.mark.parametrize("name", ["", "1abc", "a b", "a/b", "a" * 32, "a@", "a@1@2", "é"])
def test_a_bad_node_name_is_refused(name: str) -> None:
    tree = Tree()
    tree.root.add(name)
    with pytest.raises(UsageError, match="no name for a device tree node"):
        tree.to_bytes()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a" * 32, "é"])
def test_a_bad_property_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a device tree property"):
        Tree(Node("", {name: 1})).to_bytes()


def test_two_children_with_one_name_are_refused() -> None:
    tree = Tree()
    tree.root.add("twin")
    tree.root.add("twin")
    with pytest.raises(UsageError, match="two nodes are called 'twin'"):
        tree.to_bytes()


def test_a_phandle_is_given_once() -> None:
    tree = Tree()
    first, second = tree.root.add("a"), tree.root.add("b")
    assert (tree.phandle(first), tree.phandle(second), tree.phandle(first)) == (1, 2, 1)


# ---- the machine's tree


class Uart(Device):
    """One with a PL011's node, and a property more."""

    name: ClassVar[str] = Pl011.name
    node: ClassVar[str | None] = Pl011.node
    compatible: ClassVar[str | tuple[str, ...]] = Pl011.compatible
    clocks: ClassVar[tuple[str, ...]] = Pl011.clocks

    def properties(self) -> dict[str, int]:
        return {"current-speed": 115200}


UART = describe(Uart(), layout.PL011.start)
ECHO = DeviceNode("echo", ("pyvmm,echo",), layout.ECHO.start, 0x1000)


def example(**changes: Any) -> bytes:
    parts: dict[str, Any] = {
        "ram": [(layout.RAM_BASE, 256 << 20)],
        "mpidrs": [0, 1],
        "devices": [UART, ECHO],
        "bootargs": "way=undefined",
        "stdout": UART,
        "initrd": (0x8800_0000, 0x1234),
    }
    return machine_tree(**(parts | changes)).to_bytes()


def test_the_machines_tree_says_what_a_guest_needs() -> None:
    reserved, nodes = read(example())
    assert reserved == []
    assert nodes["/"]["#address-cells"] == nodes["/"]["#size-cells"] == cells32(2)
    assert nodes["/memory@80000000"] == {"device_type": b"memory\0", "reg": cells64(0x8000_0000, 256 << 20)}
    assert nodes["/chosen"] == {
        "bootargs": b"way=undefined\0",
        "stdout-path": b"/serial@9000000\0",
        "linux,initrd-start": cells64(0x8800_0000),
        "linux,initrd-end": cells64(0x8800_1234),
    }
    assert nodes["/cpus/cpu@1"] == {
        "device_type": b"cpu\0",
        "compatible": b"arm,armv8\0",
        "enable-method": b"psci\0",
        "reg": cells32(1),
    }
    assert nodes["/psci"] == {"compatible": b"arm,psci-1.0\0arm,psci-0.2\0", "method": b"hvc\0"}
    assert nodes["/timer"] == {"compatible": b"arm,armv8-timer\0", "always-on": b""}
    assert nodes["/echo@9110000"] == {"compatible": b"pyvmm,echo\0", "reg": cells64(0x0911_0000, 0x1000)}


def test_the_uart_is_a_primecell_with_its_clocks() -> None:
    _, nodes = read(example())
    clock = nodes["/clock"]
    assert clock["compatible"] == b"fixed-clock\0"
    assert nodes["/serial@9000000"] == {
        "compatible": b"arm,pl011\0arm,primecell\0",
        "reg": cells64(0x0900_0000, 0x1000),
        "clocks": clock["phandle"] * 2,
        "clock-names": b"uartclk\0apb_pclk\0",
        "current-speed": cells32(115200),
    }


GIC = GicNode(distributor=(0x0800_0000, 0x1_0000), redistributors=(0x080A_0000, 0x4_0000), its=(0x0808_0000, 0x2_0000))


def test_with_an_interrupt_controller_devices_and_the_timer_have_interrupts() -> None:
    edge = describe(Uart(), layout.PL011.start, 1, Trigger.EDGE)
    _, nodes = read(example(gic=GIC, devices=[edge, ECHO], stdout=edge))
    gic = nodes["/interrupt-controller@8000000"]
    assert gic["reg"] == cells64(0x0800_0000, 0x1_0000, 0x080A_0000, 0x4_0000)
    assert (gic["interrupt-controller"], gic["#interrupt-cells"]) == (b"", cells32(3))
    assert nodes["/"]["interrupt-parent"] == gic["phandle"]
    its = nodes["/interrupt-controller@8000000/msi-controller@8080000"]
    assert (its["compatible"], its["msi-controller"], its["reg"]) == (
        b"arm,gic-v3-its\0",
        b"",
        cells64(0x0808_0000, 0x2_0000),
    )
    # Private interrupts 13, 14, 11 and 10, active low; the device's is shared interrupt 1, on an edge.
    assert nodes["/timer"]["interrupts"] == cells32(1, 13, 8, 1, 14, 8, 1, 11, 8, 1, 10, 8)
    assert nodes["/serial@9000000"]["interrupts"] == cells32(0, 1, 1)
    assert "interrupts" not in nodes["/echo@9110000"]


def test_without_an_interrupt_controller_nothing_has_interrupts() -> None:
    level = describe(Uart(), layout.PL011.start, 1)
    assert example(devices=[level, ECHO], stdout=level) == example()


def test_without_initrd_console_or_clocks_the_tree_is_smaller() -> None:
    _, nodes = read(example(devices=[ECHO], stdout=None, initrd=None, bootargs=""))
    assert nodes["/chosen"] == {"bootargs": b"\0"}
    assert "/clock" not in nodes


def test_the_same_machine_gives_the_same_bytes() -> None:
    assert example() == example()


@needs_dtc
@pytest.mark.parametrize("gic", [None, GIC])
def test_dtc_has_nothing_to_say_about_the_machines_tree(gic: GicNode | None) -> None:
    uart = describe(Uart(), layout.PL011.start, 1)
    source = dtc(example(gic=gic, devices=[uart, ECHO], stdout=uart), "dts")
    assert source.returncode == 0
    assert source.stderr == b""
    assert b'bootargs = "way=undefined"' in source.stdout


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[Protection, Path]:
    """The device trees of machines with every device that there is, as they are loaded for a Linux guest."""
    place = tmp_path_factory.mktemp("machines")
    for name, size in (("kernel", 4096), ("initrd", 5000), ("disk", 1 << 20)):
        (place / name).write_bytes(bytes(size))
    # code0, code1, text_offset, image_size, flags, reserved, magic, reserved
    (place / "kernel").write_bytes(struct.pack("<2I3Q24x4sI", 0, 0x1400_0000, 0, 4096, 0b1010, b"ARM\x64", 0))
    trees = {}
    for protection in Protection:
        devices: list[DeviceSpec] = [
            Disk(str(place / "disk")),
            Net(passt="passt"),
            Console(),
            Vsock(str(place / "vsock"), 3),
            Rng(),
        ]
        if not protection.isolates:  # others refuse a balloon
            devices.append(Balloon())
            there_are = {kind for kind in DeviceSpec.__subclasses__() if kind.__module__.startswith(kinds.__name__)}
            assert {type(device) for device in devices} == there_are
        config = MachineConfig(
            str(place / "kernel"),
            protection,
            memory=256 << 20,
            cpus=3,
            params=("quiet",),
            initrd=str(place / "initrd"),
            devices=tuple(devices),
        )
        with Plan(config) as plan:
            trees[protection] = place / f"{protection.value}.dtb"
            trees[protection].write_bytes(plan.machine.entry.device_tree)
    return trees


@needs_dtc
def test_dtc_has_nothing_to_say_about_machines_with_all_devices(machines: dict[Protection, Path]) -> None:
    for protection, path in machines.items():
        source = dtc(path.read_bytes(), "dts")
        assert (source.returncode, source.stderr) == (0, b""), protection
        assert (b"restricted-dma-pool" in source.stdout) == protection.isolates


def test_machines_with_all_devices_are_as_linux_bindings_ask(machines: dict[Protection, Path]) -> None:
    _, nodes = read(machines[Protection.PKVM].read_bytes())
    assert {"kaslr-seed", "rng-seed", "linux,initrd-start"} <= nodes["/chosen"].keys()
    said = complaints(*machines.values())
    private = [protection for protection in Protection if protection.isolates]
    # The one exception: virtio/mmio.yaml knows no memory-region, by which Linux nonetheless learns of a device's
    # restricted DMA pool, whatever the device (of_dma_set_restricted_buffer in drivers/of/device.c).
    allowed = {
        (f"{protection.value}.dtb", path[1:]) for protection in private for path in nodes if "virtio_mmio@" in path
    }
    told = [re.search(r"(\w+\.dtb): (virtio_mmio@\w+) \(virtio,mmio\): memory-region: ", line) for line in said]
    assert None not in told, said
    assert {each.groups() for each in told if each} == allowed
    assert len(allowed) == 5 * len(private)


def test_what_linux_bindings_ask_and_a_tree_lacks_is_told(tmp_path: Path) -> None:
    virtio = DeviceNode("virtio", ("virtio,mmio",), layout.VIRTIO_MMIO.start, 0x200)
    (tmp_path / "lacking.dtb").write_bytes(example(gic=GIC, devices=[ECHO, virtio], stdout=None))
    [told] = complaints(tmp_path / "lacking.dtb")
    assert "virtio@a000000 (virtio,mmio): " in told
    assert "'interrupts' is a required property" in told


def test_a_device_may_not_override_its_place() -> None:
    device = DeviceNode("x", ("pyvmm,x",), 0x1000, 0x1000, {"reg": 1})
    with pytest.raises(UsageError, match="may not set 'reg'"):
        example(devices=[device], stdout=None)
