# SPDX-License-Identifier: Apache-2.0
"""Record the guest addresses at which vCPUs fault: tracefs' kvm_guest_fault, in a private instance.

A :class:`FaultTrace` owns a directory of tracefs, its ring buffers and one descriptor. It releases all at its end. It
needs root and the initial pid namespace, and reports why it cannot record. KVM emits the event for every stage-2 abort
that reaches the host: the first access to a page, and every access to a device.
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
"""PROC_PID_INIT_INO of include/linux/proc_ns.h: trace filters only support pids of this namespace."""

# python3-97      [001] .....     6.476583: kvm_guest_fault: ipa 0x80084000, hsr 0x93c68047, hxfar 0x…, pc 0x…
_LINE = re.compile(
    rb"-(?P<tid>\d+)\s+\[\d+\].* (?P<s>\d+)\.(?P<us>\d{6}): kvm_guest_fault: "
    rb"ipa (?P<ipa>0x[0-9a-f]+|0), hsr (?P<esr>0x[0-9a-f]+|0)\b"
    rb"|\[LOST (?P<lost>\d+) EVENTS\]"
)
_CHUNK = 1 << 16
MOST = 1 << 20
"""Maximum faults to keep, so that a guest cannot fill memory. The first ones are kept."""

# ESR_EL2 (Arm ARM D24.2.40): the exception class, and the syndrome bits that describe an abort.
_FETCH, _DATA = 0x20, 0x24
_WNR, _S1PTW, _CM = 1 << 6, 1 << 7, 1 << 8


@dataclass(frozen=True, slots=True)
class TracedFault:
    """One stage-2 abort of a guest. ``write`` and ``fetch`` are None if the syndrome does not contain them.

    ``ns`` is CLOCK_MONOTONIC, truncated to microseconds by the kernel's text. ``gpa`` is the page, ``tid`` the vCPU's
    thread.
    """

    ns: int
    gpa: int
    write: bool | None
    fetch: bool | None
    tid: int = 0


class FaultTrace:
    """Records the faults of this process's guests. A context manager that never raises if it cannot record.

    Enter it before the vCPUs' threads start: it records existing threads and those that they start later. ``within``
    are the guest addresses to record, by default all. Device accesses are faults too, and fill the buffer.
    """

    def __init__(self, within: range | None = None) -> None:
        self.why_not = "it has not begun"
        """Why nothing is recorded; empty if :attr:`available`."""
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
        """Read the kernel's buffer."""
        with self._lock:
            if self._pipe is not None:
                self._drain(self._pipe)

    def faults(self) -> list[TracedFault]:
        """Return the faults recorded so far, the oldest first. Also valid after the end."""
        self.collect()
        with self._lock:
            return sorted(self._faults, key=lambda fault: fault.ns)

    @property
    def lost(self) -> int:
        """Faults dropped for lack of room, in the kernel's buffer or here, as of the last :meth:`faults`."""
        return self._lost

    def _begin(self) -> str:
        """Start the kernel's recording. Returns why it cannot, or an empty text."""
        root = next((path for path in TRACEFS if os.path.isdir(f"{path}/instances")), None)
        if root is None:
            if os.geteuid():
                return "only root can read the kernel's trace (tracefs)"
            return "tracefs is not mounted: mount -t tracefs nodev /sys/kernel/tracing"
        if os.stat("/proc/self/ns/pid").st_ino != _INITIAL_PID_NAMESPACE:
            return "this is a container with its own pid namespace, which kernel tracing does not support"
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
        # Reading trace_pipe removes events from the buffer, so frequent reads cost no more than one.
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
        with self._lock:  # it may have a reader
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
    """Return whether an abort's syndrome is (a write, a fetch); None for an unknown one."""
    kind = esr >> 26
    if kind not in (_FETCH, _DATA) or esr & _S1PTW:
        return None, None  # a table walk's abort belongs to a load or a store
    return kind == _DATA and bool(esr & _WNR) and not esr & _CM, kind == _FETCH


def guest_fault(fault_again: Callable[[], object]) -> tuple[int | None, str]:
    """Let this thread's vCPU fault once more. Returns (gpa, "") from the kernel's trace, or (None, the reason)."""
    with FaultTrace() as trace:
        if not trace.available:
            return None, f"whose address is unknown: {trace.why_not}"
        fault_again()
        own = [fault for fault in trace.faults() if fault.tid == threading.get_native_id()]
    if not own:
        return None, "whose address is unknown: the kernel traced no fault"
    # The tracepoint prints the IPA's page from HPFAR_EL2, without the offset in the page.
    return own[-1].gpa, ""


def _make(instances: str) -> str:
    """Make an instance with an unused name."""
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
    """Remove the instances of killed processes: their buffers use kernel memory."""
    for name in os.listdir(instances):
        pid = name.removeprefix(_PREFIX).partition("-")[0]
        if name.startswith(_PREFIX) and pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            with contextlib.suppress(OSError):
                os.rmdir(f"{instances}/{name}")
