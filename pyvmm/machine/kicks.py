# SPDX-License-Identifier: Apache-2.0
"""Who takes the kicks of virtqueues: the kernel where it does, by KVM_IOEVENTFD, and the native loop's doorbell else.

Either writes to the queue's eventfd, which wakes the device's thread. The kernel does it without an exit to this
process. The doorbell leaves the write out while the last one has not been taken; but a driver hardly ever kicks then,
for a device asks to be kicked (event index) only when it is about to sleep. So the kernel is asked for every queue,
whatever the device and the protection; ``pyvmm bench virtio --versus kicks=loop`` holds one against the other.

The kernel takes stores of 4 bytes of the queue's own number. Other widths and numbers come to the loop as ever.

A queue's kicks are handed over when its driver is ready for the first time, and stay so over resets until the VM ends:
taking them back would wait for every CPU to have seen it (SRCU), and nobody looks at the eventfd of a queue at rest.
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
    """Hands the kicks of queues of one VM to its kernel. Any thread, but one at a time for each queue."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._possible: bool | None = None
        """Whether the kernel takes more of them; None: it has not been asked."""

    def hand_over(self, base: int, queue: Queue) -> bool:
        """Have the kernel take the kicks of ``queue``, of a transport at the gpa ``base``; False where it does not.

        The doorbell then goes on taking them. Nothing is raised: a guest is as well off, but for the cost.
        """
        if self._possible is None:
            # Of the host: a protected VM says 0 to what works all the same.
            self._possible = self._vm.system.check(KVM_CAP_IOEVENTFD) > 0
        if not self._possible:
            return False
        try:
            self._vm.ioeventfd(queue.kick, base + Register.QUEUE_NOTIFY, WIDTH, datamatch=queue.index)
        except KvmError as error:
            # No memory, say: each makes a larger table of all who listen, which counts against the VMM's cgroup. The
            # limit of that table (NR_IOBUS_DEVS) is for others.
            self._possible = False
            log.warning("kicks_by_exits", error=str(error))
            return False
        return True
