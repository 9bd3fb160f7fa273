# SPDX-License-Identifier: Apache-2.0
"""The base of all virtio devices, behind any transport: features, configuration space, and queues.

Feature bits are written as masks. The transport adds its own and those of queues (:class:`Feature`).
"""

from __future__ import annotations

import time
from enum import IntEnum

from pyvmm.devices.virtio.queue import Queue, QueueBroken
from pyvmm.errors import PyvmmError
from pyvmm.log import get_logger
from pyvmm.typed import Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, ClassVar, Final

log = get_logger("virtio")


class Feature(IntEnum):
    """Masks of the device-independent feature bits (virtio 1.2, 6)."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34


class Transport(Protocol):
    """The transport's interface for its device. Any thread may call it."""

    def needs_reset(self) -> None:
        """Tell the driver that the device must be reset."""
        ...

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""
        ...


class Complaints:
    """Rate-limited messages about a device: a few at once, then one every ``EVERY`` seconds."""

    BURST: Final = 5
    EVERY: Final = 10.0

    def __init__(self, device: str) -> None:
        self._device = device
        self._left = float(self.BURST)
        self._at = time.monotonic()
        self._dropped = 0

    def warn(self, event: str, **values: object) -> None:
        """Log a warning, or count it."""
        self._say(log.warning, event, values)

    def error(self, event: str, **values: object) -> None:
        """Log an error of the VMM's side, or count it."""
        self._say(log.error, event, values)

    def info(self, event: str, **values: object) -> None:
        """Log an event that the guest can cause at any rate, or count it."""
        self._say(log.info, event, values)

    def _say(self, say: Callable[..., None], event: str, values: dict[str, object]) -> None:
        now = time.monotonic()
        self._left = min(self._left + (now - self._at) / self.EVERY, self.BURST)
        self._at = now
        if self._left < 1:
            self._dropped += 1
            return
        self._left -= 1
        dropped, self._dropped = self._dropped, 0
        say(event, device=self._device, **values, **({"not_told": dropped} if dropped else {}))


class VirtioDevice:
    """A virtio device. The transport calls its methods one at a time, in any vCPU's thread.

    :mod:`pyvmm.devices.roles` has the roles of single kinds.

    ``queue_sizes`` are the maximum entries of each queue, powers of two up to 32768. ``features`` are the device's own
    features (bits 0 to 23 and from 50).
    """

    device_id: ClassVar[int]
    name: ClassVar[str]
    queue_sizes: tuple[int, ...] = (256,)
    features: int = 0
    taken: bool = False
    """Whether a machine owns the device, and closes it."""

    def __init__(self) -> None:
        self.transport: Transport | None = None
        self.label = self.name
        """Its name in messages. The machine numbers devices of a kind."""
        self.complaints = Complaints(self.label)
        # Separate, so that a driver's faults do not hide them. A restarted driver causes them again.
        self._faults = Complaints(self.label)

    def name_it(self, label: str) -> None:
        """Set the device's name to ``label``, such as blk0, before the transport is made."""
        self.label = label
        self.complaints = Complaints(label)
        self._faults = Complaints(label)

    # -- for a kind of device to implement

    def config(self) -> bytes:
        """Return the current configuration space, at most 256 bytes.

        The driver reads the result of the last call: after a write, negotiation, start, stop, or
        :meth:`config_changed`. Since that calls this method, it must take no lock that its caller holds.
        """
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a write of 1, 2, 4 or 8 bytes, all of it within the configuration space."""

    def negotiate(self, features: int) -> str | None:  # noqa: ARG002 - most take what was offered
        """Accept the driver's features, or return why this set is invalid. Called before the start.

        It may write the configuration space from then on (3.1.1).
        """
        return None

    def start(self, queues: Sequence[Queue], features: int) -> None:
        """Start: the driver is ready, with these features. It has set up those ``queues`` that are ``ready``."""

    def stop(self) -> None:
        """Stop: on return, no queue and no guest memory is in use. Idempotent.

        It waits for the current request, but not for the guest. Raises Stuck if that request does not end.
        """

    def pause(self) -> None:
        """Pause as at :meth:`stop`, until :meth:`resume`; started or not. Raises Stuck."""

    def resume(self) -> None:
        """Resume after :meth:`pause`."""

    def save(self) -> dict[str, Any]:
        """Return the device's state as JSON values, while paused. Raises UsageError if it cannot be saved."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:
        """Restore a state of :meth:`save`, before the start."""

    def close(self) -> None:
        """Release files, sockets and threads. Called once, after :meth:`stop`."""

    # -- for a kind of device to use

    def needs_reset(self, reason: str) -> None:
        """Stop until the driver resets the device, and log the reason. Any thread."""
        self.complaints.warn("device_needs_reset", reason=reason)
        if self.transport is not None:
            self.transport.needs_reset()

    def config_changed(self) -> None:
        """Tell the driver to read the configuration space again. Any thread."""
        if self.transport is not None:
            self.transport.config_changed()

    def failed(self, error: Exception) -> None:
        """Called by a worker that ends with ``error``: the driver broke a queue, or the VMM's side failed."""
        if not isinstance(error, QueueBroken):
            unexpected = not isinstance(error, PyvmmError | OSError)
            self._faults.error("device_failed", error=str(error), exc_info=error if unexpected else None)
        self.needs_reset(str(error))
