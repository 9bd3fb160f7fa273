# SPDX-License-Identifier: Apache-2.0
"""The ways a run can end: what is asked of it, what is done to it at a random time, and the statuses it may have."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Final, TypeAlias

from pyvmm.errors import PyvmmError
from pyvmm.machine.snapshot import Snapshot
from pyvmm.protection import Protection
from pyvmm.session.connection import Connection
from pyvmm.vcpu.outcome import Ending as Outcome
from tests.soak.guests import GUESTS, LINUX, Guest

PATIENCE: Final = 300.0
"""Seconds for what must happen."""
DISK: Final = 8 << 20
"""Bytes."""
FULL: Final = 1 << 20
"""Bytes of the file system in which the disk ``full`` has no room."""
SOCKET: Final = "control"

Process: TypeAlias = "subprocess.Popen[bytes]"
Act: TypeAlias = "Callable[[Process, Path, random.Random], None]"


@dataclass(frozen=True, slots=True)
class Ending:
    """A way to end. ``words`` are asked for; ``act`` is done to the process, whose directory it gets.

    ``statuses`` are those it may end with, None for that of the guest. ``guests`` are the guests that can end so,
    ``protections`` those in which they can. ``linux`` is the command of a Linux guest, ``payload`` the parameters of
    others, if they need their own.
    """

    name: str
    guests: tuple[Guest, ...]
    statuses: Collection[int] | None = None
    words: tuple[str, ...] = ()
    act: Act | None = None
    protections: tuple[Protection, ...] = tuple(Protection)
    linux: str = ""
    payload: str = ""

    @property
    def killed(self) -> bool:
        """Whether pyvmm has no chance to clear up."""
        return self.statuses is not None and any(status in UNHEARD for status in self.statuses)

    def params(self, guest: Guest) -> str:
        """Return the parameters of ``guest`` that make it end so, or let it last until it is ended."""
        own = self.linux if guest.name == LINUX else self.payload
        by_itself = guest.ends if self.act is None and guest.ends is not None else None
        return own or (by_itself if by_itself is not None else guest.lasts or guest.ends or "")

    def allowed(self, guest: Guest) -> set[int]:
        """Return the statuses that a run of ``guest`` may end with."""
        statuses = {guest.status} if self.statuses is None else set(self.statuses)
        if self.act is not None and guest.lasts is None:
            statuses.add(guest.status)  # it may be faster
        return statuses


def sends(*numbers: signal.Signals) -> Act:
    """Return what sends signals, one after the other; in between some time goes by."""

    def act(process: Process, _where: Path, chance: random.Random) -> None:
        for number in numbers:
            process.send_signal(number)
            if number is not numbers[-1]:
                time.sleep(chance.uniform(0, 1))

    return act


def connected(process: Process, where: Path) -> Connection | None:
    """Return a connection to the run, None if it ends before."""
    while process.poll() is None:
        with contextlib.suppress(PyvmmError):
            return Connection(str(where / SOCKET))
        time.sleep(0.05)
    return None


def stop(process: Process, where: Path, _chance: random.Random) -> None:
    """Ask the run over its socket to end."""
    if (connection := connected(process, where)) is not None:
        with connection:
            connection.ask("stop", patience=PATIENCE)


def kill_in_snapshot(process: Process, where: Path, chance: random.Random) -> None:
    """Kill the VMM while it writes a snapshot. A file with that name is then whole."""
    file = where / "snapshot"
    if (connection := connected(process, where)) is None:
        return

    def ask() -> None:
        with contextlib.suppress(PyvmmError):
            connection.ask("snapshot", path=str(file), patience=PATIENCE)

    with connection:
        asking = Thread(target=ask)
        asking.start()
        time.sleep(chance.uniform(0, 1))
        process.kill()
        asking.join()
    if file.exists():
        with Snapshot(str(file)) as snapshot:
            snapshot.verify()
        file.unlink()


def kill_passt(process: Process, where: Path, chance: random.Random) -> None:
    """Kill the programs that the VMM started, and end it some time later."""
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
    time.sleep(chance.uniform(0, 1))
    sends(signal.SIGTERM)(process, where, chance)


def cut_disk(process: Process, where: Path, chance: random.Random) -> None:
    """Take half of the guest's disk away, and end the run some time later."""
    os.truncate(where / "disk", DISK // 2)
    time.sleep(chance.uniform(0, 2))
    sends(signal.SIGTERM)(process, where, chance)


UNHEARD: Final = (-signal.SIGKILL, -signal.SIGSEGV)
INTERRUPTED: Final = (128 + signal.SIGINT, -signal.SIGINT)
TERMINATED: Final = (128 + signal.SIGTERM, -signal.SIGTERM)
"""The second before pyvmm hears signals."""
LASTING: Final = tuple(guest for guest in GUESTS if guest.lasts is not None)
TALKING: Final = tuple(guest for guest in GUESTS if guest.ends is not None and guest.says)
ENDING: Final = tuple(guest for guest in GUESTS if guest.ends is not None)
ONLY_LINUX: Final = tuple(guest for guest in GUESTS if guest.name == LINUX)
RESETTING: Final = tuple(guest for guest in GUESTS if guest.name in (LINUX, "crash"))
RESET: Final = {"linux": "reboot -f", "payload": "way=reset"}
WRITING: Final = "while :; do dd if=/dev/zero of=/dev/vda bs=64k count=128 conv=fsync 2>/dev/null; done"
READING: Final = "while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; done"

ENDINGS: Final = (
    Ending("power off", ENDING),
    Ending("the guest's crash", ONLY_LINUX, (Outcome.RESET.status,), linux="echo c >/proc/sysrq-trigger"),
    Ending("reset", RESETTING, (Outcome.RESET.status,), **RESET),  # type: ignore[arg-type]
    Ending("resets and a deadline", RESETTING, (Outcome.DEADLINE.status,), ("--reboot", "--deadline", "5"), **RESET),  # type: ignore[arg-type]
    Ending("deadline", LASTING, (Outcome.DEADLINE.status,), ("--deadline", "1"), lambda *_: None),
    Ending("SIGINT", GUESTS, INTERRUPTED, act=sends(signal.SIGINT)),
    Ending("SIGTERM", GUESTS, TERMINATED, act=sends(signal.SIGTERM)),
    Ending("SIGTERM twice", GUESTS, TERMINATED, act=sends(signal.SIGTERM, signal.SIGTERM)),
    Ending("SIGSTOP and CONT", GUESTS, TERMINATED, act=sends(signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM)),
    Ending("SIGKILL", GUESTS, (-signal.SIGKILL,), act=sends(signal.SIGKILL)),
    Ending("the VMM's crash", GUESTS, (-signal.SIGSEGV,), act=sends(signal.SIGSEGV)),
    Ending("control stop", GUESTS, (Outcome.INTERRUPTED.status,), act=stop),
    Ending("killed in a snapshot", LASTING, (-signal.SIGKILL,), act=kill_in_snapshot, protections=(Protection.NONE,)),
    Ending("passt killed", LASTING, TERMINATED, ("--net", "passt"), kill_passt),
    Ending("output full", TALKING, (Outcome.FAILED.status,), ("--serial", "file=/dev/full")),
    Ending("disk full", ONLY_LINUX, TERMINATED, ("-d", "full/disk"), sends(signal.SIGTERM), linux=WRITING),
    Ending("disk cut short", ONLY_LINUX, TERMINATED, ("-d", "disk"), cut_disk, linux=READING),
)
