# SPDX-License-Identifier: Apache-2.0
"""Answer the packets of GDB's remote protocol: all-stop mode, one thread per vCPU.

A :class:`Session` is one debugger's connection, without the connection: packets in, answers out. It uses a
:class:`Target`, not KVM. Unknown requests get an empty answer, as the protocol requires, malformed ones an error. GDB's
manual, appendix "GDB Remote Serial Protocol".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from pyvmm.debug.breakpoints import Kind
from pyvmm.debug.errors import EINVAL, Refused
from pyvmm.debug.packets import PACKET_SIZE, escape
from pyvmm.debug.registers import EXPEDITED, REGISTERS, description

SIGINT: Final = 2
SIGTRAP: Final = 5
SIGSEGV: Final = 11
_ALL: Final = -1
_ANY: Final = 0


class Go(Enum):
    """The action of a vCPU when the guest resumes."""

    CONTINUE = "continue"
    STEP = "step"


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the guest stopped: ``thread`` (from 1) caused it; ``reason`` is the stop reply's."""

    thread: int
    signal: int = SIGTRAP
    reason: str = ""


class Target(Protocol):
    """The debugged machine. Threads are numbered from 1. Every method may raise Refused."""

    def threads(self) -> Sequence[int]:
        """Return every thread's number."""
        ...

    def describe(self, thread: int) -> str:
        """Return a short description of a thread."""
        ...

    def read_register(self, thread: int, number: int) -> bytes:
        """Return a register, in the guest's byte order."""
        ...

    def write_register(self, thread: int, number: int, value: bytes) -> None:
        """Set a register."""
        ...

    def read_memory(self, thread: int, address: int, size: int) -> bytes:
        """Return up to ``size`` bytes, as many as are readable. Raises Refused if none is."""
        ...

    def write_memory(self, thread: int, address: int, data: bytes) -> None:
        """Write all of ``data``."""
        ...

    def insert(self, kind: Kind, address: int, length: int) -> None:
        """Set a breakpoint or a watchpoint."""
        ...

    def remove(self, kind: Kind, address: int, length: int) -> None:
        """Remove one."""
        ...

    def resume(self, actions: Mapping[int, Go]) -> None:
        """Resume the guest. Threads without an entry in ``actions`` stay stopped."""
        ...

    def detach(self) -> None:
        """Resume the guest without any debugging."""
        ...

    def kill(self) -> None:
        """End the run."""
        ...


