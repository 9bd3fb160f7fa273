# SPDX-License-Identifier: Apache-2.0
"""passt as a child of ours: a guest's network without any privilege, whose connections are sockets of the user's.

passt speaks for the host: it answers DHCP, ARP and router solicitations, and makes the guest's flows its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess

from pyvmm.devices.virtio.netbackend import Stream
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

PATIENCE: Final = 2.0
"""Seconds that it has to end by itself after its connection is closed, and then again after SIGTERM."""
SAID: Final = 4096
"""Bytes of what it said that are looked at."""


class Passt(Stream):
    """A passt that lives as long as its socket. ``forwards`` are TCP ports, the host's and the guest's.

    With ``loopback`` the address of the guest's gateway is the host's own: all that listens on 127.0.0.1 can be reached
    there. A guest that is not trusted must not, so passt is told, which would have it otherwise.
    """

    def __init__(self, program: str, forwards: Sequence[tuple[int, int]] = (), *, loopback: bool = False) -> None:
        """Start ``program``; HostError where that fails. What it cannot do, it says later: :meth:`last_words`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._said, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # what finds no room in it, it need not say
        command = [program, "--foreground", "--quiet", "--fd", str(theirs.fileno())]
        if not loopback:
            command.append("--no-map-gw")
        if forwards:
            command += ["--tcp-ports", ",".join(f"{host}:{guest}" for host, guest in forwards)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=tell,
                stderr=tell,
                pass_fds=(theirs.fileno(),),
                process_group=0,  # a Ctrl-C on the terminal is for us, and for it when we have done
            )
        except OSError as error:
            ours.close()
            os.close(self._said)
            hint = "install passt (Debian: apt install passt)"
            raise HostError(f"{program!r} cannot be started: {error.strerror}", hint=hint) from error
        finally:
            os.close(tell)
            theirs.close()
        super().__init__("passt", ours.detach())

    def last_words(self) -> str:
        """Say how it ended, if it has, and what it said."""
        said = b""
        with contextlib.suppress(OSError):  # nothing, or closed
            said = os.read(self._said, SAID)
        status = self._process.poll()
        how = [] if status is None else [f"status {status}" if status >= 0 else f"signal {-status}"]
        return "; ".join(how + [line for line in said.decode(errors="replace").splitlines() if line.strip()][-3:])

    def close(self) -> None:
        """Hang up, and wait for its end; it is helped along where that takes long."""
        if self.fd < 0:
            return
        super().close()
        for help_it in (self._process.terminate, self._process.kill, lambda: None):
            try:
                self._process.wait(PATIENCE)
                break
            except subprocess.TimeoutExpired:
                help_it()
        os.close(self._said)
