# SPDX-License-Identifier: Apache-2.0
"""A plan: the machine and its calls to KVM, without KVM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyvmm.devices.kinds.net import Net
from pyvmm.devices.kinds.rng import Rng
from pyvmm.devices.virtio.worker import Stuck
from pyvmm.errors import UsageError
from pyvmm.kvm.fd import Kernel
from pyvmm.kvm.stand_in import Recording, StandIn
from pyvmm.kvm.system import System
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.plan import Plan, calls
from pyvmm.protection import Protection

HELLO = MachineConfig("payload:hello", cpus=2, memory=32 << 20)


@pytest.fixture(autouse=True)
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make opening KVM's device fail."""

    def refuse(_self: Kernel, path: str) -> int:
        raise AssertionError(f"{path} is opened")

    monkeypatch.setattr(Kernel, "open", refuse)


def asked(config: MachineConfig) -> list[str]:
    with Plan(config) as plan:
        return list(calls(plan.machine, plan.calls))


def test_a_protected_machine_is_built_in_the_order_that_pkvm_requires() -> None:
    lines = asked(HELLO._replace(protection=Protection.PKVM))
    assert lines[1] == "KVM_CREATE_VM(kvm, type=0x8000_0000)"
    first = {
        name: next(n for n, line in enumerate(lines) if line.startswith(name))
        for name in (
            "KVM_CREATE_VCPU(vm, index=1",
            "KVM_CREATE_DEVICE(vm, type=KVM_DEV_TYPE_ARM_VGIC_V3)",
            "KVM_SET_DEVICE_ATTR(ARM_VGIC_V3, group=CTRL, attr=0x0)",
            "KVM_SET_ONE_REG(vcpu0, id=pc, value=0x8008_0000)",
        )
    }
    assert list(first.values()) == sorted(first.values())
    assert "KVM_SET_USER_MEMORY_REGION(vm, slot=0, gpa=0x8000_0000, size=0x200_0000, hva=memfd+0x0, flags=0x0)" in lines
    assert not any("SMCCC" in line for line in lines)


def test_the_emulated_protection_forwards_calls_and_a_plain_machine_does_not() -> None:
    filters = [line for line in asked(HELLO._replace(protection=Protection.EMULATED)) if "SMCCC" in line]
    assert [line.partition("base=")[2] for line in filters] == ["0x8600_0000, count=1)", "0xc600_0002, count=3)"]
    assert not any("SMCCC" in line for line in asked(HELLO))


def test_a_private_backing_has_two_slots_and_the_second_is_a_guest_memfd() -> None:
    lines = [line for line in asked(HELLO._replace(backing="private")) if "MEM" in line]
    assert [line.partition("(")[0] for line in lines] == [
        "KVM_CHECK_EXTENSION",
        "KVM_SET_USER_MEMORY_REGION",
        "KVM_CREATE_GUEST_MEMFD",
        "KVM_SET_USER_MEMORY_REGION2",
    ]
    assert "hva=private guest_memfd+0x0" in lines[-1]


def test_the_same_plan_gives_the_same_text_and_leaves_nothing_behind() -> None:
    with Plan(HELLO) as plan:
        first = list(plan.lines())
    before = set(os.listdir("/proc/self/fd"))
    with Plan(HELLO) as plan:
        assert list(plan.lines()) == first
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_plan_with_devices_makes_no_interface_and_starts_no_program() -> None:
    devices = (Rng(), Net(tap="nosuch0", address="10.9.8.1/24"), Net(passt="/nonexistent/passt"))
    with Plan(HELLO._replace(devices=devices)) as plan:
        lines = list(plan.lines())
    assert "    0xa00_0000    0xa00_0200  virtio_mmio, SPI 32, rng0, queues of 64" in lines
    assert "  KVM_IRQFD(vm, fd=eventfd, gsi=34, flags=0x0)" in lines
    assert not Path("/sys/class/net/nosuch0").exists()


def test_a_plan_with_huge_pages_takes_no_huge_page() -> None:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    before = pool.read_text() if pool.exists() else ""
    with Plan(HELLO._replace(backing="hugetlb", memory=64 << 30)) as plan:
        lines = list(plan.lines())
        assert (pool.read_text() if pool.exists() else "") == before
    assert "   0x8000_0000  0x10_8000_0000  memfd of 2 MiB pages, from byte 0x0 of it" in lines
    assert any("hva=memfd of 2 MiB pages+0x0" in line for line in lines)


def test_a_plan_shows_the_pool_for_the_devices_of_a_protected_guest(tmp_path: Path) -> None:
    def pools(**more: Any) -> list[str]:
        with Plan(HELLO._replace(devices=(Rng(),), **more)) as plan:
            (tmp_path / "dtb").write_bytes(plan.machine.entry.device_tree)
            return [line.strip() for line in plan.lines() if "pool" in line]

    assert pools(protection=Protection.PKVM) == ["DMA pool, 4 MiB of it, at an address that the guest chooses"]
    assert pools(swiotlb=4 << 20) == ["DMA pool, 4 MiB of it, at an address that the guest chooses"]
    assert pools() == pools(protection=Protection.PKVM, swiotlb=0) == []
    assert pools(protection=Protection.PKVM, dtb=str(tmp_path / "dtb")) == []


def test_a_plan_refuses_the_same_requests_as_a_run() -> None:
    with pytest.raises(UsageError, match="EIO"), Plan(HELLO._replace(protection=Protection.PKVM, backing="hugetlb")):
        pass


def test_memory_outlives_a_device_whose_request_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Plan(HELLO._replace(devices=(Rng(),))).machine.__enter__()
    view = machine.memory.slots[0].backing.view
    [transport] = machine.virtio
    stop = transport.device.stop

    def stuck() -> None:
        stop()
        raise Stuck("rng0", 30)

    monkeypatch.setattr(transport.device, "stop", stuck)
    with pytest.raises(Stuck):
        machine.close()
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    assert any(int(start, 16) <= view < int(end, 16) for start, end in ranges)


def test_a_failed_call_is_recorded_as_failed() -> None:
    class Refusing(StandIn):
        def ioctl(self, fd: object, request: object, argument: object, values: object) -> tuple[int, int]:
            del fd, request, argument, values
            return -1, 22

    recording = Recording(Refusing())
    with pytest.raises(Exception, match="EINVAL"):
        System.open(kernel=recording)
    assert [(call.name, call.on, call.result) for call in recording.calls] == [("KVM_GET_API_VERSION", "kvm", -1)]


def test_dry_run_prints_the_plan_on_any_workstation(tmp_path: Path) -> None:
    tree = tmp_path / "a.dtb"
    words = ("run", "--dry-run", "--pkvm", "-m", "32M", "-c", "2", "--dump-dtb", str(tree), "payload:hello")
    done = subprocess.run([sys.executable, "-m", "pyvmm", *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for line in (
        "   0x8000_0000   0x8200_0000  RAM, 32 MiB",
        "   0x8000_0000   0x8200_0000  anonymous memory, from byte 0x0 of it",
        "    0x900_0000    0x900_1000  pl011, SPI 1",
        "  1: off, until PSCI CPU_ON",
        "  KVM_CREATE_VM(kvm, type=0x8000_0000)",
    ):
        assert line in done.stdout.splitlines(), done.stdout
    assert tree.read_bytes()[:4] == b"\xd0\x0d\xfe\xed"