class Session:
    """One debugger's session. ``monitor`` runs a user's command for a thread, and returns its output.

    ``running``: the guest runs, and no request is valid until it stops. ``over``: the session has ended.
    """

    def __init__(self, target: Target, stop: Stop, monitor: Callable[[int, str], str]) -> None:
        self._target = target
        self._monitor = monitor
        self._stop = stop
        self._thread = stop.thread
        self._go_thread = _ALL
        self._description = description()
        self.running = False
        self.over = False
        self.no_acks = False

    def handle(self, packet: bytes) -> bytes | None:
        """Answer a packet. None if the answer is a later stop, or none is due."""
        try:
            return self._handle(packet)
        except Refused as refused:
            return b"E%02d" % refused.code
        except (ValueError, LookupError):
            return b"E%02d" % EINVAL

    def stopped(self, stop: Stop) -> bytes:
        """Record that the guest has stopped. Returns the stop reply."""
        self.running = False
        self._stop = stop
        self._thread = stop.thread
        return self._stop_reply()

    def ended(self, status: int) -> bytes:
        """Record that the run has ended with this exit status. Returns the stop reply."""
        self.running, self.over = False, True
        return b"W%02x" % (status & 0xFF)

    # -- inside

    def _handle(self, packet: bytes) -> bytes | None:
        text = packet.decode("latin-1")
        for prefix, handler in _BY_PREFIX:
            if text.startswith(prefix):
                return handler(self, text[len(prefix) :])
        return b""

    def _why(self, _: str) -> bytes:
        return self._stop_reply()

    def _stop_reply(self) -> bytes:
        stop = self._stop
        read = self._target.read_register
        registers = "".join(f"{number:x}:{read(stop.thread, number).hex()};" for number in EXPEDITED)
        reason = f"{stop.reason};" if stop.reason else ""
        return f"T{stop.signal:02x}{registers}thread:{stop.thread:x};{reason}".encode()

    # -- registers and memory

    def _registers(self, _: str) -> bytes:
        read = self._target.read_register
        return b"".join(read(self._thread, number) for number in range(len(REGISTERS))).hex().encode()

    def _set_registers(self, rest: str) -> bytes:
        data = bytes.fromhex(rest)
        if len(data) != sum(register.size for register in REGISTERS):
            raise ValueError(rest)
        for number, register in enumerate(REGISTERS):
            self._target.write_register(self._thread, number, data[: register.size])
            data = data[register.size :]
        return b"OK"

    def _register(self, rest: str) -> bytes:
        return self._target.read_register(self._thread, _number(rest)).hex().encode()

    def _set_register(self, rest: str) -> bytes:
        number, _, value = rest.partition("=")
        data = bytes.fromhex(value)
        if len(data) != REGISTERS[_number(number)].size:
            raise ValueError(rest)
        self._target.write_register(self._thread, _number(number), data)
        return b"OK"

    def _read(self, rest: str) -> bytes:
        address, size = _range(rest)
        return self._target.read_memory(self._thread, address, min(size, PACKET_SIZE // 2)).hex().encode()

    def _write(self, rest: str) -> bytes:
        where, _, digits = rest.partition(":")
        return self._write_at(where, bytes.fromhex(digits))

    def _write_binary(self, rest: str) -> bytes:
        where, _, data = rest.partition(":")
        return self._write_at(where, data.encode("latin-1"))

    def _write_at(self, where: str, data: bytes) -> bytes:
        address, size = _range(where)
        if len(data) != size:
            raise ValueError(where)
        if data:
            self._target.write_memory(self._thread, address, data)
        return b"OK"

    # -- breakpoints

    def _insert(self, rest: str) -> bytes:
        return self._change(rest, self._target.insert)

    def _remove(self, rest: str) -> bytes:
        return self._change(rest, self._target.remove)

    def _change(self, rest: str, change: Callable[[Kind, int, int], None]) -> bytes:
        # Conditions and commands may follow, but only for a stub that offers them.
        number, address, length = rest.split(";")[0].split(",")
        change(Kind(_hex(number)), _hex(address), _hex(length))
        return b"OK"

    # -- threads

    def _select(self, rest: str) -> bytes:
        thread = _thread(rest[1:])
        if thread not in (_ALL, _ANY) and thread not in self._target.threads():
            raise ValueError(rest)
        if rest[0] == "c":
            self._go_thread = thread
        elif thread > 0:
            self._thread = thread
        return b"OK"

    def _alive(self, rest: str) -> bytes:
        if _thread(rest) not in self._target.threads():
            raise ValueError(rest)
        return b"OK"

    def _current(self, rest: str) -> bytes:
        return b"" if rest else b"QC%x" % self._thread

    def _threads(self, _: str) -> bytes:
        return b"m" + b",".join(b"%x" % thread for thread in self._target.threads())

    def _describe(self, rest: str) -> bytes:
        thread = _thread(rest)
        if thread not in self._target.threads():
            raise ValueError(rest)
        return self._target.describe(thread).encode().hex().encode()

    # -- resuming

    def _continue(self, rest: str) -> None:
        chosen = self._go_thread
        self._jump(self._thread if chosen <= 0 else chosen, rest)
        self._go(dict.fromkeys(self._target.threads() if chosen <= 0 else [chosen], Go.CONTINUE))

    def _step(self, rest: str) -> None:
        chosen = self._thread if self._go_thread <= 0 else self._go_thread
        self._jump(chosen, rest)
        self._go({chosen: Go.STEP})

    def _continue_signal(self, rest: str) -> None:
        self._continue(rest.partition(";")[2])

    def _step_signal(self, rest: str) -> None:
        self._step(rest.partition(";")[2])

    def _jump(self, thread: int, address: str) -> None:
        if address:
            pc = _hex(address).to_bytes(8, "little")
            self._target.write_register(thread, EXPEDITED[-1], pc)

    def _resume(self, rest: str) -> None:
        actions: dict[int, Go] = {}
        everyone = self._target.threads()
        for part in rest.split(";"):
            what, _, where = part.partition(":")
            thread = _thread(where) if where else _ALL
            for each in everyone if thread == _ALL else [thread if thread != _ANY else self._thread]:
                if each not in everyone:
                    raise ValueError(part)
                actions.setdefault(each, _GO[what[:1]])
        self._go(actions)

    def _go(self, actions: Mapping[int, Go]) -> None:
        self._target.resume(actions)
        self.running = True

    # -- the session

    def _offers(self, _: str) -> bytes:
        return b"PacketSize=%x;qXfer:features:read+;QStartNoAckMode+;vContSupported+;hwbreak+;swbreak+" % PACKET_SIZE

    def _stop_acks(self, _: str) -> bytes:
        self.no_acks = True
        return b"OK"

    def _transfer(self, rest: str) -> bytes:
        offset, size = _range(rest)
        part = escape(self._description[offset : offset + min(size, PACKET_SIZE // 2)])
        return (b"m" if offset + size < len(self._description) else b"l") + part

    def _command(self, rest: str) -> bytes:
        command = bytes.fromhex(rest).decode("utf-8", "replace")
        said = self._monitor(self._thread, command)
        return said.encode()[: PACKET_SIZE // 2].hex().encode() or b"OK"

    def _detach(self, _: str) -> bytes:
        self._target.detach()
        self.over = True
        return b"OK"

    def _kill(self, _: str) -> None:
        self._target.kill()
        self.over = True

    def _kill_process(self, _: str) -> bytes:
        self._kill("")
        return b"OK"


_GO: Final = {"c": Go.CONTINUE, "C": Go.CONTINUE, "s": Go.STEP, "S": Go.STEP}

_BY_PREFIX: Final[Sequence[tuple[str, Callable[[Session, str], bytes | None]]]] = (
    ("qSupported", Session._offers),
    ("QStartNoAckMode", Session._stop_acks),
    ("qXfer:features:read:target.xml:", Session._transfer),
    ("qfThreadInfo", Session._threads),
    ("qsThreadInfo", lambda _session, _rest: b"l"),
    ("qThreadExtraInfo,", Session._describe),
    # The guest existed before the debugger, so GDB should detach at its end, not kill.
    ("qAttached", lambda _session, _rest: b"1"),
    ("qRcmd,", Session._command),
    ("qC", Session._current),
    ("vCont?", lambda _session, _rest: b"vCont;c;C;s;S"),
    ("vCont;", Session._resume),
    ("vKill", Session._kill_process),
    ("?", Session._why),
    ("g", Session._registers),
    ("G", Session._set_registers),
    ("p", Session._register),
    ("P", Session._set_register),
    ("m", Session._read),
    ("M", Session._write),
    ("X", Session._write_binary),
    ("Z", Session._insert),
    ("z", Session._remove),
    ("H", Session._select),
    ("T", Session._alive),
    ("c", Session._continue),
    ("C", Session._continue_signal),
    ("s", Session._step),
    ("S", Session._step_signal),
    ("D", Session._detach),
    ("k", Session._kill),
)


def _hex(text: str) -> int:
    """Parse an unsigned hexadecimal number, more strictly than int()."""
    if not text or not all(digit in "0123456789abcdefABCDEF" for digit in text):
        raise ValueError(text)
    value = int(text, 16)
    if value >> 64:
        raise ValueError(text)
    return value


def _number(text: str) -> int:
    number = _hex(text)
    if number >= len(REGISTERS):
        raise ValueError(text)
    return number


def _thread(text: str) -> int:
    return _ALL if text == "-1" else _hex(text)


def _range(text: str) -> tuple[int, int]:
    start, _, size = text.partition(",")
    return _hex(start), _hex(size)
