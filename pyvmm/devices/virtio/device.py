# SPDX-License-Identifier: Apache-2.0
"""What a kind of virtio device is, behind any transport: features, configuration space, and what it does with queues.

Feature bits are written as their masks. The transport adds those that are its own or the queues' (:class:`Feature`).
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
    """Masks of feature bits that are no device's own (virtio 1.2, 6)."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34


class Transport(Protocol):
    """What a device may ask of the transport it is behind; from any thread."""

    def needs_reset(self) -> None:
        """Tell the driver that the device is of no use any more until it is reset."""
        ...

    def config_changed(self) -> None:
        """Tell the driver that the configuration space has changed."""
        ...


class Complaints:
    """What is wrong with a device: a few at once, then one every ``EVERY`` seconds. A guest must not fill the disk."""

    BURST: Final = 5
    EVERY: Final = 10.0

    def __init__(self, device: str) -> None:
        self._device = device
        self._left = float(self.BURST)
        self._at = time.monotonic()
        self._dropped = 0

    def warn(self, event: str, **values: object) -> None:
        """Say it, or count it."""
        self._say(log.warning, event, values)

    def error(self, event: str, **values: object) -> None:
        """The same for what is wrong on this side."""
        self._say(log.error, event, values)

    def info(self, event: str, **values: object) -> None:
        """The same for what is nothing wrong, but the guest's to make happen as often as it likes."""
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
    """A device; the transport calls all of this, never two at a time, in any vCPU's thread.

    What single kinds can do besides is in :mod:`pyvmm.devices.roles`.

    ``queue_sizes`` are the most entries of each queue, powers of two up to 32768; ``features`` what it offers of its
    own (bits 0 to 23 and from 50).
    """

    device_id: ClassVar[int]
    name: ClassVar[str]
    queue_sizes: tuple[int, ...] = (256,)
    features: int = 0
    taken: bool = False
    """Whether a machine has been given it, and closes it."""

    def __init__(self) -> None:
        self.transport: Transport | None = None
        self.label = self.name
        """What messages call it: the machine numbers devices of a kind."""
        self.complaints = Complaints(self.label)
        # Apart, so that a driver's own faults do not hide them; a driver that starts over meets them again.
        self._faults = Complaints(self.label)

    def name_it(self, label: str) -> None:
        """Be called ``label`` from now on, like ``blk0``; before the transport is made."""
        self.label = label
        self.complaints = Complaints(label)
        self._faults = Complaints(label)

    # -- what a kind of device fills in

    def config(self) -> bytes:
        """Return the configuration space as it is now, 256 bytes at most.

        The driver reads what this returned after the last write, negotiation, start, stop, or :meth:`config_changed`.
        That calls it too, so it takes no lock that is held there.
        """
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a write of 1, 2, 4 or 8 bytes, all of it within the configuration space."""

    def negotiate(self, features: int) -> str | None:  # noqa: ARG002 - most take what was offered
        """Take the driver's choice of what was offered, or say why it cannot have just these; before the start.

        It may write the configuration space from then on (3.1.1).
        """
        return None

    def start(self, queues: Sequence[Queue], features: int) -> None:
        """Begin: the driver is there, with these features. Queues it did not set up are not ``ready``."""

    def stop(self) -> None:
        """Let go: on return no queue and no guest memory is used any more. Idempotent.

        It waits for the request at hand, but not for the guest. Raises Stuck where that does not end.
        """

    def pause(self) -> None:
        """Stand still as at :meth:`stop`, to go on with :meth:`resume`; started or not. Raises Stuck."""

    def resume(self) -> None:
        """Go on after :meth:`pause`."""

    def save(self) -> dict[str, Any]:
        """Return the device's own state, plain values of JSON, while paused; UsageError where it cannot be had."""
        return {}

    def load(self, saved: dict[str, Any]) -> None:
        """Be as :meth:`save` found another such device; before the start."""

    def close(self) -> None:
        """Give back files, sockets, threads; once, after :meth:`stop`."""

    # -- what a kind of device uses

    def needs_reset(self, reason: str) -> None:
        """Give up until the driver resets the device, and say why. Any thread."""
        self.complaints.warn("device_needs_reset", reason=reason)
        if self.transport is not None:
            self.transport.needs_reset()

    def config_changed(self) -> None:
        """Tell the driver to look at the configuration space again. Any thread."""
        if self.transport is not None:
            self.transport.config_changed()

    def failed(self, error: Exception) -> None:
        """What a worker tells when it ends: the driver broke a queue, or something is wrong on this side."""
        if not isinstance(error, QueueBroken):
            unexpected = not isinstance(error, PyvmmError | OSError)
            self._faults.error("device_failed", error=str(error), exc_info=error if unexpected else None)
        self.needs_reset(str(error))
