# SPDX-License-Identifier: Apache-2.0
"""The lab: a pKVM host to run commands in. It starts on entry, runs any number of commands, and ends on exit.

Owns a ``Qemu`` and speaks to its agent. A lab starts from a saved boot (see saved) where it may, and boots otherwise.
One thread at a time; signals are forwarded only from the main thread. The thread that starts a lab must outlive it (the
kernel kills QEMU when that thread ends).
"""

from __future__ import annotations

import os
import platform
import sys
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from pyvmm import log
from pyvmm._native_source import in_checkout, is_surely_fresh
from pyvmm.errors import HostError, PyvmmError
from pyvmm.lab import bytecode, frames, saved, shares
from pyvmm.lab.cache import Image
from pyvmm.lab.link import Link
from pyvmm.lab.qemu import SHARES, LabOptions, Qemu, find_qemu, mount_tag, qemu_version
from pyvmm.lab.stream import ChannelClosedError, InsistedError, Pump, Sink
from pyvmm.labenv import EMULATOR, FRESH, IN_LAB, MANIFEST

PATH = "/usr/bin:/usr/sbin"
NATIVE = shares.PACKAGE / "lab" / "aarch64" / "_native.abi3.so"
RESTORE_SECONDS = 60.0
"""What a restored lab has for its first answers; one that is later is booted instead."""

_log = log.get_logger("lab")


@dataclass(frozen=True, slots=True)
class Completed:
    """The result of a command: its exit status (128 + signal if it was killed) and its output."""

    status: int
    stdout: bytes
    stderr: bytes


