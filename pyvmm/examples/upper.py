# SPDX-License-Identifier: Apache-2.0
"""A virtio device in one file: it answers each request with the request's bytes in upper case.

From Python: ``Machine(config, devices=[UpperDevice()])``. A driver puts a readable and a writable buffer into each
request of the only queue. Linux has no driver for it, so ``device_id`` is one that virtio 1.2 leaves free.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue
from pyvmm.devices.virtio.worker import WorkerDevice

MOST = 4096
"""Bytes of a request that are read. The guest chooses its size, so the device needs a bound."""


class UpperDevice(WorkerDevice):
    """One queue of up to 64 entries, served by one thread."""

    device_id = 63
    name = "upper"
    queue_sizes = (64,)

    def __init__(self) -> None:
        super().__init__()
        self._worker = self.new_worker()

    def start(self, queues: Sequence[Queue], features: int) -> None:  # noqa: ARG002 - it offers no features
        """Serve requests from now on. The base class stops, pauses and resumes the thread."""
        queue = queues[0]
        if queue.ready:
            self._worker.watch(queue, lambda: queue.serve(self._answer))
        self._worker.start(queues)

    def _answer(self, chain: Chain) -> int:
        """Return the number of bytes written. A request whose buffers are private to the guest fails alone."""
        try:
            return chain.write(0, chain.read(0, MOST).upper())
        except ChainFault as fault:
            self.complaints.warn("request_failed", reason=str(fault))
            return 0
