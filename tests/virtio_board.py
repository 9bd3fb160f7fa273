# SPDX-License-Identifier: Apache-2.0
"""A transport and a simple device, accessed as a vCPU does, and a driver that follows the specification."""

from __future__ import annotations

import errno
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

from pyvmm._native import ffi, lib
from pyvmm.devices.bus import Bus
from pyvmm.devices.virtio.device import Feature, VirtioDevice
from pyvmm.devices.virtio.mmio import VirtioMmio
from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue
from pyvmm.devices.virtio.registers import Register, Status
from pyvmm.devices.virtio.worker import Worker
from tests.fake_kvm import EXIT_MMIO
from tests.memory_helper import BASE
from tests.twin_virtqueue import Driver, Rings
from tests.virtqueue_rig import HALF, PAGE, Guest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MINE = 1 << 5
AT = 0x0A00_0000
CARRY_OUT = 1  # PENDING_MMIO of native/loop/loop.h: begin with the access in struct kvm_run
TABLES, DATA = BASE + 8 * PAGE, BASE + HALF
ACKNOWLEDGED = Status.ACKNOWLEDGE | Status.DRIVER
RUNNING = ACKNOWLEDGED | Status.FEATURES_OK | Status.DRIVER_OK


class Toy(VirtioDevice):
    """Echoes its input in upper case; ``hold`` makes it wait in the middle of a request."""

    device_id: ClassVar[int] = 42
    name: ClassVar[str] = "toy"
    queue_sizes = (8, 4)
    features = MINE

    def __init__(self) -> None:
        super().__init__()
        self.worker = Worker("toy", self.failed)
        self.hold = threading.Event()
        self.hold.set()
        self.busy = threading.Event()
        self.started: list[int] = []
        self.settings = bytearray(b"\x01\x02\x03\x04toy!")

    def config(self) -> bytes:
        return bytes(self.settings)

    def write_config(self, offset: int, data: bytes) -> None:
        self.settings[offset : offset + len(data)] = data

    def start(self, queues: Sequence[Queue], features: int) -> None:
        self.started.append(features)
        for queue in queues:
            if queue.ready:
                self.worker.watch(queue, lambda queue=queue: queue.serve(self.answer))  # type: ignore[misc]
        self.worker.start(queues)

    def answer(self, chain: Chain) -> int:
        self.busy.set()
        self.hold.wait()
        try:
            return chain.write(0, chain.read(0, 4096).upper())
        except ChainFault:
            return 0

    def stop(self) -> None:
        self.worker.stop(patience=5)

    def pause(self) -> None:
        self.worker.pause(patience=5)

    def resume(self) -> None:
        self.worker.resume()

    def close(self) -> None:
        self.worker.close()


