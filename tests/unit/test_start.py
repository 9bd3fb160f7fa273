# SPDX-License-Identifier: Apache-2.0
"""How a guest starts: the calls of a machine to its start, their order, and when things are closed. Needs no KVM."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pyvmm.devices.base import Device
from pyvmm.devices.virtio.worker import Stuck
from pyvmm.errors import HostError, UsageError
from pyvmm.kvm.stand_in import StandIn
from pyvmm.machine import layout
from pyvmm.machine.boot import Entry
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.start import KernelImage
from pyvmm.memory.address import MIB, Gpa
from pyvmm.payloads import payload
from pyvmm.uapi.kvm_arm64 import core_reg

if TYPE_CHECKING:
    from pyvmm.machine.start import Built

CONFIG = MachineConfig("payload:hello", memory=8 * MIB, serial_out=None)


class Kernel(StandIn):
    """A fake kernel that records when it is opened, and refuses on request."""

    def __init__(self, heard: list[str], *, there: bool = True) -> None:
        self.heard, self.there = heard, there

    def open(self, path: str) -> int:
        self.heard.append("kvm")
        if not self.there:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return super().open(path)


class Elsewhere:
    """A foreign start, which records the calls to it."""

    kind = "elsewhere"
    lazy = True

    def __init__(self, heard: list[str]) -> None:
        self.heard = heard
        self.mapped: bool | None = None

    def prepare(self, config: MachineConfig) -> None:
        self.heard.append(f"prepare {config.kernel}")

    def enter(self, machine: Built) -> Entry:
        self.machine = machine
        self.heard.append(f"enter {len(machine.vcpus)} vCPUs, {machine.loadable} bytes")
        assert machine.bus.placed
        return Entry(Gpa(layout.RAM_BASE), Gpa(0), b"", ())

    def close(self) -> None:
        self.heard.append("close")
        if hasattr(self, "machine") and self.mapped is None:
            self.mapped = bool(self.machine.memory.slots)


def open_files() -> set[str]:
    return {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}


def test_a_start_is_prepared_first_entered_last_and_closed_while_memory_is_mapped() -> None:
    heard: list[str] = []
    start = Elsewhere(heard)
    with Machine(CONFIG._replace(cpus=2), kernel=Kernel(heard), start=start) as machine:
        assert heard == ["prepare payload:hello", "kvm", f"enter 2 vCPUs, {8 * MIB} bytes"]
        assert machine.entry.pc == layout.RAM_BASE
        assert machine.lazy
        machine.close_vm()
        assert "close" not in heard
    assert heard[3] == "close"
    assert start.mapped


class Broken(Device):
    """A device whose close fails with a given error."""

    name = "broken"
    compatible = "test,broken"

    def __init__(self, why: Exception) -> None:
        super().__init__()
        self.why = why

    def close(self) -> None:
        raise self.why


@pytest.mark.parametrize("whys", [[Stuck("disk", 30)], [ValueError("how?")], [ValueError("how?"), Stuck("disk", 30)]])
@pytest.mark.parametrize("close", [Machine.close, Machine.close_vm])
def test_memory_stays_mapped_if_a_device_cannot_be_closed(
    whys: list[Exception], close: Callable[[Machine], None]
) -> None:
    heard: list[str] = []
    machine = Machine(
        CONFIG, kernel=Kernel(heard), start=Elsewhere(heard), devices=[Broken(why) for why in whys]
    ).__enter__()
    with pytest.raises(type(whys[0])):
        close(machine)
    machine.close()
    assert "close" not in heard
    assert machine.memory.read(Gpa(layout.RAM_BASE), 4) == bytes(4)


@pytest.mark.parametrize("built", [False, True])
def test_a_start_is_closed_with_a_machine_that_was_not_built(built: bool) -> None:
    heard: list[str] = []
    machine = Machine(CONFIG, kernel=Kernel(heard, there=False), start=Elsewhere(heard))
    if built:
        with pytest.raises(HostError, match="no KVM"):
            machine.__enter__()
    else:
        machine.close()
    assert heard[-1] == "close"


def test_a_kernels_files_are_open_until_they_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(payload("hello"))
    initrd.write_bytes(b"an initrd")
    files = {str(kernel), str(initrd)}
    enter = KernelImage.enter

    def entering(start: KernelImage, machine: Built) -> Entry:
        assert open_files() >= files
        entry = enter(start, machine)
        assert not open_files() & files
        return entry

    monkeypatch.setattr(KernelImage, "enter", entering)
    config = CONFIG._replace(kernel=str(kernel), initrd=str(initrd))
    with Machine(config, kernel=StandIn()) as machine:
        [part] = [part for part in machine.entry.plan if part.what == "the initrd"]
        assert machine.memory.read(Gpa(part.gpa), part.size) == b"an initrd"


def test_a_kernels_files_are_closed_if_they_are_never_loaded(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(payload("hello"))
    start = KernelImage()
    machine = Machine(CONFIG._replace(kernel=str(kernel)), kernel=Kernel([], there=False), start=start)
    start.prepare(machine.config)
    assert str(kernel) in open_files()
    machine.close()
    assert str(kernel) not in open_files()
    with pytest.raises(HostError, match="no KVM"), Machine(machine.config, kernel=Kernel([], there=False)):
        pass
    assert str(kernel) not in open_files()


def test_the_first_vcpu_starts_at_the_kernels_entry_with_the_device_tree() -> None:
    with Machine(CONFIG, kernel=StandIn()) as machine:
        entry = machine.entry
        assert not machine.lazy
        assert entry.pc == layout.RAM_BASE + layout.FLAT_OFFSET
        assert machine.memory.read(entry.fdt, 4) == b"\xd0\x0d\xfe\xed"
    set_registers: list[tuple[int, int]] = []

    class Vcpu:
        def set_reg(self, register: int, value: int) -> None:
            set_registers.append((register, value))

    with Machine(CONFIG, kernel=StandIn()) as machine:
        start = KernelImage()
        start.prepare(CONFIG)
        machine.vcpus = [Vcpu()]  # type: ignore[list-item]
        assert start.enter(machine)[:2] == entry[:2]
    assert set_registers == [(core_reg("pc"), entry.pc), (core_reg("x0"), entry.fdt)]


def test_a_missing_kernel_file_is_refused_before_kvm_is_opened() -> None:
    heard: list[str] = []
    with pytest.raises(UsageError, match="no such file"):
        Machine(CONFIG._replace(kernel="/nowhere"), kernel=Kernel(heard)).__enter__()
    assert heard == []
