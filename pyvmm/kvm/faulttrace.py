# SPDX-License-Identifier: Apache-2.0
"""Asks the kernel at which guest addresses vCPUs fault: tracefs' kvm_guest_fault, in an instance of our own.

A :class:`FaultTrace` owns a directory of tracefs, the ring buffers behind it and one descriptor; all are gone when it
is left. It needs root and the initial pid namespace, and says why not where it cannot record. The event is KVM's for
every stage-2 abort that reaches the host: the first touch of a page, and every access to a device's address.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
EVENT = "events/kvm/kvm_guest_fault"
_PREFIX = "pyvmm-"
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO of include/linux/proc_ns.h: trace filters know no other namespace's pids."""

# python3-97      [001] .....     6.476583: kvm_guest_fault: ipa 0x80084000, hsr 0x93c68047, hxfar 0x…, pc 0x…
_LINE = re.compile(
    rb"-(?P<tid>\d+)\s+\[\d+\].* (?P<s>\d+)\.(?P<us>\d{6}): kvm_guest_fault: "
    rb"ipa (?P<ipa>0x[0-9a-f]+|0), hsr (?P<esr>0x[0-9a-f]+|0)\b"
    rb"|\[LOST (?P<lost>\d+) EVENTS\]"
)
_CHUNK = 1 << 16
MOST = 1 << 20
"""Faults kept; a guest must not make the list longer than this. The first ones are."""

# ESR_EL2 (Arm ARM D24.2.40): the exception class, and of an abort's syndrome the bits that say what it was.
_FETCH, _DATA = 0x20, 0x24
_WNR, _S1PTW, _CM = 1 << 6, 1 << 7, 1 << 8


@dataclass(frozen=True, slots=True)
class TracedFault:
    """One stage-2 abort of a guest; ``write`` and ``fetch`` are None where the syndrome does not say.

    ``ns`` is CLOCK_MONOTONIC, cut to the microsecond by the kernel's text; ``gpa`` is the page; ``tid`` the thread of
    the vCPU.
    """

    ns: int
    gpa: int
    write: bool | None
    fetch: bool | None
    tid: int = 0


class FaultTrace:
    """Records the faults of this process's guests; a context manager that never raises for want of the means.

    Enter it before the vCPUs' threads start: threads that exist, and those they start from then on, are recorded.
    ``within`` are the guest addresses wanted, all unless told; devices' accesses are faults too, and fill the buffer.
    """

    def __init__(self, within: range | None = None) -> None:
        self.why_not = "it has not begun"
        """Why nothing is recorded; empty where :attr:`available`."""
        self._within = within
        self._instance: str | None = None
        self._pipe: int | None = None
        self._rest = b""
        self._faults: list[TracedFault] = []
        self._lost = 0
        self._lock = threading.Lock()

    @property
    def available(self) -> bool:
        """Whether faults are, or were, recorded."""
        return not self.why_not

    def __enter__(self) -> Self:
        try:
            self.why_not = self._begin()
        except OSError as error:
            self.why_not = f"{error.filename or 'tracefs'}: {error.strerror}"
        if self.why_not:
            self._remove()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.collect()
        finally:
            self._remove()

    def collect(self) -> None:
        """Take what is in the kernel's buffer."""
        with self._lock:
            if self._pipe is not None:
                self._drain(self._pipe)

    def faults(self) -> list[TracedFault]:
        """Return what was recorded until now, the oldest first; also after the end."""
        self.collect()
        with self._lock:
            return sorted(self._faults, key=lambda fault: fault.ns)

    @property
    def lost(self) -> int:
        """How many faults there was no room for, in the kernel's buffer or here, as of the last :meth:`faults`."""
        return self._lost

    def _begin(self) -> str:
        """Set the kernel recording; returns why it cannot be, or nothing."""
        root = next((path for path in TRACEFS if os.path.isdir(f"{path}/instances")), None)
        if root is None:
            if os.geteuid():
                return "the kernel tells root only, through tracefs"
            return "tracefs, through which the kernel tells, is not mounted: mount -t tracefs nodev /sys/kernel/tracing"
        if os.stat("/proc/self/ns/pid").st_ino != _INITIAL_PID_NAMESPACE:
            return "this is a container with process ids of its own, which the kernel's tracing does not know"
        if not os.path.isdir(f"{root}/{EVENT}"):
            return "this kernel has no kvm_guest_fault event"
        _sweep(f"{root}/instances")
        self._instance = _make(f"{root}/instances")
        self._put("trace_clock", "mono")
        self._put("options/event-fork", "1")
        self._put("set_event_pid", " ".join(os.listdir("/proc/self/task")))
        if self._within is not None:
            self._put(f"{EVENT}/filter", f"ipa >= {self._within.start} && ipa < {self._within.stop}")
        self._pipe = os.open(f"{self._instance}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._put(f"{EVENT}/enable", "1")
        return ""

    def _put(self, name: str, text: str) -> None:
        with open(f"{self._instance}/{name}", "w") as file:
            file.write(text)

    def _drain(self, pipe: int) -> None:
        # trace_pipe takes what it shows out of the buffer: asking often costs no more than asking once.
        with contextlib.suppress(OSError):
            while data := os.read(pipe, _CHUNK):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._take(line)

    def _take(self, line: bytes) -> None:
        match = _LINE.search(line)
        if match is None:
            return
        if match["lost"]:
            self._lost += int(match["lost"])
            return
        if len(self._faults) >= MOST:
            self._lost += 1
            return
        ns = int(match["s"]) * 1_000_000_000 + int(match["us"]) * 1000
        self._faults.append(TracedFault(ns, int(match["ipa"], 16), *access(int(match["esr"], 16)), int(match["tid"])))

    def _remove(self) -> None:
        with self._lock:  # somebody may be reading
            pipe, self._pipe = self._pipe, None
            if pipe is not None:
                os.close(pipe)
        if self._instance is not None:
            with contextlib.suppress(OSError):
                self._put(f"{EVENT}/enable", "0")
            with contextlib.suppress(OSError):
                os.rmdir(self._instance)
            self._instance = None


def access(esr: int) -> tuple[bool | None, bool | None]:
    """Say of an abort's syndrome whether it was (a write, a fetch); None where it does not tell."""
    kind = esr >> 26
    if kind not in (_FETCH, _DATA) or esr & _S1PTW:
        return None, None  # a walker's own abort is on the way to an access of either kind
    return kind == _DATA and bool(esr & _WNR) and not esr & _CM, kind == _FETCH


def guest_fault(fault_again: Callable[[], object]) -> tuple[int | None, str]:
    """Let this thread's vCPU fault once more and return (gpa, "") as the kernel traced it, or (None, why not)."""
    with FaultTrace() as trace:
        if not trace.available:
            return None, f"which is not known: {trace.why_not}"
        fault_again()
        own = [fault for fault in trace.faults() if fault.tid == threading.get_native_id()]
    if not own:
        return None, "which is not known: the kernel traced no fault"
    # The tracepoint prints the IPA's page from HPFAR_EL2; the offset in the page is not told.
    return own[-1].gpa, ""


def _make(instances: str) -> str:
    """Make an instance of a name that nobody has."""
    number = 0
    while True:
        path = f"{instances}/{_PREFIX}{os.getpid()}-{number}"
        try:
            os.mkdir(path)
        except FileExistsError:
            number += 1
        else:
            return path


def _sweep(instances: str) -> None:
    """Remove what processes that were killed have left: their buffers are the kernel's memory."""
    for name in os.listdir(instances):
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with contextlib.suppress(OSError):
                os.rmdir(f"{instances}/{name}")
