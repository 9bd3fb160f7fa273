# SPDX-License-Identifier: Apache-2.0
"""Route the kicks of virtqueues: to the kernel by KVM_IOEVENTFD if it can, else to the native loop's doorbell.

Both write to the queue's eventfd, which wakes the device's thread. The kernel does it without an exit to this process.
The doorbell skips the write while the last one is pending. But a driver hardly ever kicks then, because a device
requests kicks (event index) only before it sleeps. So every queue uses the kernel, with any device and protection.
``pyvmm bench virtio --versus kicks=loop`` compares both.

The kernel takes 4-byte stores of the queue's number. Other widths and numbers still go to the loop.

A queue's kicks are handed over when its driver is ready for the first time, until the VM ends. A reset does not take
them back: that would wait for every CPU (SRCU), and the eventfd of an idle queue has no reader.
"""

from __future__ import annotations

from pyvmm.devices.virtio.registers import Register
from pyvmm.errors import KvmError
from pyvmm.log import get_logger
from pyvmm.uapi.kvm_cap import KVM_CAP_IOEVENTFD

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from pyvmm.devices.virtio.queue import Queue
    from pyvmm.kvm.vm import Vm

log = get_logger("machine")

WIDTH: Final = 4
"""Bytes of QueueNotify."""


class Kicks:
    """Hands the kicks of one VM's queues to the kernel. Any thread, but one at a time for each queue."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._possible: bool | None = None
        """Whether the kernel takes more kicks; None if unknown."""

    def hand_over(self, base: int, queue: Queue) -> bool:
        """Have the kernel take the kicks of ``queue``, of a transport at the gpa ``base``. False if it does not.

        The doorbell then keeps them. Raises nothing: the guest works either way, only slower.
        """
        if self._possible is None:
            self._possible = self._vm.offers(KVM_CAP_IOEVENTFD) > 0
        if not self._possible:
            return False
        try:
            self._vm.ioeventfd(queue.kick, base + Register.QUEUE_NOTIFY, WIDTH, datamatch=queue.index)
        except KvmError as error:
            # For example, no memory: each call allocates a larger table of listeners, charged to the VMM's cgroup. The
            # limit of that table (NR_IOBUS_DEVS) does not apply here.
            self._possible = False
            log.warning("kicks_by_exits", error=str(error))
            return False
        return True
