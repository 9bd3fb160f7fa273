# SPDX-License-Identifier: Apache-2.0
"""What the registers of a transport read as, and what its driver has selected: the native loop's, which answers reads.

Owns a ``struct pv_virtio_mmio`` and the doorbell in it. The transport writes, and says which of its locks is held.
Selectors are any vCPU's to change at any time, so each is read once for one decision.
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
    # There is no shared memory.
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
        """Let kicks reach ``queue``, the next one, and say how many entries it may have."""
        slot = self._slots[queue.index]
        slot.offset, slot.value, slot.fd, slot.coalesce = Register.QUEUE_NOTIFY, queue.index, queue.kick, 1
        queue.native.bell = ffi.addressof(self._slots, queue.index)
        self._queues[queue.index].most = queue.most

    def update_queue(self, queue: Queue) -> None:
        """Say whether it is ready."""
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
        """Show the configuration space as the device has it now, and count that. UsageError where it is too long."""
        config = self._device.config()
        if len(config) > lib.PV_VIRTIO_CONFIG:
            what = f"{self._device.label} has {len(config)} bytes of configuration space"
            raise UsageError(f"{what}: {lib.PV_VIRTIO_CONFIG} are possible")
        lib.pv_virtio_configure(self.native, config, len(config), (self.generation + changed) & LOW)

    # -- what the driver has selected

    @property
    def driver_word(self) -> int:
        """Which 32 of its feature bits the driver is to write."""
        return int(self.native.driver_features_sel)

    @property
    def queue(self) -> int:
        """The number of the queue that registers are about."""
        return int(self.native.queue_sel)

    def save(self) -> list[int]:
        """Return all selectors."""
        return [int(getattr(self.native, name)) for name in _SELECTORS]

    def select(self, selectors: Sequence[int] = (0, 0, 0)) -> None:
        """Be as :meth:`save` found another, or as at first."""
        for name, value in zip(_SELECTORS, selectors, strict=True):
            setattr(self.native, name, value)
