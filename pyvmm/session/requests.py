# SPDX-License-Identifier: Apache-2.0
"""Answer other processes' requests to a run: its state, its counters, and orders.

A :class:`Requests` owns nothing. Its functions run in the thread of a :class:`~pyvmm.session.control.Control`, one at a
time, and return plain JSON values. It outlives a machine: after a reset it answers for the next one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading

from pyvmm import __version__
from pyvmm.devices.roles import MemoryBalloon, Terminal
from pyvmm.errors import PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    from pyvmm.machine.machine import Machine

RETURN = b"\r"
"""The byte that a terminal sends for the Return key."""


class Requests:
    """The requests of one run. ``options`` returns the options of its machine, for a snapshot.

    ``opens_files`` says whether the run may open files while its guest runs.
    """

    def __init__(
        self, machine: Machine | None = None, options: Callable[[], str] = str, *, opens_files: bool = True
    ) -> None:
        self._current = machine
        self._options = options
        self._opens_files = opens_files
        self._holding = False
        self._answering = threading.Lock()
        self.asked: str | None = None
        """Why the run must end, if it got a stop request."""

    @contextlib.contextmanager
    def about(self, machine: Machine) -> Iterator[None]:
        """Answer for ``machine``, which is built. After this context, no request uses it."""
        with self._answering:
            self._current = machine
        try:
            yield
        finally:
            with self._answering:
                self._current, self._holding = None, False

    @property
    def verbs(self) -> dict[str, Callable[..., object]]:
        """Each request by its name."""
        verbs: dict[str, Callable[..., object]] = {
            "info": self.info,
            "counters": self.counters,
            "pause": self.pause,
            "resume": self.resume,
            "stop": self.stop,
            "kick": self.kick,
            "break": self.send_break,
            "snapshot": self.snapshot,
            "balloon": self.balloon,
        }
        return {name: self._alone(answer) for name, answer in verbs.items()}

    def _alone(self, answer: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(answer)
        def alone(**members: object) -> object:
            with self._answering:
                return answer(**members)

        return alone

    @property
    def _machine(self) -> Machine:
        if self._current is None:
            raise PyvmmError("the machine is still being made; try again", hint="ask again")
        return self._current

    @property
    def state(self) -> str:
        """``running``, ``paused``, ``starting`` or ``ended``."""
        machine = self._current
        if machine is None:
            return "starting"
        if machine.ended_ns:
            return "ended"
        if machine.paused:
            return "paused"
        return "running" if machine.started_ns else "starting"

    def info(self) -> dict[str, Any]:
        """Describe the machine: sizes in bytes, addresses as numbers, ``elapsed_ns`` since the first run."""
        machine = self._machine
        config = machine.config
        return {
            "pyvmm": __version__,
            "pid": os.getpid(),
            "state": self.state,
            "elapsed_ns": machine.elapsed_ns,
            "kernel": config.title,
            "protection": config.protection.value,
            "memory": config.memory,
            "backing": config.backing,
            "cpus": config.cpus,
            "slots": [
                {"gpa": slot.gpa, "size": slot.size, "backing": slot.backing.kind} for slot in machine.memory.slots
            ],
            "devices": [
                {
                    "name": placed.device.name,
                    "gpa": placed.base,
                    "size": placed.device.size,
                    "spi": _spi(placed),
                    "about": placed.device.about(),
                }
                | placed.device.info()
                for placed in machine.bus.placed
            ],
        }

    def counters(self) -> dict[str, Any]:
        """Return the counters."""
        from pyvmm.observe.rates import take_reading

        return take_reading(self._machine)

    def pause(self) -> dict[str, Any]:
        """Make vCPUs, devices and the guest's time stand still, if they do not; A deadline keeps running.

        ``clock`` says why the guest's time does not stand, where it does not.
        """
        if not self._holding:
            self._refuse_unless_started("be paused")
            self._machine.pause()
            if self._machine.ended_ns:
                # The guest ended by itself meanwhile. Its remaining work must not wait for a resume.
                self._machine.resume()
                self._refuse_unless_started("be paused")
            self._holding = True
        goes_on = self._machine.clock.goes_on
        return {"state": self.state} | ({} if goes_on is None else {"clock": f"goes on: {goes_on}"})

    def resume(self) -> dict[str, Any]:
        """Resume the vCPUs and devices that :meth:`pause` stopped."""
        if self._holding:
            self._holding = False
            self._machine.resume()
        return {"state": self.state}

    def stop(self) -> dict[str, Any]:
        """End the run."""
        self.asked = "pyvmm ctl stop"
        if self._current is not None:
            self._current.stop(self.asked)
        return {"state": self.state}

    def kick(self, text: str = "") -> dict[str, Any]:
        """Type ``text`` and the Return key on the console, for example to make a shell print its prompt again.

        A ``text`` of a caret and a letter is that control key, without Return: ``^C``. Refused if the console has no
        room for all of it: the guest does not read, or is paused.
        """
        keys = _control_key(text) or _bytes("text", text) + RETURN
        if not _type(self._machine, keys):
            why = "the guest is paused" if self._machine.paused else "it does not read its input"
            raise PyvmmError(f"the guest's console takes no {len(keys)} bytes now: {why}")
        return {"typed": len(keys)}

    def send_break(self, key: str = "") -> dict[str, Any]:
        """Send a BREAK on the UART, and ``key`` behind it. Linux takes that as its SysRq key."""
        keys = _bytes("key", key)
        if not self._machine.uart.send_break(keys):
            why = "the guest is paused" if self._machine.paused else "it does not read its input"
            raise PyvmmError(f"the guest's UART takes no BREAK now: {why}")
        return {"typed": len(keys)}

    def balloon(self, size: int | None = None) -> dict[str, Any]:
        """Have the balloon take ``size`` bytes of the guest's memory, unless None. Returns the balloon's size."""
        if size is not None and (type(size) is not int or size < 0):
            raise UsageError(f"size: {size!r} is not a number of bytes")
        for device in self._machine.role(MemoryBalloon):
            return device.hold(size)
        raise UsageError("this guest has no balloon", hint="--balloon 0 adds an empty one")

    def snapshot(self, file: str) -> dict[str, Any]:
        """Write the machine to ``file``, an absolute path. The machine is paused meanwhile."""
        if not (path := _bytes("file", file)).startswith(b"/") or b"\0" in path:
            raise UsageError(f"file: {file!r} is not an absolute path")
        if not self._opens_files:
            raise PyvmmError("this run is confined, and opens no file", hint="for snapshots, run it with --confine off")
        self._refuse_unless_started("be saved")
        from pyvmm.machine.saving import save

        return save(self._machine, file, options=self._options())

    def _refuse_unless_started(self, what: str) -> None:
        if self.state not in ("running", "paused"):
            raise PyvmmError(f"a run that is {self.state} cannot {what}")


def _bytes(name: str, value: object) -> bytes:
    """Return the bytes of a request's member. A word of a command line may have bytes that are not UTF-8."""
    try:
        return os.fsencode(value) if isinstance(value, str) else _refuse(name, value)
    except UnicodeEncodeError:
        return _refuse(name, value)


def _refuse(name: str, value: object) -> NoReturn:
    raise UsageError(f"{name}: {value!r} is not text")


def _control_key(text: object) -> bytes | None:
    """Return the control character that ``^C`` and its like stand for, or None for other text."""
    if not isinstance(text, str) or len(text) != 2 or text[0] != "^" or not "@" <= text[1].upper() <= "_":
        return None
    return bytes([ord(text[1].upper()) - 0x40])


def _type(machine: Machine, keys: bytes) -> bool:
    """Type on the virtio console if it has an input or is the only console, else on the UART. False without room."""
    terminals = machine.role(Terminal)
    if machine.config.serial_out is None or any(terminal.interactive for terminal in terminals):
        return any(terminal.offer(keys) for terminal in terminals)
    return machine.uart.offer(keys)


def _spi(placed: Any) -> int | None:
    """Return the shared interrupt of a device that has one."""
    line = getattr(placed, "line", None)
    return None if line is None else int(line.spi)
