# SPDX-License-Identifier: Apache-2.0
"""virtio over MMIO, version 2 (virtio 1.2, 4.2): a driver finds, sets up and resets a device through it.

Owns the device's queues, its interrupt and its register values (:mod:`pyvmm.devices.virtio.registerstate`). The native
loop answers reads, and handles selectors, acknowledgements, and kicks that the kernel does not take
(:mod:`pyvmm.machine.kicks`). Other writes come here, from any vCPU, under one lock. The device's own threads take only
a second lock, so that a reset may wait for them.

=====================================  ==========================================================================
what a hostile guest may do            what happens
=====================================  ==========================================================================
access a register with another width   reads 0, writes nothing (4.2.2.2); configuration space takes any width
take steps out of order                ignored: features after FEATURES_OK, queues before it or after DRIVER_OK
ask for features that are not offered  FEATURES_OK is not set
make a queue of 0, 3 or 65535 entries  QueueReady stays 0
put a ring where there is no memory    the queue breaks when it is used: DEVICE_NEEDS_RESET
kick before DRIVER_OK                  the queue is not served before that
kick with another width or number      comes to the native loop, also where the kernel takes kicks
reset in the middle of requests        waits until the current request has ended
=====================================  ==========================================================================
"""

from __future__ import annotations

import contextlib
import threading

from pyvmm._native import ffi, lib
from pyvmm.devices.base import Device
from pyvmm.devices.virtio.device import Complaints, Feature, VirtioDevice
from pyvmm.devices.virtio.queue import Queue
from pyvmm.devices.virtio.registers import (
    AREAS,
    BEFORE,
    CONFIG,
    LOW,
    SIZE,
    Register,
    Setup,
    Status,
    objection,
)
from pyvmm.devices.virtio.registerstate import RegisterState
from pyvmm.errors import PyvmmError, UsageError, hex_
from pyvmm.typed import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm._native import pv_vm


class PulsedLine(Protocol):
    """An edge-triggered interrupt line; see pyvmm.machine.irq."""

    @property
    def fd(self) -> int:
        """The eventfd that gives a pulse."""
        ...


