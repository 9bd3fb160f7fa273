# SPDX-License-Identifier: Apache-2.0
"""The entropy device (virtio 1.2, 5.4): fill the driver's buffers from the host's random number generator."""

from __future__ import annotations

import os

from pyvmm.devices.virtio.queue import Chain, ChainFault, Queue
from pyvmm.devices.virtio.worker import WorkerDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

MOST: Final = 4096
"""Maximum bytes of one request. A driver that wants more asks again."""


class VirtioRng(WorkerDevice):
    """Asks the host's kernel for every byte, keeps none."""

    device_id = 4
    name = "rng"
    queue_sizes = (64,)

    def __init__(self) -> None:
        super().__init__()
        self._worker = self.new_worker()

    def start(self, queues: Sequence[Queue], features: int) -> None:  # noqa: ARG002
        """Serve requests."""
        queue = queues[0]
        if queue.ready:
            self._worker.watch(queue, lambda: queue.serve(self._fill))
        self._worker.start(queues)

    def _fill(self, chain: Chain) -> int:
        try:
            return chain.write(0, os.getrandom(min(chain.writable_size, MOST)))
        except ChainFault as fault:
            self.complaints.warn("request_failed", reason=str(fault))
            return 0
