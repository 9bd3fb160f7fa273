# SPDX-License-Identifier: Apache-2.0
"""The register values of a transport, and its driver's selectors, for the native loop, which answers reads.

Owns a ``struct pv_virtio_mmio`` and the doorbell in it. The transport writes, and documents the lock it holds. Any vCPU
may change a selector at any time, so each is read once per decision.
"""

from __future__ import annotations

from pyvmm._native import ffi, lib
from pyvmm.devices.virtio.registers import LOW, MAGIC, VENDOR, VERSION, Register, Status
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from pyvmm._native import pv_interrupt
    from pyvmm.devices.virtio.device import VirtioDevice
    from pyvmm.devices.virtio.queue import Queue

_WORD: Final = 4
_SELECTORS: Final = ("device_features_sel", "driver_features_sel", "queue_sel")
_FIXED: Final = {
    Register.MAGIC: MAGIC,
    Register.VERSION: VERSION,
    Register.VENDOR_ID: VENDOR,
    # No shared memory regions.
    Register.SHM_LEN_LOW: LOW,
    Register.SHM_LEN_HIGH: LOW,
    Register.SHM_BASE_LOW: LOW,
    Register.SHM_BASE_HIGH: LOW,
}


class RegisterState:
    """The registers of ``device``, which offers the features ``offered``, as at first."""

    def __init__(self, device: VirtioDevice, offered: int, interrupt: pv_interrupt) -> None:
        self._device = device
        queues = len(device.queue_sizes)
        self._slots = ffi.new("struct pv_doorbell_slot[]", queues)
        self._bell = ffi.new("struct pv_doorbell *", {"count": queues, "slots": self._slots})
        self._queues = ffi.new("struct pv_virtio_queue[]", queues)
        words = [offered >> 32 * word & LOW for word in range(lib.PV_VIRTIO_FEATURE_WORDS)]
        self.native = ffi.new(
            "struct pv_virtio_mmio *",
            {"interrupt": interrupt, "bell": self._bell, "queues": self._queues, "offered": words},
        )
        for register, value in _FIXED.items():
            self._put(register, value)
        self._put(Register.DEVICE_ID, device.device_id)
        self.update_config()

    def _put(self, register: int, value: int) -> None:
        self.native.registers[register // _WORD] = value

    def _get(self, register: int) -> int:
        return int(self.native.registers[register // _WORD])

    # -- queues

    def add_queue(self, queue: Queue) -> None:
        """Connect kicks to ``queue``, the next one, and publish its maximum entries."""
        slot = self._slots[queue.index]
        slot.offset, slot.value, slot.fd, slot.coalesce = Register.QUEUE_NOTIFY, queue.index, queue.kick, 1
        queue.native.bell = ffi.addressof(self._slots, queue.index)
        self._queues[queue.index].most = queue.most

    def update_queue(self, queue: Queue) -> None:
        """Publish whether it is ready."""
        self._queues[queue.index].ready = queue.ready

    # -- under the transport's _guard, once other threads know the device

    @property
    def status(self) -> Status:
        """The device status register."""
        return Status(self._get(Register.STATUS))

    @status.setter
    def status(self, status: Status) -> None:
        self._put(Register.STATUS, status)

    @property
    def generation(self) -> int:
        """How often the configuration has changed, modulo 2^32."""
        return self._get(Register.CONFIG_GENERATION)

    @generation.setter
    def generation(self, generation: int) -> None:
        self._put(Register.CONFIG_GENERATION, generation)

    def update_config(self, *, changed: bool = False) -> None:
        """Publish the device's configuration space with a new generation. Raises UsageError if it is too long."""
        config = self._device.config()
        if len(config) > lib.PV_VIRTIO_CONFIG:
            what = f"{self._device.label} has {len(config)} bytes of configuration space"
            raise UsageError(f"{what}: {lib.PV_VIRTIO_CONFIG} are possible")
        lib.pv_virtio_configure(self.native, config, len(config), (self.generation + changed) & LOW)

    # -- the driver's selectors

    @property
    def driver_word(self) -> int:
        """The selected word of the driver's features."""
        return int(self.native.driver_features_sel)

    @property
    def queue(self) -> int:
        """The number of the selected queue."""
        return int(self.native.queue_sel)

    def save(self) -> list[int]:
        """Return all selectors."""
        return [int(getattr(self.native, name)) for name in _SELECTORS]

    def select(self, selectors: Sequence[int] = (0, 0, 0)) -> None:
        """Restore the selectors of :meth:`save`, or the initial ones."""
        for name, value in zip(_SELECTORS, selectors, strict=True):
            setattr(self.native, name, value)
