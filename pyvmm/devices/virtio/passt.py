# SPDX-License-Identifier: Apache-2.0
"""Run passt as a child process: unprivileged networking for a guest, over the user's sockets.

passt acts as the host: it answers DHCP, ARP and router solicitations, and forwards the guest's flows.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess

from pyvmm.devices.roles import Reach
from pyvmm.devices.virtio.netbackend import Stream
from pyvmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

PATIENCE: Final = 2.0
"""Seconds to wait for its end after the connection is closed, and again after SIGTERM."""
MOMENT: Final = 0.5
"""Seconds to wait for its end when it has hung up."""
SAID: Final = 4096
"""Maximum bytes read of its output."""


class Passt(Stream):
    """A passt that lives as long as its socket. ``forwards`` are TCP ports, the host's and the guest's.

    With ``loopback`` the guest reaches services on the host's 127.0.0.1 at its gateway's address. passt allows that by
    default. An untrusted guest must not, so it is turned off without ``loopback``.
    """

    def __init__(self, program: str, forwards: Sequence[tuple[int, int]] = (), *, loopback: bool = False) -> None:
        """Start ``program``. Raises HostError if that fails. Its later errors are in :meth:`last_words`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._said, tell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)  # output without room in the pipe is dropped
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
                process_group=0,  # a Ctrl-C on the terminal is for us; passt ends after us
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

    def reach(self) -> Reach:
        """Return that passt is ended, and waited for."""
        return Reach(parts=("passt",), children=(self._process.pid,))

    def last_words(self) -> str:
        """Return how it ended, if it has or ends now, and its output."""
        # Its socket hangs up a moment before it can be asked how it ended.
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(MOMENT)
        said = b""
        with contextlib.suppress(OSError):  # nothing, or closed
            said = os.read(self._said, SAID)
        how = [] if status is None else [f"status {status}" if status >= 0 else f"signal {-status}"]
        return "; ".join(how + [line for line in said.decode(errors="replace").splitlines() if line.strip()][-3:])

    def close(self) -> None:
        """Hang up, and wait for its end. If that takes long, kill it."""
        if self.fd < 0:
            return
        super().close()
        for help_it in (self._process.terminate, self._process.kill, lambda: None):
            try:
                self._process.wait(PATIENCE)
                break
            except subprocess.TimeoutExpired:
                # Of root, passt becomes another user, whom a run without capabilities cannot signal.
                with contextlib.suppress(PermissionError):
                    help_it()
        os.close(self._said)
