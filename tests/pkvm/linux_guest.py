# SPDX-License-Identifier: Apache-2.0
"""A Linux guest of the project's kernel. Tests use the shell on its virtio console."""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from io import BytesIO
from pathlib import Path
from typing import Self

from pyvmm.cpio import CpioWriter
from pyvmm.devices.kind import DeviceSpec
from pyvmm.devices.kinds.console import Console
from pyvmm.machine.machine import Machine
from pyvmm.protection import Protection
from pyvmm.vcpu.outcome import Outcome
from tests.pkvm.harness import config
from tests.pkvm.required import kernel_directory

DEADLINE = 600.0
"""Seconds for whatever is waited for; an idle lab boots in about 5."""
PROGRAMS = Path(__file__).parents[1] / "guest"
PARAMS = ("console=hvc0", "quiet", "panic=-1", "audit=0", "mitigations=off")
SIZE = (100, 30)


def initrd(path: Path, *programs: str) -> str:
    """Write an initramfs at ``path``: ``shell:``, and programs of tests/guest in its /bin."""
    out = BytesIO()
    archive = CpioWriter(out)
    for name in programs:
        archive.file(f"bin/{name}", (PROGRAMS / name).read_bytes(), mode=0o755)
    archive.finish()
    path.write_bytes((kernel_directory("own:") / "shell.cpio").read_bytes() + out.getvalue())
    return str(path)


class Linux:
    """A running guest; a context manager that stops it."""

    def __init__(
        self,
        protection: Protection,
        initrd: str,
        *devices: DeviceSpec,
        memory: int = 128 << 20,
        params: tuple[str, ...] = (),
    ) -> None:
        self._out, self._out_end = os.pipe()
        self._source_end, self._keys = os.pipe()
        self._serial = os.memfd_create("serial")
        self._seen = b""
        console = Console(self._out_end, self._source_end, SIZE)
        self.machine = Machine(
            config(
                str(kernel_directory("own:") / "Image"),
                protection,
                initrd=initrd,
                params=(*PARAMS, *params),
                memory=memory,
                serial_out=self._serial,
                devices=(console, *devices),
                deadline=None,
            )
        )

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as half:
            half.callback(self.__exit__)
            self.machine.__enter__()
            self.machine.start()
            self.expect(b"# ")
            half.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.machine.__exit__()
        for fd in (self._out, self._out_end, self._source_end, self._keys, self._serial):
            os.close(fd)

    def expect(self, pattern: bytes) -> re.Match[bytes]:
        """Read up to ``pattern``. What follows it is left for the next read."""
        end = time.monotonic() + DEADLINE
        while (match := re.search(pattern, self._seen)) is None:
            ready, _, _ = select.select([self._out], [], [], max(end - time.monotonic(), 0))
            assert ready, f"no {pattern!r} but {self._seen!r}; on the UART: {os.pread(self._serial, 1 << 16, 0)!r}"
            self._seen += os.read(self._out, 1 << 16)
        self._seen = self._seen[match.end() :]
        return match

    def type(self, line: str) -> None:
        os.write(self._keys, line.encode() + b"\n")

    def sh(self, command: str) -> str:
        """Run a command in the shell, and return its output. Fails if its exit status is not 0."""
        # The terminal and the shell each echo the typed line. In neither echo do the two words stand together.
        self.type(f"printf '[%s]' begin; {command}; printf '[%s %d]' end $?")
        match = self.expect(rb"(?s)\[begin\](.*)\[end (\d+)\]")
        said = match[1].decode(errors="replace").replace("\r", "")
        assert match[2] == b"0", f"{command!r} ended with {match[2].decode()}: {said}"
        return said

    def poweroff(self) -> Outcome:
        """Turn the guest off, and return how the run ended."""
        self.type("poweroff")
        return self.machine.wait(DEADLINE)
