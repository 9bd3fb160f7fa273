# SPDX-License-Identifier: Apache-2.0
"""The device tree of a machine: it has what a guest needs, and neither dtc nor Linux's bindings report an error."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.devices import kinds
from pyvmm.devices.base import Device, Trigger
from pyvmm.devices.kind import DeviceSpec
from pyvmm.devices.kinds.balloon import Balloon
from pyvmm.devices.kinds.console import Console
from pyvmm.devices.kinds.disk import Disk
from pyvmm.devices.kinds.net import Net
from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.kinds.vmgenid import GenerationId
from pyvmm.devices.kinds.vsock import Vsock
from pyvmm.devices.pl011 import Pl011
from pyvmm.errors import UsageError
from pyvmm.machine import layout
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.describing import DeviceNode, GicNode, describe, machine_tree
from pyvmm.machine.fdt import cells32, cells64, parse
from pyvmm.machine.plan import Plan
from pyvmm.protection import Protection
from tests.unit.flat_tree import dtc, needs_dtc, read
from tests.unit.linux_bindings import complaints


class Uart(Device):
    """A UART with a PL011's node and one more property."""

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


@settings(max_examples=300)
@given(at=st.integers(0), byte=st.integers(0, 255))
def test_the_reader_fails_cleanly_on_a_tree_with_any_changed_byte(at: int, byte: int) -> None:
    data = bytearray(example())
    data[at % len(data)] = byte
    with contextlib.suppress(UsageError):
        parse(bytes(data), "a tree")


def test_the_machines_tree_has_what_a_guest_needs() -> None:
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


def test_devices_and_the_timer_have_interrupts_if_there_is_a_controller() -> None:
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


GICV2 = GicNode(distributor=(0x0800_0000, 0x1000), cpu_interfaces=(0x0801_0000, 0x2000))


def test_a_gicv2_has_cpu_interfaces_and_its_timer_names_the_cpus() -> None:
    uart = describe(Uart(), layout.PL011.start, 1)
    _, nodes = read(example(gic=GICV2, devices=[uart], stdout=uart, mpidrs=(0, 1, 2)))
    gic = nodes["/interrupt-controller@8000000"]
    assert gic["compatible"] == b"arm,gic-400\0"
    assert gic["reg"] == cells64(0x0800_0000, 0x1000, 0x0801_0000, 0x2000)
    assert nodes["/timer"]["interrupts"] == cells32(*(cell for ppi in (13, 14, 11, 10) for cell in (1, ppi, 0x708)))
    assert nodes["/serial@9000000"]["interrupts"] == cells32(0, 1, 4)


def test_no_node_has_interrupts_without_a_controller() -> None:
    level = describe(Uart(), layout.PL011.start, 1)
    assert example(devices=[level, ECHO], stdout=level) == example()


def test_the_tree_is_smaller_without_initrd_console_or_clocks() -> None:
    _, nodes = read(example(devices=[ECHO], stdout=None, initrd=None, bootargs=""))
    assert nodes["/chosen"] == {"bootargs": b"\0"}
    assert "/clock" not in nodes


def test_the_same_machine_gives_the_same_bytes() -> None:
    assert example() == example()


@needs_dtc
@pytest.mark.parametrize("gic", [None, GIC, GICV2])
def test_dtc_accepts_the_machines_tree_without_a_warning(gic: GicNode | None) -> None:
    uart = describe(Uart(), layout.PL011.start, 1)
    source = dtc(example(gic=gic, devices=[uart, ECHO], stdout=uart), "dts")
    assert source.returncode == 0
    assert source.stderr == b""
    assert b'bootargs = "way=undefined"' in source.stdout


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> dict[Protection, Path]:
    """Return the device trees of machines with every device, as loaded for a Linux guest."""
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
        if not protection.isolates:  # other guests refuse these
            devices += [Balloon(), GenerationId()]
            there_are = {kind for kind in DeviceSpec.__subclasses__() if kind.__module__.startswith(kinds.__name__)}
            assert {type(device) for device in devices} == there_are
        config = MachineConfig(
            str(place / "kernel"),
            protection,
            memory=256 << 20,
            cpus=3,
            pmu=not protection.isolates,
            params=("quiet",),
            initrd=str(place / "initrd"),
            devices=tuple(devices),
        )
        with Plan(config) as plan:
            trees[protection] = place / f"{protection.value}.dtb"
            trees[protection].write_bytes(plan.machine.entry.device_tree)
    return trees


@needs_dtc
def test_dtc_accepts_machines_with_all_devices_without_a_warning(machines: dict[Protection, Path]) -> None:
    for protection, path in machines.items():
        source = dtc(path.read_bytes(), "dts")
        assert (source.returncode, source.stderr) == (0, b""), protection
        assert (b"restricted-dma-pool" in source.stdout) == protection.isolates


def test_machines_with_all_devices_conform_to_linux_bindings(machines: dict[Protection, Path]) -> None:
    _, nodes = read(machines[Protection.PKVM].read_bytes())
    assert {"kaslr-seed", "rng-seed", "linux,initrd-start"} <= nodes["/chosen"].keys()
    # pyvmm's own property has no binding.
    own = "(pyvmm,share-doorbell): pyvmm,page-size: "
    said = [line for line in complaints(*machines.values()) if own not in line]
    private = [protection for protection in Protection if protection.isolates]
    # Linux's one exception: virtio/mmio.yaml has no memory-region. Linux nevertheless uses it for the device's
    # restricted DMA pool, whatever the device (of_dma_set_restricted_buffer in drivers/of/device.c).
    allowed = {
        (f"{protection.value}.dtb", path[1:]) for protection in private for path in nodes if "virtio_mmio@" in path
    }
    told = [re.search(r"(\w+\.dtb): (virtio_mmio@\w+) \(virtio,mmio\): memory-region: ", line) for line in said]
    assert None not in told, said
    assert {each.groups() for each in told if each} == allowed
    assert len(allowed) == 5 * len(private)


def test_a_property_that_linux_bindings_require_and_a_tree_lacks_is_reported(tmp_path: Path) -> None:
    virtio = DeviceNode("virtio", ("virtio,mmio",), layout.VIRTIO_MMIO.start, 0x200)
    (tmp_path / "lacking.dtb").write_bytes(example(gic=GIC, devices=[ECHO, virtio], stdout=None))
    [told] = complaints(tmp_path / "lacking.dtb")
    assert "virtio@a000000 (virtio,mmio): " in told
    assert "'interrupts' is a required property" in told


def test_a_device_may_not_override_its_address() -> None:
    device = DeviceNode("x", ("pyvmm,x",), 0x1000, 0x1000, {"reg": 1})
    with pytest.raises(UsageError, match="may not set 'reg'"):
        example(devices=[device], stdout=None)