class Board:
    """A transport accessed as a vCPU does: every access goes through the native loop and the machine's bus."""

    def __init__(
        self,
        guest: Guest,
        device: VirtioDevice,
        *,
        private: bool = False,
        hand_over: Callable[[Queue], bool] | None = None,
    ) -> None:
        self.guest, self.device = guest, device
        self.transport = VirtioMmio(device, guest.native, private=private, hand_over=hand_over)
        self._vm = ffi.new("struct pv_vm *")
        self._bus = Bus(self._vm)
        self._bus.add(self.transport, AT)
        self._bus.publish()
        self._own = threading.local()

    def _vcpu(self) -> tuple[Any, Any]:
        """Return the calling thread's vCPU, and its struct kvm_run."""
        if not hasattr(self._own, "vcpu"):
            run = ffi.new("uint8_t[]", 4096)
            self._own.vcpu = ffi.new("struct pv_vcpu *", {"fd": -1, "vm": self._vm, "run": run}), ffi.buffer(run)
        vcpu: tuple[Any, Any] = self._own.vcpu
        return vcpu

    def _access(self, offset: int, size: int, value: int, *, is_write: bool) -> int:
        """Make an access, and return the loaded value: 0 if no device claims it, which aborts in a guest."""
        vcpu, run = self._vcpu()
        run[8:12] = EXIT_MMIO.to_bytes(4, "little")
        run[32:53] = struct.pack("<Q8sIB", AT + offset, value.to_bytes(8, "little"), size, is_write)
        vcpu.pending = CARRY_OUT
        stop = lib.pv_run(vcpu)
        if stop == lib.PV_STOP_UNCLAIMED:
            return 0
        if stop == lib.PV_STOP_MMIO:
            self._bus.answer(vcpu)
        else:
            assert (stop, vcpu.error) == (lib.PV_STOP_FAILED, errno.EBADF)  # no guest continues from here
        return int.from_bytes(run[40 : 40 + size], "little")

    def load(self, offset: int, size: int = 4) -> int:
        return self._access(offset, size, 0, is_write=False)

    def store(self, offset: int, value: int, size: int = 4) -> None:
        self._access(offset, size, value & (1 << 8 * size) - 1, is_write=True)

    # -- a driver that follows the rules

    @property
    def status(self) -> Status:
        return Status(self.load(Register.STATUS))

    def offered(self) -> int:
        features = 0
        for number in range(4):
            self.store(Register.DEVICE_FEATURES_SEL, number)
            features |= self.load(Register.DEVICE_FEATURES) << 32 * number
        return features

    def negotiate(self, features: int) -> bool:
        """Reset the device and ask for features; return whether they were granted."""
        for status in (0, Status.ACKNOWLEDGE, ACKNOWLEDGED):
            self.store(Register.STATUS, status)
        for number in range(4):
            self.store(Register.DRIVER_FEATURES_SEL, number)
            self.store(Register.DRIVER_FEATURES, features >> 32 * number)
        self.store(Register.STATUS, ACKNOWLEDGED | Status.FEATURES_OK)
        return Status.FEATURES_OK in self.status

    def set_queue(self, number: int, size: int, descriptors: int, driver: int, device: int) -> bool:
        """Set a queue up; return whether the transport took it as ready."""
        self.store(Register.QUEUE_SEL, number)
        self.store(Register.QUEUE_SIZE, size)
        for register, gpa in (
            (Register.QUEUE_DESC_LOW, descriptors),
            (Register.QUEUE_DRIVER_LOW, driver),
            (Register.QUEUE_DEVICE_LOW, device),
        ):
            self.store(register, gpa)
            self.store(register + 4, gpa >> 32)
        self.store(Register.QUEUE_READY, 1)
        return bool(self.load(Register.QUEUE_READY))

    def drive(self, *, packed: bool = False, event_idx: bool = False, more: int = 0) -> list[Driver]:
        """Start the device completely; returns a driver for each queue."""
        features = Feature.VERSION_1 | Feature.INDIRECT_DESC | more
        features |= Feature.RING_PACKED * packed | Feature.EVENT_IDX * event_idx
        assert self.negotiate(features)
        drivers = []
        for number, size in enumerate(self.device.queue_sizes):
            at = BASE + number * 3 * PAGE
            size = min(size, 16)
            rings = Rings(size, at, at + PAGE, at + 2 * PAGE, packed, event_idx)
            for area in (rings.descriptors, rings.driver, rings.device):
                self.guest.write(area, bytes(PAGE))
            assert self.set_queue(number, size, rings.descriptors, rings.driver, rings.device)
            drivers.append(Driver(self.guest, rings, TABLES))
        self.store(Register.STATUS, RUNNING)
        return drivers

    def close(self) -> None:
        self._bus.close()


def eventually(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def ask(board: Board, driver: Driver, text: bytes, queue: int = 0) -> None:
    board.guest.write(DATA, text)
    assert driver.add([(DATA, len(text), False), (DATA + PAGE, 64, True)]) is not None
    board.store(Register.QUEUE_NOTIFY, queue)


def answer(board: Board, driver: Driver) -> bytes:
    done: list[tuple[int, int]] = []

    def used() -> bool:
        done.extend(driver.used())
        return bool(done)

    eventually(used)
    return board.guest.read(DATA + PAGE, done[0][1])
