# SPDX-License-Identifier: Apache-2.0
"""The runs of a soak: which guest, how protected, how ended; and what each leaves behind."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

from pyvmm.errors import PyvmmError
from pyvmm.protection import Protection
from tests.soak import host
from tests.soak.endings import DISK, ENDINGS, FULL, PATIENCE, SOCKET, Ending
from tests.soak.guests import Guest

MOST_CPUS: Final = 2
MOST_LINES: Final = 8
"""Of a run's messages, if something is wrong."""
HOSTS_OWN: Final = ("messages", "output", "disk", "full", "runtime", "tmp")
"""What the soak itself puts into a run's directory."""


@dataclass(frozen=True, slots=True)
class Run:
    """The run ``number`` of a seed. The same seed and number give the same run, but for the host's timing."""

    seed: int
    number: int
    guest: Guest
    protection: Protection
    ending: Ending

    def __str__(self) -> str:
        return f"run {self.number}: {self.guest.name}, {self.protection.value}, {self.ending.name}"

    @property
    def chance(self) -> random.Random:
        """What the run's random choices come from."""
        return random.Random(f"{self.seed}/{self.number}")


@dataclass(slots=True)
class Done:
    """A run that was made: its status, and what is wrong with it."""

    run: Run
    status: int = 0
    wrong: list[str] = field(default_factory=list)


def drawn(seed: int) -> Iterator[Run]:
    """Yield runs: all kinds in a random order, then all in another one, and so on."""
    kinds = [(guest, each, ending) for ending in ENDINGS for guest in ending.guests for each in ending.protections]
    number = count()
    for turn in count():
        random.Random(f"{seed}, turn {turn}").shuffle(kinds)
        for guest, protection, ending in kinds:
            yield Run(seed, next(number), guest, protection, ending)


def made(runs: Iterator[Run], directory: Path, at_once: int, late: float) -> Iterator[Done]:
    """Make the runs, some at a time, and yield each when it has ended."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda run: make(run, directory / str(run.number), late), runs)


def make(run: Run, where: Path, late: float) -> Done:
    """Make one run in the directory ``where``, which is removed unless something is wrong.

    What is done to it is done within ``late`` seconds.
    """
    done = Done(run)
    (where / "runtime").mkdir(mode=0o700, parents=True)
    (where / "tmp").mkdir()
    _provide_disks(run, where)
    words = _words(run)
    own = {"TMPDIR": f"{where}/tmp", "XDG_RUNTIME_DIR": f"{where}/runtime", host.MARK: where.name}
    try:
        with (where / "messages").open("wb") as messages, (where / "output").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pyvmm", "run", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=messages,
                cwd=where,
                env={**os.environ, **own},
                start_new_session=True,
            )
        try:
            _end(run, process, where, late)
            done.status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            done.wrong.append(f"has not ended after {PATIENCE:g} s")
        except PyvmmError as error:
            done.wrong.append(error.message)
        finally:
            process.kill()
            process.wait()
        done.wrong += _left(run, done.status, where)
    finally:
        if (where / "full").is_mount():
            subprocess.run(["umount", str(where / "full")], check=True)
    if done.wrong:
        said = (where / "messages").read_text(errors="replace").splitlines()[-MOST_LINES:]
        done.wrong += [f"asked for: pyvmm run {shlex.join(words)}", *said]
    else:
        shutil.rmtree(where)
    return done


def _provide_disks(run: Run, where: Path) -> None:
    if "disk" in run.ending.words:
        with (where / "disk").open("wb") as disk:
            disk.write(os.urandom(DISK))
    if "full/disk" in run.ending.words:
        (where / "full").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={FULL}", "full", str(where / "full")], check=True)
        with (where / "full/disk").open("wb") as disk:
            os.truncate(disk.fileno(), DISK)


def _words(run: Run) -> list[str]:
    chance = run.chance
    words = ["--protection", run.protection.value, "-c", str(chance.randint(1, MOST_CPUS)), *run.ending.words]
    if SOCKET not in words:
        words += ["--socket", SOCKET]
    if chance.random() < 0.2 and "passt" not in words:
        words += ["--net", "passt"]
    if chance.random() < 0.3:
        words += ["--vsock", "uds=vsock,cid=3", "--rng"]
    return words + run.guest.words(run.ending.params(run.guest))


def _end(run: Run, process: subprocess.Popen[bytes], where: Path, late: float) -> None:
    if run.ending.act is None:
        return
    chance = run.chance
    try:
        process.wait(chance.uniform(0, late))
    except subprocess.TimeoutExpired:
        run.ending.act(process, where, chance)


def _left(run: Run, status: int, where: Path) -> list[str]:
    """Return what is wrong after the end of a run: its status, and what it left."""
    wrong = []
    if status not in (allowed := run.ending.allowed(run.guest)) and not _before_pyvmm(where):
        wrong.append(f"ended with status {status}, not {' or '.join(map(str, sorted(allowed)))}")
    end = time.monotonic() + PATIENCE
    while (running := host.marked(where.name)) and time.monotonic() < end:
        time.sleep(0.05)
    if running:
        names = ", ".join(Path(f"/proc/{pid}/comm").read_text().strip() for pid in running)
        wrong.append(f"left processes: {names}")
    left = {str(file.relative_to(where)) for name in ("runtime", "tmp") for file in (where / name).rglob("*")}
    left |= {name for name in os.listdir(where) if name not in HOSTS_OWN}
    if run.ending.killed:
        left -= {name for name in left if _takes_no_connection(where / name)}
    left.discard("runtime/pyvmm")  # the directory for sockets stays
    wrong += [f"left {name}" for name in sorted(left)]
    return wrong


def _before_pyvmm(where: Path) -> bool:
    """Whether a signal came while Python started: then its status and words are Python's."""
    said = (where / "messages").read_text(errors="replace")
    return said.endswith("KeyboardInterrupt\n") and "/pyvmm/" not in said


def _takes_no_connection(path: Path) -> bool:
    """Whether it is the socket of a process that was killed: its next run there takes the name over."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) != 0


def name_of(status: int) -> str:
    """Return a status in words."""
    return signal.Signals(-status).name if status < 0 else str(status)