class Lab:
    """A lab as a context manager. It starts ``image``, which ``build_image`` makes, with ``options``.

    ``cwd`` is the directory of its commands, by default the current one; the lab sees it at the same path.
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
            self._shares.append(shares.Share(packages, shares.PACKAGES, readonly=True))
            self._path.append(str(shares.PACKAGES))
        self._caching = "none" if live else "loose"
        self._qemu: Qemu | None = None
        self._warm: Link | None = None
        """The way to an agent that has a warm interpreter and not yet the byte code for it."""

    def __enter__(self) -> Self:
        try:
            restored = self._restore()
            self._mount(restored or self._boot())
            self._warm = restored if self._shares else None
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
        """The id of QEMU's process. Raises PyvmmError if the lab is not running."""
        return self._running().pid

    @property
    def command(self) -> list[str]:
        """QEMU's command line. Raises PyvmmError if the lab is not running."""
        return self._running().command

    def console(self) -> str:
        """Return the last 64 KiB of the lab's console. Raises PyvmmError if the lab is not running."""
        return self._running().console()

    def _running(self) -> Qemu:
        if self._qemu is None:
            raise PyvmmError("the lab is not running", hint="use it as a context manager")
        return self._qemu

    def _restore(self) -> Link | None:
        """Start from the saved boot. None if it is missing or unusable."""
        if len(self._shares) > SHARES or not saved.may_be_saved(self.options):
            return None
        program = find_qemu()
        boot = saved.find_or_save(program, self._image, self.options)
        if boot is None:
            return None
        try:
            qemu = self._qemu = Qemu(program, boot.version, self._image, self.options, self._shares, boot.ram)
            qemu.monitor.restore(boot.state)
            link = Link(qemu, self._image, RESTORE_SECONDS)
            if (why := link.send(saved.renewal())) is not None:
                raise PyvmmError(why)
        except PyvmmError as error:
            self.close()
            boot.drop()
            _log.info("a saved boot is of no use", reason=str(error))
            return None
        finally:
            boot.close()
        return link

    def _boot(self) -> Link:
        """Start from the image."""
        program = find_qemu()
        self._qemu = Qemu(program, qemu_version(program), self._image, self.options, self._shares)
        link = Link(self._qemu, self._image, self.options.boot_timeout)
        link.wait_for_boot()
        return link

    def _mount(self, link: Link) -> None:
        """Mount the shares."""
        for number, share in enumerate(self._shares):
            is_tree = share.readonly and (share.source / MANIFEST).is_file()  # which never changes
            caching = "loose" if is_tree else self._caching
            options = f"trans=virtio,version=9p2000.L,msize=512000,cache={caching}"
            options += ",ro" if share.readonly else ""
            self._ask(link, frames.MOUNT, mount_tag(number), str(share.target), options)
        if self._shares and NATIVE.is_file():
            inside = shares.python_path() / "pyvmm"
            target = inside / "_native.abi3.so"
            if (shares.PACKAGE / target.name).is_file():
                self._ask(link, frames.BIND, str(inside / "lab" / "aarch64" / NATIVE.name), str(target))

    def _ask(self, link: Link, kind: int, *fields: str) -> None:
        if (why := link.ask(kind, *fields)) is not None:
            raise PyvmmError(f"{fields[1]} cannot be made visible in the lab: {why}", hint=self._modules_hint())

    def _modules_hint(self) -> str | None:
        """Return a hint if the kernel's modules are missing."""
        image = self._image
        if image.has_modules:
            return None
        return (
            f"the host kernel {image.kernel} ({image.release}) finds none of its modules in the lab's root, which has "
            f"those of {image.manifest.release}: the 9p file system and its virtio transport must be built in "
            "(CONFIG_9P_FS=y, CONFIG_NET_9P_VIRTIO=y)"
        )

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
        is_module: bool = False,
        timeout: float | None = None,
    ) -> int:
        """Run the command ``argv`` in the lab and return its exit status.

        That is 128 + N if signal N ended it, 127 if it does not exist.

        ``stdin`` is the whole input or a file descriptor. Output goes to this process's unless the functions ``stdout``
        and ``stderr`` take it, piece by piece. ``cwd`` is its directory, the lab's by default. ``env`` comes on top of
        the lab's own. With ``is_tty``, ``stdin`` must be a terminal, and stderr comes with stdout. With
        ``is_module``, ``argv[0]`` is a Python module to run, as ``python3 -P -m`` would: in a restored lab it starts
        in a fork of an interpreter that has imported the standard library.
        ``timeout`` is in seconds. SIGINT, SIGTERM and SIGHUP reach the command; when it does not end within 10 s, or
        at the second one, the lab ends. LabError where the lab ends, PyvmmError at the timeout.
        """
        qemu = self._running()
        if is_module:
            self._send_bytecode()
        rows, columns = termios.tcgetwinsize(stdin) if is_tty and isinstance(stdin, int) else (0, 0)
        variables = {**self._environment(), EMULATOR: f"QEMU {qemu.version}", **(env or {})}
        command = frames.pack_fields(
            frames.EXEC,
            (frames.TTY if is_tty else b"") + (frames.MODULE if is_module else b""),
            *(b"%d" % number for number in (rows, columns, len(argv))),
            os.fsencode(cwd or self._directory()),
            *map(os.fsencode, argv),
            *(os.fsencode(f"{name}={value}") for name, value in variables.items()),
        )
        pump = Pump(
            qemu.channel,
            stdin,
            stdout or standard_sink(sys.stdout),
            stderr or standard_sink(sys.stderr),
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
            raise qemu.failed(f"{argv[0]} did not end in {timeout:g} s", ended=False) from None

    def capture(self, argv: Sequence[str], **options: Any) -> Completed:
        """Run the command ``argv`` as :meth:`run` does, with the same ``options``, and return its output."""
        out, err = bytearray(), bytearray()
        status = self.run(argv, stdout=out.extend, stderr=err.extend, **options)
        return Completed(status, bytes(out), bytes(err))

    def _send_bytecode(self) -> None:
        """Send modules to the warm interpreter, which would otherwise request them one by one."""
        warm, self._warm = self._warm, None
        if warm is not None:
            for piece in bytecode.pieces(shares.PACKAGE, self._image.cache_tag):
                warm.send(frames.pack(frames.BYTECODE, piece))

    def _directory(self) -> Path:
        """Return the workstation's current directory if it is visible in the lab, else the lab's /root."""
        visible = any(share.target in (self.cwd, *self.cwd.parents) for share in self._shares)
        return self.cwd if visible else Path("/root")

    def _environment(self) -> dict[str, str]:
        # Temporary files stay in the lab even if its /tmp is the workstation's.
        shared = any(share.target == shares.TEMPORARY for share in self._shares)
        return {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PATH": PATH,
            "PYTHONPATH": os.pathsep.join(self._path),
            IN_LAB: "1",
            **({FRESH: "1"} if NATIVE.is_file() and is_surely_fresh(str(NATIVE)) else {}),
            "TERM": os.environ.get("TERM", "dumb"),
            **({"TMPDIR": "/var/tmp"} if shared else {}),
        }


def standard_sink(stream: TextIO) -> Sink:
    """Return a function that passes a command's output to this process's ``stream``."""

    def write(data: bytes) -> None:
        stream.buffer.write(data)
        stream.buffer.flush()

    return write


def require_native() -> None:
    """Raise HostError if the native extension for the lab's architecture is missing."""
    if not NATIVE.is_file() and platform.machine() != "aarch64":
        raise HostError(
            f"the native extension for the lab is not built ({NATIVE})",
            hint="apt install gcc-aarch64-linux-gnu, then: python3 native/build.py"
            if in_checkout()
            else "install a wheel that was built where gcc-aarch64-linux-gnu is",
        )