class VirtioMmio(Device):
    """A transport. It closes ``device``. ``native_vm`` is a ``struct pv_vm *``, ``line`` its interrupt.

    ``private`` says whether guest memory can be private. Then ACCESS_PLATFORM is offered and required, because a driver
    without it puts its rings into private memory. ``pooled`` says whether the guest has a DMA pool. Drivers without
    ACCESS_PLATFORM would not use it, and drivers of packed rings fail when it is full. Linux's drivers wait and retry
    after -ENOMEM, which virtqueue_add_split() returns then. virtqueue_add_packed() returns -EIO, which virtio_blk.c
    reports as a disk error, and after which virtio_net.c does not refill receive buffers. ``hand_over`` asks the kernel
    to take a queue's kicks, and returns whether it does. Without it the native loop takes them.
    """

    name = "virtio_mmio"
    compatible = "virtio,mmio"
    kind = lib.PV_KIND_VIRTIO

    def __init__(
        self,
        device: VirtioDevice,
        native_vm: pv_vm,
        line: PulsedLine | None = None,
        *,
        private: bool,
        pooled: bool = False,
        hand_over: Callable[[Queue], bool] | None = None,
    ) -> None:
        super().__init__(size=SIZE)
        self.device = device
        self.private = private
        self.offered = int(device.features) | Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX
        if private or pooled:
            self.offered |= Feature.ACCESS_PLATFORM
        if not pooled:
            self.offered |= Feature.RING_PACKED
        self.interrupt = ffi.new("struct pv_interrupt *", {"fd": -1 if line is None else line.fd})
        self.queues: list[Queue] = []
        self._hand_over = hand_over
        self._lock = threading.Lock()
        # Guards the status and the generation, which the device's own threads also change. Taken last, held briefly.
        self._guard = threading.Lock()
        self._news = Complaints(device.label)  # separate: they must not suppress the device's own complaints
        self._registers = RegisterState(device, self.offered, self.interrupt)
        self.native = self.state = self._registers.native
        with contextlib.ExitStack() as half_built:
            for index, most in enumerate(device.queue_sizes):
                half_built.callback(self._add_queue(native_vm, index, most).close)
            half_built.pop_all()
        self._forget()
        device.transport = self

    def _add_queue(self, native_vm: pv_vm, index: int, most: int) -> Queue:
        queue = Queue(native_vm, self.interrupt, index, most)
        self.queues.append(queue)
        self._registers.add_queue(queue)
        return queue

    def _forget(self) -> None:
        """Reset everything except the status."""
        self._features = 0
        self._registers.select()
        self._setups = [Setup() for _ in self.queues]

    @property
    def behind(self) -> VirtioDevice:
        """The device."""
        return self.device

    def properties(self) -> dict[str, Any]:
        """Return the property that makes caches coherent."""
        return {"dma-coherent": True}

    @property
    def status(self) -> Status:
        """The device status register."""
        return self._registers.status

    @property
    def features(self) -> int:
        """The driver's features; negotiated once FEATURES_OK is set."""
        return self._features

    def about(self) -> str:
        """Return the device's name, and the maximum entries of its queues."""
        return f"{self.device.label}, queues of {', '.join(str(queue.most) for queue in self.queues)}"

    def info(self) -> dict[str, Any]:
        """Return the device's name, its driver's status, and the counters of each queue."""
        return {
            "device": self.device.label,
            "status": int(self.status),
            "features": self._features,
            "interrupts": int(self.interrupt.sent),
            "queues": [
                {name: int(getattr(queue.native, name)) for name in ("size", "kicks", "chains", "bytes")}
                for queue in self.queues
            ],
        }

    @property
    def kicks_without_exit(self) -> int:
        """Number of kicks that the kernel took and the device has seen."""
        return sum(int(queue.native.kicks) for queue in self.queues if queue.kicks_in_kernel)

    # -- for the device, from any thread

    def needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET, and notify an active driver."""
        with self._guard:
            self._registers.status |= Status.NEEDS_RESET
            told = Status.DRIVER_OK in self.status
        if told:
            lib.pv_interrupt(self.interrupt, lib.PV_INTERRUPT_CONFIG)

    def config_changed(self) -> None:
        """Publish a new configuration with a new generation, and notify an active driver."""
        with self._guard:
            self._registers.update_config(changed=True)
            told = Status.DRIVER_OK in self.status
        if told:
            lib.pv_interrupt(self.interrupt, lib.PV_INTERRUPT_CONFIG)

    # -- registers

    def write(self, offset: int, size: int, value: int, vcpu: int) -> None:  # noqa: ARG002
        """Handle a store. Raises Stuck if a reset cannot stop the device."""
        with self._lock:
            if offset >= CONFIG:
                start = offset - CONFIG
                if start + size <= len(self.device.config()):
                    self.device.write_config(start, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
                    with self._guard:
                        self._registers.update_config()
            elif size == 4:
                self._set_register(offset, value & LOW)

    def _set_register(self, offset: int, value: int) -> None:
        match offset:
            case Register.DRIVER_FEATURES:
                self._set_features(value)
            case Register.STATUS:
                self._set_status(value)
            case Register.QUEUE_SIZE | Register.QUEUE_READY:
                self._set_queue(offset, value)
            case _ if offset in AREAS:
                self._set_queue(offset, value)

    # -- features and status

    def _set_features(self, value: int) -> None:
        word = self._registers.driver_word  # once: another vCPU may be storing to it
        if Status.FEATURES_OK in self.status or word >= lib.PV_VIRTIO_FEATURE_WORDS:
            return
        shift = 32 * word
        self._features = self._features & ~(LOW << shift) | value << shift

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        # A driver with an older status must not clear newer bits (2.1.1). Unknown bits are ignored.
        for bit, before in BEFORE.items():
            status = self.status
            if not value & bit or bit in status:
                continue
            if before not in status:
                self.device.complaints.warn("status_out_of_order", wanted=hex(value), status=hex(status))
                return
            if bit is Status.FEATURES_OK and (reason := self._refusal()) is not None:
                self.device.complaints.warn("features_refused", reason=reason, features=hex_(self._features))
                return
            with self._guard:
                self._registers.update_config()  # it may depend on the features
                self._registers.status |= bit
            if bit is Status.DRIVER_OK:
                self._start()

    def _refusal(self) -> str | None:
        if unknown := self._features & ~self.offered:
            return f"{hex_(unknown)} is not offered"
        if not self._features & Feature.VERSION_1:
            return "the driver is older than virtio 1.0 (no VERSION_1)"
        if self.private and not self._features & Feature.ACCESS_PLATFORM:
            return "the guest's memory is private, and the driver would not share its rings (no ACCESS_PLATFORM)"
        return self.device.negotiate(self._features)

    def _start(self) -> None:
        self._news.info("device_started", features=hex_(self._features))
        try:
            for queue in self.queues:
                if queue.ready and not queue.kicks_in_kernel and self._hand_over is not None:
                    queue.kicks_in_kernel = self._hand_over(queue)
            self.device.start(self.queues, self._features)
        except (PyvmmError, OSError) as error:
            self.device.failed(error)
        with self._guard:
            self._registers.update_config()

    def _reset(self) -> None:
        self.device.stop()
        for queue in self.queues:
            queue.reset()
            self._registers.update_queue(queue)
        self._forget()
        with self._guard:
            self._registers.update_config()
            self._registers.status = Status(0)
            self.interrupt.status = 0

    # -- queues

    def _set_queue(self, offset: int, value: int) -> None:
        selected = self._registers.queue  # once: another vCPU may be storing to it
        if selected >= len(self.queues):
            return
        queue, setup, status = self.queues[selected], self._setups[selected], self.status
        if offset == Register.QUEUE_READY and value == 0 and not queue.ready:
            return  # drivers do this after a reset
        if Status.FEATURES_OK not in status or Status.DRIVER_OK in status:
            self.device.complaints.warn("queue_out_of_order", queue=queue.index, status=hex(status))
        elif offset == Register.QUEUE_READY:
            self._set_ready(queue, setup, value)
        elif queue.ready:
            self.device.complaints.warn("queue_changed_while_ready", queue=queue.index)
        elif offset == Register.QUEUE_SIZE:
            setup.size = value
        else:
            area, shift = AREAS[offset]
            setattr(setup, area, getattr(setup, area) & ~(LOW << shift) | value << shift)

    def _set_ready(self, queue: Queue, setup: Setup, value: int) -> None:
        if value != 1:
            queue.reset()
        elif not queue.ready:
            packed = bool(self._features & Feature.RING_PACKED)
            if (reason := objection(setup, queue.most, packed=packed)) is not None:
                self.device.complaints.warn("queue_refused", queue=queue.index, reason=reason)
                return
            flags = lib.PV_QUEUE_PACKED if packed else 0
            flags |= lib.PV_QUEUE_EVENT_IDX if self._features & Feature.EVENT_IDX else 0
            flags |= lib.PV_QUEUE_INDIRECT if self._features & Feature.INDIRECT_DESC else 0
            queue.setup(setup.size, flags, setup.descriptors, setup.driver, setup.device)
        self._registers.update_queue(queue)

    # -- life

    def pause(self) -> None:
        """Pause the device."""
        self.device.pause()

    def resume(self) -> None:
        """Resume the device."""
        self.device.resume()

    def save(self) -> dict[str, Any]:
        """Return the state of transport and device, while paused. Raises UsageError if the device holds requests."""
        if held := [queue.index for queue in self.queues if queue.held]:
            raise UsageError(f"{self.device.label} cannot be saved: it holds requests of queue {held[0]}")
        return {
            "device": self.device.name,
            "status": int(self.status),
            "generation": self._registers.generation,
            "interrupt": int(self.interrupt.status),
            "features": self._features,
            "select": self._registers.save(),
            "queues": [
                {**setup.save(), "at": queue.save() if queue.ready else None}
                for setup, queue in zip(self._setups, self.queues, strict=True)
            ],
            "own": self.device.save(),
        }

    def load(self, saved: dict[str, Any]) -> None:
        """Restore the state of transport and device. Raises UsageError for another or an invalid device."""
        if saved.get("device") != self.device.name:
            raise UsageError(f"{self.device.label} was a {saved.get('device')} where it was saved")
        try:
            self._load(saved)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{self.device.label} cannot be what was saved: {error}") from None
        if Status.DRIVER_OK in self.status:
            self._start()

    def _load(self, saved: dict[str, Any]) -> None:
        from pyvmm.schema import NOTHING, OBJECT, TEXT, U32, U64, Each, Either, check

        queue_state = {**dict.fromkeys(Setup.__slots__, U64), "at": Either(NOTHING, Each(TEXT, U32))}
        words = dict.fromkeys(("status", "generation", "interrupt"), U32)
        lists = {"select": [U32], "queues": [queue_state]}
        check(saved, {"device": TEXT, "features": U64, "own": OBJECT, **words, **lists}, self.device.label)
        self._features = saved["features"]
        status = Status(saved["status"])
        if Status.FEATURES_OK in status and (reason := self._refusal()) is not None:
            raise ValueError(reason)
        self._registers.select(saved["select"])
        for number, (queue, each) in enumerate(zip(self.queues, saved["queues"], strict=True)):
            at = each.pop("at")
            self._setups[number] = setup = Setup(**each)
            if at is not None:
                self._set_ready(queue, setup, 1)
                if not queue.ready:
                    raise ValueError(f"queue {number} is refused")
                queue.load(at)
        self.device.load(saved["own"])
        self._registers.generation = saved["generation"]
        self._registers.update_config()
        self.interrupt.status = saved["interrupt"]
        self._registers.status = status

    def close(self) -> None:
        """Stop the device and close it."""
        try:
            self.device.stop()
        except BaseException:
            # Its pending I/O may still end and interrupt, after the eventfd's number was reused.
            self.interrupt.fd = -1
            raise
        finally:
            self.device.close()
            for queue in self.queues:
                queue.close()
