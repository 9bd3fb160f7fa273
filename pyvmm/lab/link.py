# SPDX-License-Identifier: Apache-2.0
"""Requests of the workstation to the lab's agent outside of commands, each followed by its answer.

Owns nothing; ``Qemu`` has the channel.
"""

from __future__ import annotations

import os
import time

from pyvmm.lab import frames
from pyvmm.lab.cache import Image
from pyvmm.lab.qemu import Qemu


class Link:
    """The connection to the agent of ``qemu``, which runs ``image``. Methods raise LabError if the lab ends or is late.

    ``patience`` is how many seconds the lab has for each answer.
    """

    def __init__(self, qemu: Qemu, image: Image, patience: float) -> None:
        self._qemu = qemu
        self._image = image
        self._patience = patience
        self._unpacker = frames.Unpacker()
        self._arrived: list[tuple[int, bytes]] = []

    def wait_for_boot(self) -> None:
        """Wait until the agent of a booting lab answers."""
        if self._wait() != (frames.READY, b""):
            hint = "pyvmm lab build --refresh"
            raise self._qemu.failed("the lab's agent is another version's", ended=False, hint=hint)

    def ask(self, kind: int, *fields: str) -> str | None:
        """Send a request of this ``kind``; return why it failed, or None."""
        return self.send(frames.pack_fields(kind, *map(os.fsencode, fields)))

    def send(self, frame: bytes) -> str | None:
        """Send a whole frame; return the same as ``ask``."""
        try:
            self._qemu.channel.sendall(frame)
        except OSError:
            raise self._qemu.failed("the lab ended", ended=True) from None
        answer, reason = self._wait()
        if answer != frames.DONE:
            return f"the agent answered with a frame of kind {answer}"
        return reason.decode(errors="replace") or None

    def _wait(self) -> tuple[int, bytes]:
        """Wait for one frame."""
        deadline = time.monotonic() + self._patience
        channel = self._qemu.channel
        while not self._arrived:
            channel.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                data = channel.recv(65536)
                channel.settimeout(None)
            except TimeoutError:
                raise self._qemu.failed(
                    f"the lab did not come up in {self._patience:g} s",
                    ended=False,
                    hint=self._file_hint() or "on a loaded machine give it longer with --boot-timeout",
                ) from None
            except OSError:
                data = b""
            if not data:
                raise self._qemu.failed("the lab ended while it was booting", ended=True, hint=self._file_hint())
            self._arrived += self._unpacker.feed(data)
        return self._arrived.pop(0)

    def _file_hint(self) -> str | None:
        """Return a hint about what the lab needs of a kernel from a file."""
        if self._image.file is None:
            return None
        return "a host kernel from a file must have virtio-pci, virtio-console, PL011 and an initramfs built in"
