# SPDX-License-Identifier: Apache-2.0
"""The lab: a pKVM host one can run commands in. Boots on entry, runs any number of commands, is gone on exit.

Owns a ``Qemu`` and speaks to its agent. One thread at a time; signals are forwarded only from the main thread. The
thread that boots a lab must outlive it (the kernel kills QEMU when that thread ends).
"""

from __future__ import annotations

import os
import platform
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab import frames, shares
from pyvmm.lab.cache import Image
from pyvmm.lab.qemu import LabOptions, Qemu
from pyvmm.lab.stream import ChannelClosedError, InsistedError, Pump, Sink
from pyvmm.labenv import EMULATOR, IN_LAB, MANIFEST

PATH = "/usr/bin:/usr/sbin"
NATIVE = shares.PACKAGE / "lab" / "aarch64" / "_native.abi3.so"


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command left: its exit status (128 + signal if it was killed) and its output."""

    status: int
    stdout: bytes
    stderr: bytes


class Lab:
    """A lab as a context manager. It boots ``image``, which ``build_image`` makes.

    ``arguments`` are looked through for files to make visible, ``outputs`` name files that commands will write (see
    shares.py); a ``bare`` lab sees nothing of the workstation. ``packages`` is a directory to import from, after
    pyvmm's own. What the workstation changes while the lab runs, a ``live`` one sees; the others cache, and start a
    Python program a second sooner.
    """

    def __init__(
        self,
        options: LabOptions | None = None,
        *,
        image: Image,
        cwd: Path | None = None,
        arguments: Sequence[str] = (),
        outputs: Sequence[str] = (),
        packages: Path | None = None,
        bare: bool = False,
        live: bool = False,
    ) -> None:
        self.options = options or LabOptions()
        self.cwd = Path(os.path.abspath(cwd or Path.cwd()))
        self._image = image
        self._shares = [] if bare else shares.find_shares(self.cwd, arguments, outputs)
        self._path = [str(shares.python_path())]
        if packages is not None:
            self._shares.append(shares.Share(packages, shares.PACKAGES, "packages", readonly=True))
            self._path.append(str(shares.PACKAGES))
        self._caching = "none" if live else "loose"
        self._qemu: Qemu | None = None
        self._unpacker = frames.Unpacker()

    def __enter__(self) -> Self:
        self._qemu = Qemu(self._image, self.options, self._shares)
        try:
            self._boot(self._qemu)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the machine, whatever it is doing."""
        if self._qemu is not None:
            self._qemu.stop()

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._running().pid

    def console(self) -> str:
        """Give the last 64 KiB of the lab's console."""
        return self._running().console()

    def _running(self) -> Qemu:
        if self._qemu is None:
            raise PyvmmError("the lab is not running", hint="use it as a context manager")
        return self._qemu

    def _boot(self, qemu: Qemu) -> None:
        deadline = time.monotonic() + self.options.boot_timeout
        if self._wait(deadline) != (frames.READY, b""):
            raise qemu.failed("the lab's agent is another version's", ended=False, hint="pyvmm lab build --refresh")
        for share in self._shares:
            is_tree = share.readonly and (share.source / MANIFEST).is_file()  # which never changes
            caching = "loose" if is_tree else self._caching
            options = f"trans=virtio,version=9p2000.L,msize=512000,cache={caching}"
            options += ",ro" if share.readonly else ""
            self._ask(deadline, frames.MOUNT, share.tag, str(share.target), options)
        if self._shares and NATIVE.is_file():
            inside = shares.python_path() / "pyvmm"
            target = inside / "_native.abi3.so"
            if (shares.PACKAGE / target.name).is_file():
                self._ask(deadline, frames.BIND, str(inside / "lab" / "aarch64" / NATIVE.name), str(target))

    def _ask(self, deadline: float, kind: int, *fields: str) -> None:
        self._send(frames.pack_fields(kind, *map(os.fsencode, fields)))
        answer, reason = self._wait(deadline)
        if answer != frames.DONE or reason:
            what = f"{fields[1]} cannot be made visible in the lab: {reason.decode(errors='replace')}"
            raise PyvmmError(what, hint=self._modules_hint())

    def _wait(self, deadline: float) -> tuple[int, bytes]:
        """Wait for one frame outside of any command."""
        qemu = self._running()
        while True:
            qemu.channel.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                data = qemu.channel.recv(65536)
            except TimeoutError:
                raise qemu.failed(
                    f"the lab did not come up in {self.options.boot_timeout:.0f} s",
                    ended=False,
                    hint=self._file_hint() or "on a loaded machine give it longer with --boot-timeout",
                ) from None
            finally:
                qemu.channel.settimeout(None)
            if not data:
                raise qemu.failed("the lab ended while it was booting", ended=True, hint=self._file_hint())
            if got := self._unpacker.feed(data):
                return got[0]

    def _file_hint(self) -> str | None:
        """Say what the lab needs of a kernel that does not come with it."""
        if self._image.file is None:
            return None
        return "a host kernel from a file must have virtio-pci, virtio-console, PL011 and an initramfs built in"

    def _modules_hint(self) -> str | None:
        """Say that the kernel has none of its modules, if so."""
        image = self._image
        if image.has_modules:
            return None
        return (
            f"the host kernel {image.kernel} ({image.release}) finds none of its modules in the lab's root, which has "
            f"those of {image.manifest.release}: the 9p file system and its virtio transport must be built in "
            "(CONFIG_9P_FS=y, CONFIG_NET_9P_VIRTIO=y)"
        )

    def _send(self, data: bytes) -> None:
        try:
            self._running().channel.sendall(data)
        except OSError:
            raise self._running().failed("the lab ended", ended=True) from None

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | int = b"",
        stdout: Sink | None = None,
        stderr: Sink | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        is_tty: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Run a command in the lab; give its exit status, 128 + N where signal N ended it, 127 where there is none.

        ``stdin`` is the whole input or a file descriptor. Output goes to ours unless sinks take it. ``env`` comes
        on top of the lab's own. With ``is_tty``, ``stdin`` must be a terminal, and stderr comes with stdout.
        ``timeout`` is in seconds. SIGINT, SIGTERM and SIGHUP reach the command; when it does not end within 10 s, or
        at the second one, the lab ends. LabError where the lab ends, PyvmmError at the timeout.
        """
        qemu = self._running()
        rows, columns = termios.tcgetwinsize(stdin) if is_tty and isinstance(stdin, int) else (0, 0)
        variables = {**self._environment(), EMULATOR: f"QEMU {qemu.version}", **(env or {})}
        command = frames.pack_fields(
            frames.EXEC,
            frames.TTY if is_tty else b"",
            *(b"%d" % number for number in (rows, columns, len(argv))),
            os.fsencode(cwd or self._directory()),
            *map(os.fsencode, argv),
            *(os.fsencode(f"{name}={value}") for name, value in variables.items()),
        )
        pump = Pump(
            qemu.channel,
            stdin,
            stdout or _sink(sys.stdout.buffer),
            stderr or _sink(sys.stderr.buffer),
            is_tty=is_tty,
            timeout=timeout,
        )
        try:
            return pump.run(command)
        except ChannelClosedError as error:
            raise qemu.failed(f"the lab ended while it ran {argv[0]}", ended=True) from error
        except InsistedError as error:
            self.close()
            return 128 + error.number
        except TimeoutError:
            raise qemu.failed(f"{argv[0]} did not end in {timeout:.0f} s", ended=False) from None

    def capture(self, argv: Sequence[str], **options: Any) -> Completed:
        """Run a command as ``run`` does and keep its output."""
        out, err = bytearray(), bytearray()
        status = self.run(argv, stdout=out.extend, stderr=err.extend, **options)
        return Completed(status, bytes(out), bytes(err))

    def _directory(self) -> Path:
        """Give the workstation's current directory where it is visible inside, else the lab's /root."""
        visible = any(share.target in (self.cwd, *self.cwd.parents) for share in self._shares)
        return self.cwd if visible else Path("/root")

    def _environment(self) -> dict[str, str]:
        # Where /tmp is the workstation's, temporary files stay in the lab all the same.
        shared = any(share.target == shares.TEMPORARY for share in self._shares)
        return {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PATH": PATH,
            "PYTHONPATH": os.pathsep.join(self._path),
            IN_LAB: "1",
            "TERM": os.environ.get("TERM", "dumb"),
            **({"TMPDIR": "/var/tmp"} if shared else {}),
        }


def _sink(stream: BinaryIO) -> Sink:
    def write(data: bytes) -> None:
        stream.write(data)
        stream.flush()

    return write


def require_native() -> None:
    """HostError where the lab would find no native extension for its architecture."""
    if not NATIVE.is_file() and platform.machine() != "aarch64":
        raise HostError(
            f"the native extension for the lab is not built ({NATIVE})",
            hint="apt install gcc-aarch64-linux-gnu, then: python3 native/build.py",
        )
